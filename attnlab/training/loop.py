"""The training loop.

    model = functools.partial(ViT, (8, 8), 10, channels=1, patch_size=2)
    data = attnlab.data.open("digits")
    result = train(model, ClassificationTask(), data, TrainConfig(steps=1000), "runs/vit")

A run lives in its directory:

    config.json      its settings; another run with other settings is refused
    metrics.jsonl    see `attnlab.training.metrics`; and tensorboard/
    checkpoints/     see `attnlab.training.checkpoint`

Called again with the same settings, `train` goes on from the newest checkpoint, with the losses that it would have had
without the interruption, bit for bit on the same machine; a finished run is not trained again. Everything random
follows from `TrainConfig.seed`.
"""

import collections
import contextlib
import dataclasses
import json
import math
import signal
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from attnlab.compiling import compiled_for_once
from attnlab.training import sharding
from attnlab.training.checkpoint import Checkpoints
from attnlab.training.config import DTYPES, TrainConfig, check_same_settings, read_settings, settings_as_dict
from attnlab.training.interrupt import StopRequests, TrainingInterrupted
from attnlab.training.metrics import MetricsLog, ProgressLine, Record, Stopwatch
from attnlab.training.optimizer import make_optimizer, make_schedule
from attnlab.training.state import TrainState, all_finite, count_parameters, init_state, make_eval_step, make_train_step
from attnlab.training.task import Sums, Task
from pallas_kernels import partition

# Steps whose losses are still on the device: the host looks at a loss only when it has queued this many steps more.
LAG = 2

ModelSource = nnx.Module | Callable[..., nnx.Module]


class Data(Protocol):
    """What the loop asks of a dataset; `attnlab.data.Dataset` is one."""

    def train(self, batch_size: int, seed: int, **options: Any) -> Any:
        """An endless iterator of dicts of arrays, with `get_state` (for JSON) and `set_state`."""

    def eval(self, batch_size: int, **options: Any) -> Any:
        """One pass over the evaluation split; every batch is whole, and what fills it up has the weight 0."""

    def num_examples(self, split: str, **options: Any) -> int:
        """Examples of an epoch; asked only where `TrainConfig.epochs` is given."""


class NonFiniteError(FloatingPointError):
    """The loss, the gradient or the parameters became infinite or NaN."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
      history: all records of `metrics.jsonl`.
      metrics: of the final evaluation, by split: "eval", and "eval_ema" with averaged parameters.
      parameters: number of trained scalars.
      steps: done.
      seconds: spent on training steps, without compilation, evaluation and saving.
      steps_per_second: `steps` over `seconds`.
      units_per_second: examples or tokens (the task's `unit`) over `seconds`.
      step_bytes: memory that a step needs on a device besides its arguments, as the compiler plans it; None where this
        call took no step.
      model: with the trained parameters, averaged ones where the run has them.
      directory: of the run.
    """

    history: list[Record]
    metrics: dict[str, dict[str, float]]
    parameters: int
    steps: int
    seconds: float
    steps_per_second: float
    units_per_second: float
    step_bytes: int | None
    model: nnx.Module
    directory: Path


