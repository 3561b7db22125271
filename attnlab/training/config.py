"""The settings of a training run, and how those of two runs are compared."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from attnlab.training.optimizer import OptimizerConfig
from attnlab.training.sharding import MeshConfig

Dtype = Literal["float32", "bfloat16"]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# They change how far, how often, where and how visibly, but not which numbers a step computes.
FREE_SETTINGS = (
    "train.steps", "train.epochs", "train.eval_every", "train.checkpoint_every", "train.keep", "train.log_every",
    "train.tensorboard", "train.eval_batch_size", "train.mesh.data", "train.mesh.fsdp", "train.mesh.tensor",
    # The data itself is told by its digest, which the checkpoints hold.
    "experiment.data.path", "experiment.data.eval_path", "experiment.data.on_broken",
)  # fmt: skip
# They change the numbers of the steps to come, and may: whoever gives them wants that.
STEERING_SETTINGS = ("train.optimizer.decay_steps",)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; what and on what are the other arguments of `train`.

    Attributes:
      steps: optimizer steps in all, or None where `epochs` says it. A run that goes on with more of them keeps the
        schedule that it began with, see `OptimizerConfig.decay_steps`.
      epochs: passes over the training data, rounded up to whole steps; only with `steps=None`.
      batch_size: examples in an optimizer step, over all devices and processes.
      accumulate: micro-batches into which a batch is cut to save memory. The gradient is that of the whole batch, up to
        rounding; only the statistics of batch norms and the draws of dropout are per micro-batch.
      eval_batch_size: examples in a step of evaluation, `batch_size` when None.
      eval_every: steps between evaluations, None for one at the end alone.
      checkpoint_every: steps between checkpoints, None for one at the end alone.
      keep: newest checkpoints that are kept, besides the best.
      log_every: steps between lines of training metrics; several processes also agree then whether to stop.
      seed: of parameters, dropout and the order of the data.
      dtype: of the computation; parameters and optimizer are in float32.
      ema: decay of the exponential moving average of the parameters, evaluated next to them; None for none. Step t
        uses at most (1 + t) / (10 + t), so that the average forgets the initial values.
      tensorboard: whether to write TensorBoard's files too.
      optimizer: which, and with what schedule.
      mesh: how devices are shared out.

    Raises:
      ValueError: for a value out of range, or one that contradicts another.
    """

    steps: int | None = 1000
    epochs: float | None = None
    batch_size: int = 128
    accumulate: int = 1
    eval_batch_size: int | None = None
    eval_every: int | None = None
    checkpoint_every: int | None = 1000
    keep: int = 2
    log_every: int = 10
    seed: int = 0
    dtype: Dtype = "float32"
    ema: float | None = None
    tensorboard: bool = True
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"exactly one of steps and epochs is given, got steps={self.steps}, epochs={self.epochs}")
        for field in ("steps", "epochs", "batch_size", "accumulate", "eval_batch_size", "eval_every",
                      "checkpoint_every", "keep", "log_every"):  # fmt: skip
            value = getattr(self, field)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field} must be more than 0, not {value}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in 0..2**32 - 1, not {self.seed}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must lie between 0 and 1, both excluded, not {self.ema}")


class ConfigMismatch(ValueError):
    """A directory holds checkpoints of a run with other settings."""


def settings_as_dict(config: TrainConfig, task: Any, experiment: Any = None) -> dict[str, Any]:
    """All settings of a run as JSON has them: the training, the task, and what the caller adds."""
    settings = {
        "train": _plain(config),
        "task": {"name": type(task).__name__, **(_plain(task) if dataclasses.is_dataclass(task) else {})},
        "experiment": _plain(experiment),
    }
    return json.loads(json.dumps(settings))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a file.

    Raises:
      ValueError: if it holds no settings, naming it.
    """
    try:
        settings = json.loads(path.read_text())
        if not isinstance(settings, dict) or "train" not in settings:
            raise ValueError("no settings of a training")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): its settings cannot be read. Restore it, or move it away"
        ) from error
    return settings


def check_same_settings(path: Path, now: Mapping[str, Any]) -> list[str]:
    """Compares the settings in `path` with those of this run.

    Returns:
      The free settings that changed, in words.

    Raises:
      ConfigMismatch: if others differ, naming each with both values.
      ValueError: if the file is damaged, naming it.
    """
    then, now = _flatten(read_settings(path)), _flatten(now)
    absent = "(absent)"
    changed = {
        key: f"{key} was {then.get(key, absent)!r} and is now {now.get(key, absent)!r}"
        for key in {**then, **now}
        if then.get(key, absent) != now.get(key, absent)
    }
    fixed = [words for key, words in changed.items() if key not in FREE_SETTINGS + STEERING_SETTINGS]
    if fixed:
        raise ConfigMismatch(
            f"{path.parent} holds checkpoints of a run with other settings: {'; '.join(fixed)}. "
            "Give another directory, or the settings of that run"
        )
    return list(changed.values())


def _plain(value: Any) -> Any:
    """What JSON can hold of nested dataclasses, mappings and sequences; paths, types and the like as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, Mapping):
        return {prefix: settings}
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
