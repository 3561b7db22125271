"""The functional core: the state of a training run, one step of it, and the evaluation of a batch."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from attnlab.nn.aux_loss import total_aux_loss
from attnlab.training.task import Sums, Task
from pallas_kernels.promotion import numpy_rules

Batch = Mapping[str, jax.Array]


class TrainState(NamedTuple):
    """All that changes in training, apart from the position in the data.

    Attributes:
      step: int32 scalar, optimizer steps done.
      params: what is trained: the `nnx.Param`s of the model, or those that were chosen.
      other: the rest of its state, such as statistics of batch norms and counters of dropout.
      optimizer: of optax.
      ema: moving average of `params`, or None.
    """

    step: jax.Array
    params: nnx.State
    other: nnx.State
    optimizer: optax.OptState
    ema: nnx.State | None


def init_state(
    params: nnx.State, other: nnx.State, optimizer: optax.GradientTransformation, *, with_ema: bool
) -> TrainState:
    """The state before the first step. The arrays are copies: a step may donate them."""
    params, other = jax.tree.map(jnp.copy, (params, other))
    ema = jax.tree.map(jnp.copy, params) if with_ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, other, optimizer.init(params), ema)


def make_train_step(
    graphdef: nnx.GraphDef,
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    ema_decay: float | None = None,
    trainable: Any = nnx.Param,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """A pure function from a state and a batch to the next state and the sums of the task.

    `trainable` is the filter by which the model's state was split into `params` and `other`.

    The sums have two more entries: `grad_norm`, the global norm of the gradient before clipping, and, for a model with
    auxiliary losses, `aux_loss`, which like "loss" is to be divided by the weight.
    """

    def loss_sum(params: nnx.State, other: nnx.State, batch: Batch) -> tuple[jax.Array, tuple[Sums, nnx.State]]:
        model = nnx.merge(graphdef, params, other, copy=True)
        sums = task.sums(model, batch, deterministic=False)
        objective = sums["loss"]
        if (aux := total_aux_loss(model)) is not None:
            sums = sums | {"aux_loss": aux * sums["weight"]}
            objective = objective + sums["aux_loss"]
        return objective, (sums, nnx.state(model, nnx.Not(trainable)))

    def gradient(params: nnx.State, other: nnx.State, batch: Batch) -> tuple[nnx.State, Sums, nnx.State]:
        grads, (sums, other) = jax.grad(loss_sum, has_aux=True)(params, other, batch)
        return grads, sums, other

    def accumulated(params: nnx.State, other: nnx.State, batch: Batch) -> tuple[nnx.State, Sums, nnx.State]:
        # Micro-batch i has the rows i, i + accumulate, ...: every device keeps its own rows.
        micro = jax.tree.map(lambda a: a.reshape(-1, accumulate, *a.shape[1:]).swapaxes(0, 1), dict(batch))
        shapes = jax.eval_shape(gradient, params, other, jax.tree.map(lambda a: a[0], micro))
        grads, sums, _ = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (*shapes[:2], None))

        def add(carry: Any, rows: Batch) -> tuple[Any, None]:
            grads, sums, other = carry
            new_grads, new_sums, other = gradient(params, other, rows)
            return (*jax.tree.map(jnp.add, (grads, sums), (new_grads, new_sums)), other), None

        return jax.lax.scan(add, (grads, sums, other), micro)[0]

    @numpy_rules()
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        grads, sums, other = (gradient if accumulate == 1 else accumulated)(state.params, state.other, batch)
        # A batch without any weight has a zero gradient, not 0/0.
        total = jnp.where(sums["weight"] > 0, sums["weight"], 1.0)
        grads = jax.tree.map(lambda g: g / total.astype(g.dtype), grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda old, new: new + (old - new) * decay.astype(new.dtype), ema, params)
        state = TrainState(state.step + 1, params, other, optimizer_state, ema)
        return state, sums | {"grad_norm": optax.tree.norm(grads)}

    return train_step


def make_eval_step(graphdef: nnx.GraphDef, task: Task) -> Callable[[nnx.State, nnx.State, Batch], Sums]:
    """A pure function from parameters, other state and a batch to the sums of the task."""

    @numpy_rules()
    def eval_step(params: nnx.State, other: nnx.State, batch: Batch) -> Sums:
        model = nnx.merge(graphdef, params, other, copy=True)
        return task.sums(model, batch, deterministic=True)

    return eval_step


def all_finite(tree: Any) -> jax.Array:
    """Whether no floating-point array of a tree holds an infinity or a NaN; a boolean scalar."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def count_parameters(params: nnx.State) -> int:
    """Number of trained scalars."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