def train(
    model: ModelSource,
    task: Task,
    data: Data,
    config: TrainConfig,
    out_dir: str | Path,
    *,
    experiment: Any = None,
    files: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.RULES,
    trainable: Any = nnx.Param,
    progress: bool = True,
) -> TrainResult:
    """Trains a model, or goes on where an earlier call in the same directory stopped.

    Args:
      model: called as `model(dtype=, rngs=)`, it builds the module; inside jit, so that each device makes its own part
        alone. A module is trained from the parameters it has, which stay as they are (`TrainResult.model` is another).
      task: the loss and what is reported.
      data: opened dataset.
      config: how to train.
      out_dir: of the run.
      experiment: further settings that make the run what it is, such as those of the model and the data: a dataclass or
        a mapping. They are kept in `config.json` and compared when the run is resumed.
      files: by name, what else is written into the directory as JSON, together with `config.json`: when nothing was
        refused.
      mesh: devices, made by `config.mesh` when None. With several processes, `jax.distributed.initialize` comes first,
        and all of them make the same call and see the same `out_dir`.
      rules: mesh axes by the logical axis names of parameters.
      trainable: a filter of nnx for the parameters that are trained, such as `adapter_parameters("name")` of
        `attnlab.nn.lora`; all others stay as they are, and have no gradient and no optimizer state.
      progress: whether to show progress on standard error.

    Returns:
      The result, once all steps are done.

    Raises:
      TrainingInterrupted: after SIGTERM or Ctrl-C, when the current step is done and saved. Uncaught, it ends the
        program with the exit status 143 or 130.
      NonFiniteError: at an infinite or NaN loss, gradient or parameter; nothing of it is saved.
      ConfigMismatch: if `out_dir` holds a run with other settings.
      CheckpointMismatch: if its checkpoint is of another model.
      CheckpointError: if none of its checkpoints can be read.
      ValueError: for settings that fit neither the data nor the devices, or if nothing is trainable.
    """
    mesh = sharding.mesh_from(config.mesh) if mesh is None else mesh
    axes = partition.mesh_axes(batch=sharding.BATCH_AXES, heads=rules.get("heads") or ())
    with jax.set_mesh(mesh), axes, StopRequests() as stop, contextlib.ExitStack() as stack:
        run = _Run(
            model, task, data, config, Path(out_dir), experiment, files or {}, mesh, rules, trainable, progress, stack
        )
        run.train(stop)
        return run.result()


