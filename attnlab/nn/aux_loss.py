"""Losses that modules add to the task's: balance of experts, sparsity of a gate and the like.

A module holds an `AuxLoss` and writes to it in training; whoever trains the model adds the sum of all of them to the
loss of the task, as a mean over examples, with the factor that the module has put on it:

    self.balance = AuxLoss(jnp.zeros((), jnp.float32))                 # in the constructor
    if not deterministic:
        self.balance[...] = self.balance_factor * balance_loss(gates)  # in the call

It is part of the model's state, like the statistics of a batch norm, so it needs no capture and passes through
rematerialisation, scans and jit. The value stands until the next call in training; it is never a parameter.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class AuxLoss(nnx.Variable):
    """A scalar loss in float32 that a module wrote in its last call in training."""


def total_aux_loss(model: nnx.Module) -> jax.Array | None:
    """Sum of all auxiliary losses in a model, a float32 scalar; None if it has none."""
    losses = jax.tree.leaves(nnx.state(model, AuxLoss))
    return sum(jnp.sum(loss, dtype=jnp.float32) for loss in losses) if losses else None
