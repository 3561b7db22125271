"""Trains every mixer in a directory of its own, measures it, and writes what was found.

    DIRECTORY/MIXER/           a run of `attnlab train`, with its checkpoints
    DIRECTORY/MIXER/entry.json what is known of a finished mixer; read instead of training it again
    DIRECTORY/MIXER/seed_S/    the same for every further seed
    DIRECTORY/results.json     all of it
    DIRECTORY/plots/           the figures
    DIRECTORY/report.html      the page

Called again, it goes on from what is there.
"""

import dataclasses
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

import attnlab.data
from attnlab import experiment as experiments
from attnlab.compare import measure, noise, plots, report, size
from attnlab.compare import results as results_file
from attnlab.compare.results import Comparison, Entry, Sample
from attnlab.data.tokenizer import END_OF_TEXT, VOCAB_SIZE, decode, encode
from attnlab.experiment import Experiment
from attnlab.training import ConfigMismatch, TrainResult

LENGTHS = {"image": (64, 256, 1024, 4096), "text": (256, 512, 1024, 2048), "vectors": (64, 256, 1024)}
MULTIPLES = (0.5, 1, 2, 4, 8)
"""Of the length in training: where a task is measured."""
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """What a comparison does besides training.

    Attributes:
      lengths: numbers of tokens at which mixers are timed alone; empty for no timing; those of `LENGTHS` when None.
      prompt: beginning of the text that language models continue.
      sample_tokens: tokens of it.
      task_lengths: numbers of tokens at which models of a synthetic task of token ids are evaluated; empty for none;
        `MULTIPLES` of the length in training when None.
      progress: whether to show progress on standard error.
      seeds: number of seeds, from the experiment's on; the first one's models are those measured.
      match: what the mixers' models have as much of as that of the first mixer, by their width; None for one width.
    """

    lengths: tuple[int, ...] | None = None
    prompt: str = "def main("
    sample_tokens: int = 240
    progress: bool = True
    seeds: int = 1
    match: size.Measure | None = None
    task_lengths: tuple[int, ...] | None = None


def compare(
    experiment: Experiment,
    mixers: Sequence[str],
    directory: str | Path,
    *,
    title: str,
    options: Options | None = None,
) -> report.Section:
    """Trains the experiment once for each mixer, and writes results, figures and report.

    A mixer that cannot be trained becomes an entry with the reason; the others go on.

    Args:
      experiment: model, data, task and training; its own mixer is replaced.
      mixers: registered names.
      directory: where everything is written.
      title: of the report.
      options: what to do besides.

    Returns:
      The comparison and its figures, as `report.write_report` takes them.

    Raises:
      KeyError: for a mixer that is not registered, with the nearest names.
      ValueError: for a mixer that is named twice, or parts of the experiment that do not fit together.
      DataError: if the data is missing or broken.
      ConfigMismatch: if the directory holds a comparison with other settings.
      TrainingInterrupted: after SIGTERM or Ctrl-C; what was trained is kept.
    """
    options = options or Options()
    if options.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {options.seeds}")
    if options.match not in (None, *size.MEASURES):
        raise ValueError(f"match must be one of {', '.join(size.MEASURES)}, got {options.match!r}")
    if len(set(mixers)) < len(mixers) or not mixers:
        raise ValueError(f"mixers must be different names, at least one, got: {', '.join(mixers) or 'none'}")
    trials = [experiment.with_mixer(mixer) for mixer in mixers]  # finds misspelt names before anything is trained
    for trial in trials:
        trial.check()
    dataset = experiment.open()
    directory = Path(directory)
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if options.progress else (lambda text: None)
    tokens, example = measure.example_of(experiment, dataset)
    entries, maps = [], {}
    sizes = _Sizes(trials[0], dataset.info, options.match, tokens)
    for number, (mixer, trial) in enumerate(zip(mixers, trials, strict=True), start=1):
        say(f"[{number}/{len(mixers)}] {mixer}")
        entry = _over_seeds(trial, mixer, dataset, directory / mixer, tokens, options, sizes, say)
        entries.append(entry)
        attention = directory / mixer / "attention.npz"
        if entry.status == "done" and attention.exists():
            with np.load(attention) as arrays:
                weights = [arrays[name] for name in arrays.files]
            if matching := measure.maps_for(example, weights):
                maps[mixer] = matching
    comparison = Comparison(
        title=title,
        kind=_kind(experiment),
        data=_data_facts(dataset.info),
        setting=_setting_facts(experiment) | sizes.facts(mixers[0]),
        machine=_machine_facts(),
        config=experiments.as_dict(experiment),
        entries=tuple(entries),
    )
    results_file.save(comparison, directory / "results.json")
    say("drawing")
    section = report.Section(
        comparison, plots.draw_all(comparison, dataclasses.replace(example, maps=maps), directory / "plots")
    )
    report.write_report(directory / "report.html", [section])
    return section