def load_model(
    model: ModelSource,
    directory: str | Path,
    *,
    step: int | Literal["newest", "best"] = "newest",
    ema: bool | None = None,
    trainable: Any = nnx.Param,
) -> nnx.Module:
    """The model of a run with the parameters of a checkpoint, on one device.

    Args:
      model: as in `train`.
      directory: of the run.
      step: number of steps, or which one.
      ema: averaged parameters or not; where the run has them, when None.
      trainable: as in `train`.

    Raises:
      FileNotFoundError: if the directory has no such checkpoint.
      ValueError: if `ema` is asked of a run without averages.
      CheckpointMismatch: if the checkpoint is of another model.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} holds no run: it has no config.json")
    settings = read_settings(directory / "config.json")["train"]
    if ema and settings["ema"] is None:
        raise ValueError(f"{directory} was trained without ema")
    ema = settings["ema"] is not None if ema is None else ema
    graphdef, params, other = _split(model, settings["dtype"], settings["seed"], trainable)
    parts = {"params": params, "other": other}
    trees = {"model": parts, "ema": {"params": params}} if ema else {"model": parts}
    device = SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), trees)
    checkpoints = Checkpoints(directory / "checkpoints", tuple(trees))
    try:
        steps = checkpoints.steps()
        found = {"newest": steps[-1] if steps else None, "best": checkpoints.best_step()}.get(step, step)
        if found not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(f"{directory} has no checkpoint {step!r}; its steps are: {known}")
        trees, _ = checkpoints.restore(found, abstract)
    finally:
        checkpoints.close()
    return nnx.merge(graphdef, trees["ema" if ema else "model"]["params"], trees["model"]["other"])


class _Run:
    """One call of `train`: what it holds, and the loop over steps. What must be closed is left to `stack`."""

    def __init__(
        self,
        model: ModelSource,
        task: Task,
        data: Data,
        config: TrainConfig,
        directory: Path,
        experiment: Any,
        files: Mapping[str, Any],
        mesh: Mesh,
        rules: sharding.Rules,
        trainable: Any,
        progress: bool,
        stack: contextlib.ExitStack,
    ):
        sharding.check_batch_size("a micro-batch", config.batch_size // config.accumulate, mesh)
        self.eval_batch_size = config.batch_size if config.eval_batch_size is None else config.eval_batch_size
        sharding.check_batch_size("an evaluation batch", self.eval_batch_size, mesh)
        self.task, self.data, self.config, self.directory, self.mesh = task, data, config, directory, mesh
        self.steps = _number_of_steps(config, data, task)
        # Before anything depends on it: a schedule is that of the steps with which the run began.
        asked, began = config.optimizer.decay_steps, _steps_of_schedule(directory)
        decay_steps = asked or began or self.steps
        optimizer_config = dataclasses.replace(config.optimizer, decay_steps=decay_steps)
        config = self.config = dataclasses.replace(config, optimizer=optimizer_config)
        self.first = jax.process_index() == 0
        self.schedule = make_schedule(config.optimizer, self.steps)
        optimizer = make_optimizer(config.optimizer, self.steps)

        self.graphdef, params, other = _split(model, config.dtype, config.seed, trainable)
        if not jax.tree.leaves(params):
            raise ValueError(f"trainable chooses none of the model's parameters, got {trainable}")

        def init(params: nnx.State, other: nnx.State) -> TrainState:
            return init_state(params, other, optimizer, with_ema=config.ema is not None)

        abstract = jax.eval_shape(init, params, other)
        self.parameters = count_parameters(abstract.params)
        self.shardings = sharding.shardings(abstract, mesh, rules)
        self.abstract = sharding.with_shardings(abstract, self.shardings)
        whole = NamedSharding(mesh, P())
        train_step = make_train_step(
            self.graphdef,
            task,
            optimizer,
            accumulate=config.accumulate,
            ema_decay=config.ema,
            trainable=trainable,
        )
        self.train_step = jax.jit(train_step, donate_argnums=0, out_shardings=(self.shardings, whole))
        self.eval_step = jax.jit(make_eval_step(self.graphdef, task), out_shardings=whole)
        self.all_finite = compiled_for_once(all_finite, out_shardings=whole)

        directory.mkdir(parents=True, exist_ok=True)
        items = ("model", "optimizer") + (("ema",) if config.ema is not None else ())
        self.checkpoints = Checkpoints(directory / "checkpoints", items, keep=config.keep, best_mode=task.best_mode)
        stack.callback(self.checkpoints.close)
        settings = settings_as_dict(config, task, experiment)
        changes = self._changed_settings(settings)
        self.batches = data.train(config.batch_size, config.seed, **task.data_options())
        stack.callback(_close, self.batches)
        found = self.checkpoints.restore_newest(checkpoint_trees(self.abstract))
        if found is None:
            self.step, seconds = 0, 0.0
            if isinstance(model, nnx.Module):
                # Its arrays may be on one device, as `load_model` leaves them.
                parts = jax.device_put((params, other), (self.shardings.params, self.shardings.other))
                self.state = compiled_for_once(init, out_shardings=self.shardings)(*parts)
            else:
                build = lambda: init(*_build(model, config.dtype, config.seed, trainable)[1:])  # noqa: E731
                self.state = compiled_for_once(build, out_shardings=self.shardings)()
        else:
            self.step, trees, saved = found
            self.state, seconds = _state(trees), saved["seconds"]
            self.batches.set_state(saved["data"])
        self.saved_step = self.step if found else None
        if self.first:
            for name, value in {"config.json": settings, **files}.items():
                write_json(self.directory / name, value)
        self.step_bytes: int | None = None
        self.watch = Stopwatch(seconds)
        self.seconds_before = seconds
        self.pending: collections.deque[tuple[int, Sums]] = collections.deque()
        self.log = MetricsLog(directory, self.step, tensorboard=config.tensorboard, write=self.first)
        stack.callback(self.log.close)
        units = config.batch_size * task.units_per_example()
        self.progress = ProgressLine(self.steps, self.step, units, task.unit, show=progress and self.first)
        stack.callback(self.progress.close)
        if asked is None and decay_steps < self.steps and config.optimizer.schedule != "constant":
            warnings.warn(
                f"the {config.optimizer.schedule} schedule of this run comes down over {decay_steps} steps: from there "
                f"to step {self.steps} the learning rate is {float(self.schedule(self.steps - 1)):.3g}. "
                f"optimizer.decay_steps={self.steps} stretches it over all steps",
                stacklevel=3,
            )
        if changes:
            self.progress.say(f"settings that changed: {'; '.join(changes)}")
        if found:
            self.progress.say(f"going on from step {self.step} of {self.steps} in {directory}")

    def train(self, stop: StopRequests) -> None:
        """All steps that are left."""
        compiled = None
        if _due(self.step, self.config.eval_every) and self.step and self.log.last("eval", self.step) is None:
            self._evaluate(stop)  # in which the run was stopped
        while self.step < self.steps and not self._should_stop(stop, self.step):
            batch = sharding.put_batch(self._next_batch(), self.mesh)
            if compiled is None:
                compiled = self.train_step.lower(self.state, batch).compile()
                plan = compiled.memory_analysis()
                self.step_bytes = None if plan is None else plan.temp_size_in_bytes
            self.watch.start()
            self.state, sums = compiled(self.state, batch)
            self.step += 1
            self.pending.append((self.step, sums))
            self._look_at_losses(all_but=LAG)
            at_end, score = self.step == self.steps, None
            if at_end or _due(self.step, self.config.eval_every):
                score = self._evaluate(stop)
            if at_end or _due(self.step, self.config.checkpoint_every):
                self._save(score)
        evaluated = self.step == self.steps and self.log.last("eval", self.step) is not None
        if self.step == self.steps and not evaluated and stop.received is None:
            evaluated = self._evaluate(stop) is not None
        if not evaluated:
            self._save(None)
            self.checkpoints.wait()
            self.progress.say(f"stopped by {stop.received.name}: step {self.step} of {self.steps} is saved in "
                              f"{self.directory}; the same call goes on from there")  # fmt: skip
            raise TrainingInterrupted(stop.received, self.step)
        self.checkpoints.wait()

    def result(self) -> TrainResult:
        """The result of a run whose steps are all done."""
        splits = ("eval", "eval_ema") if self.config.ema is not None else ("eval",)
        pace = self.step / self.watch.seconds if self.watch.seconds else math.nan
        params = self.state.params if self.state.ema is None else self.state.ema
        return TrainResult(
            history=self.log.history,
            metrics={split: self.log.last(split, self.step) for split in splits},
            parameters=self.parameters,
            steps=self.step,
            seconds=self.watch.seconds,
            steps_per_second=pace,
            units_per_second=pace * self.config.batch_size * self.task.units_per_example(),
            step_bytes=self.step_bytes,
            model=nnx.merge(self.graphdef, params, self.state.other),
            directory=self.directory,
        )

    def _changed_settings(self, settings: Mapping[str, Any]) -> list[str]:
        """What differs from the settings of the checkpoints, in words; refuses what must not differ."""
        path = self.directory / "config.json"
        if not self.checkpoints.steps():
            return []
        if path.exists():
            return check_same_settings(path, settings)
        warnings.warn(f"{path} is missing: cannot tell whether the checkpoints are of this run", stacklevel=4)
        return []

    def _next_batch(self) -> Mapping[str, np.ndarray]:
        batch = next(self.batches)
        if missing := [name for name in self.task.arrays if name not in batch]:
            raise ValueError(
                f"{type(self.task).__name__} needs batches with {', '.join(self.task.arrays)}: "
                f"{', '.join(missing)} is missing among {', '.join(batch)}"
            )
        return batch

    def _should_stop(self, stop: StopRequests, count: int) -> bool:
        """Whether to stop, asked before each step and each batch of an evaluation, of which there were `count`."""
        if jax.process_count() == 1:
            return stop.received is not None
        if count % self.config.log_every:
            return False
        from jax.experimental import multihost_utils

        # Processes must stop at the same step, and a signal may reach one of them alone.
        received = int(multihost_utils.process_allgather(np.int32(stop.received or 0)).max())
        stop.received = signal.Signals(received) if received else None
        return received != 0

    def _look_at_losses(self, all_but: int = 0) -> None:
        """Fetches the sums of steps done, checks and logs them."""
        while len(self.pending) > all_but:
            step, sums = self.pending.popleft()
            sums = {name: float(value) for name, value in jax.device_get(sums).items()}
            if not all(map(math.isfinite, sums.values())):
                values = self.task.metrics(sums)
                self._stop_at_non_finite(
                    f"step {step}: the loss is {values['loss']}, the norm of the gradient {sums['grad_norm']}"
                )
            values = self.task.metrics(sums) | {"grad_norm": sums["grad_norm"]}
            if "aux_loss" in sums:
                values["aux_loss"] = sums["aux_loss"] / (sums["weight"] or 1.0)
            seconds = self.watch.read()
            if step % self.config.log_every == 0:
                values["learning_rate"] = float(self.schedule(step - 1))
                self.log.write(step, "train", values, seconds)
            self.progress.update(step, values["loss"], seconds - self.seconds_before)

    def _stop_at_non_finite(self, what: str) -> None:
        kept = "no checkpoint had been saved" if self.saved_step is None else (
            f"the last good checkpoint is that of step {self.saved_step} in {self.checkpoints.directory}"
        )  # fmt: skip
        raise NonFiniteError(f"{what}. Training stopped; {kept}")

    def _evaluate(self, stop: StopRequests) -> float | None:
        """Logs the metrics of the evaluation split; returns the one that chooses the best checkpoint.

        With averaged parameters it is theirs. None, and nothing is logged, if it was stopped between two batches.
        """
        self._look_at_losses()
        self.watch.stop()
        splits = {"eval": self.state.params}
        if self.state.ema is not None:
            splits["eval_ema"] = self.state.ema
        totals: dict[str, Sums] = {}
        batches = self.data.eval(self.eval_batch_size, **self.task.data_options())
        for count, batch in enumerate(batches):
            if self._should_stop(stop, count):
                _close(batches)
                return None
            batch = sharding.put_batch(batch, self.mesh)
            for split, params in splits.items():
                sums = self.eval_step(params, self.state.other, batch)
                totals[split] = jax.tree.map(jnp.add, totals[split], sums) if split in totals else sums
        _close(batches)
        if not totals:
            raise ValueError("the evaluation split holds no examples")
        for split, sums in totals.items():
            values = self.task.metrics({name: float(value) for name, value in jax.device_get(sums).items()})
            self.log.write(self.step, split, values, self.watch.seconds)
            words = " · ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.progress.say(f"step {self.step} · {split}: {words}")
        return values[self.task.best]

    def _save(self, score: float | None) -> None:
        """Saves the state unless it is saved already; a state that is not finite raises instead."""
        self._look_at_losses()
        self.watch.stop()
        if self.step == self.saved_step:
            return
        if not self.all_finite(self.state):
            self._stop_at_non_finite(f"step {self.step}: parameters or optimizer state are not finite after the update")
        progress = {"seconds": self.watch.seconds, "data": self.batches.get_state()}
        if score is not None and not math.isfinite(score):
            score = None
        self.checkpoints.save(self.step, checkpoint_trees(self.state), progress, score=score)
        self.saved_step = self.step


def _build(model: ModelSource, dtype: str, seed: int, trainable: Any) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    module = model if isinstance(model, nnx.Module) else model(dtype=DTYPES[dtype], rngs=nnx.Rngs(seed))
    return nnx.split(module, trainable, ...)


def _split(model: ModelSource, dtype: str, seed: int, trainable: Any) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Graph, what is trained and other state; the states of a module that is still to be built are abstract."""
    if isinstance(model, nnx.Module):
        if dtype != "float32":
            raise ValueError(
                f"dtype={dtype!r} needs a function that builds the model; a module computes as it was built"
            )
        return _build(model, dtype, seed, trainable)
    return nnx.split(nnx.eval_shape(lambda: model(dtype=DTYPES[dtype], rngs=nnx.Rngs(seed))), trainable, ...)


