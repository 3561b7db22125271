"""Perturbations that raise a loss most, for adversarial training: one step along the gradient, then held fixed.

    "l2"     δ + ε g / ‖g‖₂    per example (Miyato et al., 2017, arXiv:1605.07725)
    "sign"   δ + ε sign(g)     (Goodfellow et al., 2015, arXiv:1412.6572), from a random δ as in fast adversarial
                               training (Wong et al., 2020, arXiv:2001.03994)

with g the gradient of the loss at δ. What comes out is a constant: a second pass, with it added, gives the term that is
trained on.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.dtypes import at_least_float32


def adversarial_step(
    loss: Callable[[jax.Array], jax.Array],
    start: ArrayLike,
    *,
    size: float,
    norm: Literal["l2", "sign"] = "l2",
    bound: float | None = None,
    where: ArrayLike | None = None,
    eps: float = 1e-12,
) -> jax.Array:
    """A perturbation after one step.

    Args:
      loss: of a perturbation of the shape of `start`, a scalar or one number per example, which are added up.
      start: δ (B, …).
      size: ε; a negative one lowers the loss.
      norm: "l2" or "sign".
      bound: of the absolute value of each entry of the result; none when None.
      where: boolean, broadcastable to δ: what may be perturbed; elsewhere the result is 0. All when None.
      eps: least norm that divides.

    Returns:
      Of the shape and dtype of `start`, without gradient.

    Raises:
      ValueError: for another norm, or a bound that is not positive.
    """
    if norm not in ("l2", "sign"):
        raise ValueError(f"norm must be 'l2' or 'sign', got {norm!r}")
    if bound is not None and bound <= 0:
        raise ValueError(f"bound must be positive, got {bound}")
    start = jax.lax.stop_gradient(jnp.asarray(start))
    gradient = jax.grad(lambda delta: jnp.sum(loss(delta)))(start)
    wide = gradient.astype(at_least_float32(gradient.dtype))
    wide = wide if where is None else jnp.where(jnp.asarray(where), wide, 0)
    if norm == "sign":
        direction = jnp.sign(wide)
    else:
        length = jnp.sqrt(jnp.square(wide).sum(tuple(range(1, wide.ndim)), keepdims=True))
        direction = wide / jnp.maximum(length, eps)
    moved = start.astype(wide.dtype) + size * direction
    moved = moved if bound is None else jnp.clip(moved, -bound, bound)
    moved = moved if where is None else jnp.where(jnp.asarray(where), moved, 0)
    return jax.lax.stop_gradient(moved.astype(start.dtype))
