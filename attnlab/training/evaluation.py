"""What a model reaches on the evaluation split, outside of a training run."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.training.loop import Data
from attnlab.training.state import make_eval_step
from attnlab.training.task import Sums, Task

ModelT = TypeVar("ModelT", bound=nnx.Module)


def on_one_device(model: ModelT) -> ModelT:
    """The same model with all of its arrays on the first device of this process."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.device_put(state, jax.local_devices()[0]))


def evaluate(model: nnx.Module, task: Task, data: Data, batch_size: int) -> dict[str, float]:
    """The metrics of the task over all examples, on one device.

    Args:
      model: it is not changed.
      task: what is measured.
      data: opened dataset.
      batch_size: examples at a time.

    Raises:
      ValueError: if the evaluation split holds no examples.
    """
    graphdef, params, other = nnx.split(on_one_device(model), nnx.Param, ...)
    step = jax.jit(make_eval_step(graphdef, task))
    total: Sums | None = None
    batches = data.eval(batch_size, **task.data_options())
    try:
        for batch in batches:
            sums = step(params, other, dict(batch))
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    finally:
        if hasattr(batches, "close"):
            batches.close()
    if total is None:
        raise ValueError("the evaluation split holds no examples")
    return task.metrics({name: float(value) for name, value in jax.device_get(total).items()})