def _steps_of_schedule(directory: Path) -> int | None:
    """The steps of the schedule with which the run in a directory began; None where there is none to go on with."""
    path = directory / "config.json"
    if not path.exists() or not any(entry.name.isdigit() for entry in (directory / "checkpoints").glob("*")):
        return None
    return read_settings(path)["train"].get("optimizer", {}).get("decay_steps")


def _number_of_steps(config: TrainConfig, data: Data, task: Task) -> int:
    if config.steps is not None:
        return config.steps
    return math.ceil(config.epochs * data.num_examples("train", **task.data_options()) / config.batch_size)


def _close(batches: Any) -> None:
    """Ends the threads of an iterator that has any."""
    if hasattr(batches, "close"):
        batches.close()


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is there as a whole or not at all."""
    new = path.with_suffix(".json.new")
    new.write_text(json.dumps(value, indent=2) + "\n")
    new.replace(path)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def checkpoint_trees(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint."""
    trees = {
        "model": {"params": state.params, "other": state.other},
        "optimizer": {"state": state.optimizer, "step": state.step},
    }
    return trees if state.ema is None else trees | {"ema": {"params": state.ema}}


def _state(trees: Mapping[str, Any]) -> TrainState:
    model, optimizer = trees["model"], trees["optimizer"]
    ema = trees["ema"]["params"] if "ema" in trees else None
    return TrainState(optimizer["step"], model["params"], model["other"], optimizer["state"], ema)