class _Sizes:
    """The size that all models have where they are matched, that of the first."""

    def __init__(self, first: Experiment, info: attnlab.data.DatasetInfo, match: size.Measure | None, x: np.ndarray):
        self.info, self.match = info, match
        length = getattr(first.task, "sequence_length", None)
        self.inputs = jax.ShapeDtypeStruct(x.shape if length is None else (1, length), x.dtype)
        self.target = None if match is None else size.size_of(first, info, match, self.inputs)

    def matched(self, trial: Experiment) -> tuple[Experiment, dict[str, Any]]:
        """The experiment at its width, and what the entry says of it."""
        if self.match is None or self.target is None:
            return trial, {}
        trial = size.matched(trial, self.info, self.match, self.inputs, self.target)
        about: dict[str, Any] = {"width": size.width(trial.model)}
        if self.match == "flops":
            about["flops"] = size.size_of(trial, self.info, "flops", self.inputs)
        return trial, about

    def facts(self, first: str) -> dict[str, str]:
        if self.match is None:
            return {}
        what = {"parameters": "parameters", "flops": "operations of a forward pass on one example"}[self.match]
        return {"size": f"each at the width at which its {what} are nearest to the {self.target:,} of {first}"}


def _over_seeds(
    trial: Experiment,
    mixer: str,
    dataset: attnlab.data.Dataset,
    directory: Path,
    tokens: np.ndarray,
    options: Options,
    sizes: _Sizes,
    say: Say,
) -> Entry:
    """What is known of one mixer, over all seeds."""
    try:
        trial, about = sizes.matched(trial)
    except ValueError as error:
        say(f"    failed: {error}")
        return Entry(mixer, "failed", reason=str(error))
    entries: list[Entry] = []
    for seed in range(trial.train.seed, trial.train.seed + options.seeds):
        first = seed == trial.train.seed
        if options.seeds > 1:
            say(f"    seed {seed}")
        one = dataclasses.replace(trial, train=dataclasses.replace(trial.train, seed=seed))
        folder = directory if first else directory / f"seed_{seed}"
        entries.append(_entry(one, mixer, dataset, folder, tokens, options, say, measured=first))
        if entries[-1].status == "failed":
            return entries[-1]
    return dataclasses.replace(noise.over_seeds(entries), **about)


def _entry(
    trial: Experiment,
    mixer: str,
    dataset: attnlab.data.Dataset,
    directory: Path,
    tokens: np.ndarray,
    options: Options,
    say: Say,
    *,
    measured: bool,
) -> Entry:
    """What is known of one mixer and seed: from an earlier call, or by training and measuring it now."""
    lengths = LENGTHS[trial.model.kind] if options.lengths is None else options.lengths
    lengths = lengths if measured else ()
    asked = {
        "experiment": experiments.as_dict(trial),
        "digest": dataset.info.digest,
        "lengths": list(lengths),
        "prompt": [options.prompt, options.sample_tokens],
    }
    task_lengths = _task_lengths(trial, options) if measured else ()
    if task_lengths:
        asked["task_lengths"] = list(task_lengths)
    asked = json.loads(json.dumps(asked))
    file = directory / "entry.json"
    if file.exists():
        saved = json.loads(file.read_text())
        if saved["asked"] == asked:
            say(f"    finished before: {_words(trial, results_file.entry_from(saved['entry']))}")
            return results_file.entry_from(saved["entry"])
    try:
        trained = experiments.run(trial, directory, dataset=dataset, progress=options.progress)
        entry = _trained_entry(trial, mixer, trained)
        if measured:
            say("    measuring")
            entry = dataclasses.replace(
                entry,
                timings=measure.time_mixer(trial, mixer, lengths),
                sample=_sample(trained, options) if _is_bytes(dataset.info) and options.sample_tokens else None,
                decode_state=measure.decode_state(trained.model) if trial.model.kind == "text" else None,
            )
            if task_lengths:
                curve, beyond = measure.quality_at_lengths(trained.model, trial, task_lengths)
                entry = dataclasses.replace(entry, lengths=curve, beyond=beyond)
            weights = measure.attention_of(trained.model, tokens)
            layers = {f"layer{i:03}": layer for i, layer in enumerate(weights)}
            np.savez_compressed(directory / "attention.npz", **layers)
    except ConfigMismatch:
        raise
    except Exception as error:  # one mixer that cannot be built, compiled or trained must not sink the others
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        say(f"    failed: {reason}")
        return Entry(mixer, "failed", reason=reason)
    results_file.write_text(file, json.dumps({"asked": asked, "entry": dataclasses.asdict(entry)}, indent=1) + "\n")
    say(f"    {_words(trial, entry)}")
    return entry


