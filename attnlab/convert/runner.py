"""Converts the language model of a run: what is the same for every target.

    OUT/distill/          what a target trains before anything else, see `to_NAME.py`
    OUT/tune/             the fine-tuning: a run of the converted model with low-rank changes
    OUT/conversion.json   what was asked, and the quality before, after conversion, and after fine-tuning
    OUT/                  the converted model as a run: `attnlab generate` and `attnlab train` take it

Called again, it goes on from what is there.

A target is a module `to_NAME.py` with

    class Options(ConvertOptions): ...                   its own options
    def convert(given: Given, options: Options, directory: Path) -> Converted
"""

import dataclasses
import importlib
import json
import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import tyro
from flax import nnx

import attnlab.convert
import attnlab.data
from attnlab import experiment as experiments
from attnlab.experiment import Experiment, ModelConfig
from attnlab.nn.lora import adapter_parameters, merge_adapters, with_adapter
from attnlab.suggest import suggestion
from attnlab.training import OptimizerConfig, TrainConfig, train
from attnlab.training.evaluation import evaluate, on_one_device

PREFIX = "to_"
ADAPTER = "conversion"
REPORT = "conversion.json"
STAGES = ("before", "after conversion", "after fine-tuning")


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """What every conversion is told.

    Attributes:
      run_dir: directory of a run of `attnlab train` with a language model.
      to: the target.
      out_dir: directory of the new run; RUN_DIR_TARGET when None.
      step: number of steps of the checkpoint to convert; the newest when None.
      tune_steps: steps of fine-tuning behind the conversion; 0 for none.
      tune_learning_rate: at its peak.
      rank: of the low-rank changes of the mixers' projections that are trained; None to train all parameters.
      alpha: the changes are scaled by alpha / rank; twice the rank when None.
      batch_size: examples of a step; that of the run when None.
    """

    run_dir: Annotated[str, tyro.conf.Positional]
    to: str = "hedgehog"
    out_dir: str | None = None
    step: int | None = None
    tune_steps: int = 300
    tune_learning_rate: float = 2e-3
    rank: int | None = 8
    alpha: float | None = None
    batch_size: int | None = None


