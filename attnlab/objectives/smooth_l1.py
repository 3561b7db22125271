"""Absolute error that is quadratic near zero (Girshick, 2015, arXiv:1504.08083).

e² / 2β where |e| < β,    |e| - β/2 elsewhere        β times this is the Huber loss
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def smooth_l1(
    prediction: ArrayLike, target: ArrayLike, *, beta: float = 1.0, weight: ArrayLike | None = None
) -> jax.Array:
    """The error, averaged over the entries of each example; (B,) float32.

    Args:
      prediction: (B, …).
      target: of the same shape.
      beta: β; 0 for the absolute error.
      weight: of the entries, broadcastable to them; 1 when None. An example whose weights are all 0 gives 0.

    Raises:
      ValueError: for a negative beta, or shapes that do not fit.
    """
    if beta < 0:
        raise ValueError(f"beta must be at least 0, got {beta}")
    if jnp.shape(prediction) != jnp.shape(target):
        raise ValueError(f"prediction and target must have one shape: {jnp.shape(prediction)}, {jnp.shape(target)}")
    error = jnp.abs(jnp.asarray(prediction, jnp.float32) - jnp.asarray(target, jnp.float32))
    if beta > 0:
        error = jnp.where(error < beta, jnp.square(jnp.minimum(error, beta)) / (2 * beta), error - beta / 2)
    entries = tuple(range(1, error.ndim))
    if weight is None:
        return error.mean(entries)
    weight = jnp.broadcast_to(jnp.asarray(weight, jnp.float32), error.shape)
    total = weight.sum(entries)
    return (error * weight).sum(entries) / jnp.where(total == 0, 1, total)
