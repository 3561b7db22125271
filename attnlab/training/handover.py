"""A run that holds a model which was made elsewhere, as if it had been trained there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.training.checkpoint import Checkpoints
from attnlab.training.config import TrainConfig, settings_as_dict
from attnlab.training.loop import Data, checkpoint_trees, write_json
from attnlab.training.metrics import MetricsLog
from attnlab.training.optimizer import make_optimizer
from attnlab.training.state import init_state
from attnlab.training.task import Task


def save_as_run(
    model: nnx.Module,
    task: Task,
    data: Data,
    config: TrainConfig,
    out_dir: str | Path,
    *,
    experiment: Any = None,
    files: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Writes a run of `config.steps` steps that ends with this model.

    `load_model` loads it, and `train` with more steps goes on from it, with an optimizer that begins anew and from the
    first example of the data.

    Args:
      model: with the parameters to save.
      task: of the run.
      data: opened dataset.
      config: of the run; without `ema`, with `steps`.
      out_dir: of the run; it may not hold one yet.
      experiment: further settings of the run, as `train` takes them.
      files: what else is written beside `config.json`, as `train` takes it.
      metrics: of the model's evaluation.

    Raises:
      ValueError: for a run with averages, or without `steps`.
      FileExistsError: if the directory holds checkpoints.
    """
    if config.steps is None or config.ema is not None:
        raise ValueError(f"a run is written for given steps and without ema, got {config.steps} and {config.ema}")
    directory = Path(out_dir)
    _, params, other = nnx.split(model, nnx.Param, ...)
    state = init_state(params, other, make_optimizer(config.optimizer, config.steps), with_ema=False)
    state = state._replace(step=jnp.asarray(config.steps, jnp.int32))
    batches = data.train(config.batch_size, config.seed, **task.data_options())
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(directory / "checkpoints", ("model", "optimizer"))
    try:
        if checkpoints.steps():
            raise FileExistsError(f"{directory} holds checkpoints; give another directory")
        for name, value in {"config.json": settings_as_dict(config, task, experiment), **(files or {})}.items():
            write_json(directory / name, value)
        progress = {"seconds": 0.0, "data": batches.get_state()}
        checkpoints.save(config.steps, checkpoint_trees(state), progress)
    finally:
        checkpoints.close()
        if hasattr(batches, "close"):
            batches.close()
    log = MetricsLog(directory, config.steps, tensorboard=False, write=True)
    if metrics is not None:
        log.write(config.steps, "eval", metrics, 0.0)
    log.close()