class Given(NamedTuple):
    """What a target is given.

    Attributes:
      experiment: of the run.
      dataset: its data, open.
      model: as it was trained.
      progress: whether to show progress on standard error.
    """

    experiment: Experiment
    dataset: attnlab.data.Dataset
    model: nnx.Module
    progress: bool = True

    def training(self, steps: int, learning_rate: float, batch_size: int | None) -> TrainConfig:
        """The run's own settings, but for another number of steps."""
        before = self.experiment.train
        return dataclasses.replace(
            before,
            steps=steps,
            epochs=None,
            ema=None,
            batch_size=before.batch_size if batch_size is None else batch_size,
            accumulate=before.accumulate if batch_size is None else 1,
            eval_batch_size=before.eval_batch_size or before.batch_size,
            eval_every=None,
            dtype="float32",  # for the loop: a module computes as it was built
            optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=min(20, steps // 5), weight_decay=0.0),
        )


class Converted(NamedTuple):
    """What a target returns.

    Attributes:
      config: of the new model.
      model: as `config` builds it, with its parameters.
    """

    config: ModelConfig
    model: nnx.Module


@dataclasses.dataclass(frozen=True)
class Report:
    """A finished conversion.

    Attributes:
      directory: of the new run.
      quality: metrics of the evaluation split by stage, those of `STAGES` that there were.
    """

    directory: Path
    quality: Mapping[str, Mapping[str, float]]


def targets() -> tuple[str, ...]:
    """What a model can be converted to."""
    found = (module.name for module in pkgutil.iter_modules(attnlab.convert.__path__))
    return tuple(sorted(name.removeprefix(PREFIX) for name in found if name.startswith(PREFIX)))


def target(name: str) -> ModuleType:
    """The module of a target.

    Raises:
      ValueError: if there is none of that name, with the nearest ones.
    """
    if name not in targets():
        raise ValueError(f"no conversion is to {name!r}: {suggestion(name, targets())}")
    return importlib.import_module(f"attnlab.convert.{PREFIX}{name}")


def convert(options: ConvertOptions, *, progress: bool = True) -> Report:
    """Converts the model of a run and fine-tunes it, or goes on where an earlier call stopped.

    Args:
      options: of the class `Options` of the target's module.
      progress: whether to show progress on standard error.

    Raises:
      FileNotFoundError: if the directory holds no run, or no such checkpoint.
      ValueError: if the model is no causal language model or has no counterpart; or `out_dir` holds something else.
      TrainingInterrupted: after SIGTERM or Ctrl-C; the same call goes on.
    """
    to, source = target(options.to), Path(options.run_dir)
    experiment, _ = experiments.load(source)
    if experiment.model.kind != "text" or not getattr(experiment.model, "causal", True):
        raise ValueError(f"{source} holds a {type(experiment.model).__name__}, no causal language model")
    directory = Path(options.out_dir or f"{source}_{options.to}")
    asked = json.loads(json.dumps(dataclasses.asdict(options) | {"out_dir": None}))
    if (found := _finished(directory, asked)) is not None:
        return found
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if progress else (lambda text: None)
    dataset = experiment.open()
    teacher = experiments.load_trained(source, step="newest" if options.step is None else options.step)
    given = Given(experiment, dataset, teacher, progress)
    batch_size = experiment.train.eval_batch_size or experiment.train.batch_size
    quality = {}

    def judge(stage: str, model: nnx.Module) -> None:
        quality[stage] = evaluate(model, experiment.task_for(model), dataset, batch_size)
        say(f"{stage}: {', '.join(f'{name} {value:.4g}' for name, value in quality[stage].items())}")

    judge(STAGES[0], teacher)
    config, model = to.convert(given, options, directory)
    model = on_one_device(model)
    judge(STAGES[1], model)
    if options.tune_steps:
        model = _tuned(given, model, options, directory / "tune")
        judge(STAGES[2], model)
    settings = given.training(max(options.tune_steps, 1), options.tune_learning_rate, options.batch_size)
    settings = dataclasses.replace(settings, dtype=experiment.train.dtype)
    new = dataclasses.replace(experiment, model=config, train=settings)
    last = list(quality.values())[-1]
    experiments.save_trained(model, new, directory, dataset=dataset, metrics=last)
    text = json.dumps({"asked": asked, "quality": quality}, indent=1)
    (directory / REPORT).write_text(text + "\n", encoding="utf-8")
    return Report(directory, quality)


def _finished(directory: Path, asked: Mapping[str, Any]) -> Report | None:
    """The report of an earlier call that came to its end."""
    if not (directory / REPORT).is_file():
        if (directory / "config.json").exists():
            raise ValueError(f"{directory} holds another run; name a new directory with --out-dir")
        return None
    saved = json.loads((directory / REPORT).read_text(encoding="utf-8"))
    if saved["asked"] != asked:
        differ = [name for name in asked if saved["asked"].get(name) != asked[name]]
        raise ValueError(f"{directory} holds a conversion with another {', '.join(differ)}; name a new --out-dir")
    return Report(directory, saved["quality"])


def _tuned(given: Given, model: nnx.Module, options: ConvertOptions, directory: Path) -> nnx.Module:
    """The model after fine-tuning: of low-rank changes, which are merged, or of all parameters."""
    config = given.training(options.tune_steps, options.tune_learning_rate, options.batch_size)
    trainable: Any = nnx.Param
    if options.rank is not None:
        alpha = 2.0 * options.rank if options.alpha is None else options.alpha
        rngs = nnx.Rngs(given.experiment.train.seed)
        model = with_adapter(model, ADAPTER, rank=options.rank, alpha=alpha, where=_of_mixers, rngs=rngs)
        trainable = adapter_parameters(ADAPTER)
    task, about = given.experiment.task_for(model), dataclasses.asdict(options)
    about = {name: value for name, value in about.items() if name not in ("out_dir", "tune_steps")}
    result = train(
        model,
        task,
        given.dataset,
        config,
        directory,
        experiment=about,
        trainable=trainable,
        progress=given.progress,
    )
    return merge_adapters(on_one_device(result.model))


def _of_mixers(path: tuple[Any, ...]) -> bool:
    """Whether a linear map is one of a mixer's."""
    return "mixer" in path