def _trained_entry(trial: Experiment, mixer: str, trained: TrainResult) -> Entry:
    split = "eval_ema" if "eval_ema" in trained.metrics else "eval"
    name = results_file.QUALITIES[_kind(trial)].metric
    records = [(record["split"], record["step"], record["values"]) for record in trained.history]
    curves: dict[str, Any] = {
        "train_curve": tuple((step, values["loss"]) for which, step, values in records if which == "train"),
        "eval_curve": tuple((step, values[name]) for which, step, values in records if which == split),
    }
    quality = trained.metrics[split][name]
    return Entry(
        mixer,
        "done",
        parameters=trained.parameters,
        quality=quality,
        loss=trained.metrics[split]["loss"],
        steps=trained.steps,
        seconds=trained.seconds,
        steps_per_second=trained.steps_per_second,
        items_per_second=trained.units_per_second,
        step_bytes=trained.step_bytes,
        seeds=(results_file.SeedResult(trial.train.seed, quality, **curves),),
        **curves,
    )


def _kind(experiment: Experiment) -> str:
    """The key of `QUALITIES` for an experiment."""
    return "task" if experiment.model.kind == "text" and _is_task(experiment) else experiment.model.kind


def _is_task(experiment: Experiment) -> bool:
    return isinstance(experiment.data, attnlab.data.TaskData)


def _task_lengths(experiment: Experiment, options: Options) -> tuple[int, ...]:
    """The lengths at which a task is evaluated, rising; none of other data."""
    if _kind(experiment) != "task":
        return ()
    if options.task_lengths is not None:
        return tuple(sorted(set(options.task_lengths)))
    return tuple(max(1, round(multiple * experiment.task.sequence_length)) for multiple in MULTIPLES)


def _is_bytes(info: attnlab.data.DatasetInfo) -> bool:
    """Whether tokens are bytes, so that a text can be continued."""
    return info.kind == "text" and info.vocab_size == VOCAB_SIZE


def _sample(trained: TrainResult, options: Options) -> Sample:
    from attnlab.models.generate import generate

    generation = generate(
        trained.model,
        encode(options.prompt)[None],
        max_new_tokens=options.sample_tokens,
        key=jax.random.key(0),
        temperature=0.8,
        top_p=0.95,
        stop_tokens=(END_OF_TEXT,),
        pad_token=END_OF_TEXT,
    )
    return Sample(options.prompt, decode(np.asarray(generation.tokens[0])).decode(errors="replace"))


def _words(trial: Experiment, entry: Entry) -> str:
    its = results_file.QUALITIES[_kind(trial)]
    quality = f"{its.factor * entry.quality:.{its.digits}f}" + (its.unit or f" {its.name}")
    return f"{quality} after {entry.steps} steps in {entry.seconds:.0f} s"


def _data_facts(info: attnlab.data.DatasetInfo) -> dict[str, str]:
    unit = results_file.QUALITIES[info.kind].items
    facts = {"data": f"{info.name}: {info.train_size:,} {unit} for training, {info.eval_size:,} for evaluation"}
    if info.image_shape:
        facts["images"] = " × ".join(map(str, info.image_shape)) + f", {info.num_classes} classes"
    details = ", ".join(f"{name} {value}" for name, value in info.details.items())
    return facts | ({"details": details} if details else {}) | {"digest": info.digest[:16]}


def _setting_facts(experiment: Experiment) -> dict[str, str]:
    model, train = experiment.model, experiment.train
    shape = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name in ("patch_size", "features", "depth", "depths", "num_heads", "mlp_ratio")
    }
    kind = re.sub("Config$", "", type(model).__name__)
    length = f" of {experiment.task.sequence_length} tokens" if model.kind == "text" else ""
    optimizer = train.optimizer
    return {
        "model": f"{kind}, " + ", ".join(f"{name.replace('_', ' ')} {_number(value)}" for name, value in shape.items()),
        "training": f"{train.steps or f'{train.epochs} epochs /'} steps of {train.batch_size} examples{length}, "
        f"{optimizer.name}, learning rate {optimizer.learning_rate:g} ({optimizer.schedule}, warm-up "
        f"{optimizer.warmup_steps}), weight decay {optimizer.weight_decay:g}, "
        f"{f'average of the weights {train.ema:g}, ' if train.ema else ''}{train.dtype}, seed {train.seed}",
    }


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _machine_facts() -> dict[str, str]:
    device = jax.devices()[0]
    name = f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind
    packages = ", ".join(f"{package} {metadata.version(package)}" for package in ("jax", "flax"))
    return {
        "device": f"{name} ({platform.machine()})",
        "versions": f"{packages}, Python {platform.python_version()}",
        "finished": time.strftime("%Y-%m-%d %H:%M"),
    }
