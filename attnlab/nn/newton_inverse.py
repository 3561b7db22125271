"""Inverses of positive matrices by Newton's (Schulz') iteration X ← 2X − XPX, and two rules for their gradients.

Matrix products alone, at the highest precision and in float32 or wider, whatever the dtype of the matrices. The error
‖PX − I‖ is squared by each iteration once it is below 1. From the code of SOFT (fudan-zvg/SOFT; Lu et al., IJCV 2024,
arXiv:2207.03341). `cubic_newton_inverse` is another iteration, for matrices whose rows sum to 1.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.dtypes import at_least_float32

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
_HALVINGS, _LARGEST = 10, 1.01


def newton_inverse(
    matrix: ArrayLike,
    *,
    iterations: int = 20,
    ridge: float = 0.01,
    start: float = 0.9,
    gradient: Literal["analytic", "unrolled"] = "analytic",
) -> jax.Array:
    """About (K + ridge I)^-1, from X₀ = 2 start (K + ridge I) / (largest row sum of K)².

    Args:
      matrix: K, symmetric with entries at least 0, `(…, m, m)`.
      iterations: of Newton's rule.
      ridge: added to the diagonal.
      start: factor of the first value, below 1 for safety.
      gradient: "analytic" is that of an inverse, -Xᵀ G Xᵀ, with the approximate X and without ridge and iterations; or
        "unrolled", through the iterations.

    Returns:
      `(…, m, m)` in float32, or the dtype of `matrix` if that is wider.

    Raises:
      ValueError: for a matrix that is not square, or another gradient.
    """
    matrix = _square(matrix)
    if gradient not in ("analytic", "unrolled"):
        raise ValueError(f"gradient must be 'analytic' or 'unrolled', got {gradient!r}")
    rule = _analytic if gradient == "analytic" else _newton
    return rule(matrix, iterations, ridge, start)


def _newton(matrix: jax.Array, iterations: int, ridge: float, start: float) -> jax.Array:
    largest = matrix.sum(-1).max(-1)[..., None, None]
    shifted = matrix + ridge * jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    return _iterate(shifted, 2 * start / jnp.square(largest) * shifted, iterations)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _analytic(matrix: jax.Array, iterations: int, ridge: float, start: float) -> jax.Array:
    return _newton(matrix, iterations, ridge, start)


def _analytic_forward(matrix, iterations, ridge, start):
    inverse = _newton(matrix, iterations, ridge, start)
    return inverse, inverse


def _analytic_backward(iterations, ridge, start, inverse, cotangent):
    transposed = inverse.swapaxes(-1, -2)
    return (-_matmul(transposed, _matmul(cotangent, transposed)),)


_analytic.defvjp(_analytic_forward, _analytic_backward)


def symmetric_newton_inverse(matrix: ArrayLike, *, iterations: int = 20, shared_start: bool = False) -> jax.Array:
    """About K^-1, from X₀ = α K with α = 2 / (largest row sum)², halved until ‖I − K X₀‖₁ ≤ 1.01, at most ten times.

    Gradients go through the iterations and α.

    Args:
      matrix: K, symmetric with entries at least 0, `(…, m, m)`.
      iterations: of Newton's rule.
      shared_start: whether row sum and norm are the largest of all matrices together, as in the authors' code: an
        example then depends on the others of its batch, and a head on the other heads. Else each matrix has its own.

    Returns:
      `(…, m, m)` in float32, or the dtype of `matrix` if that is wider.

    Raises:
      ValueError: for a matrix that is not square.
    """
    matrix = _square(matrix)
    rows, axes = matrix.sum(-1), None if shared_start else (-1,)
    alpha = 2 / jnp.square(jnp.max(rows, axis=axes, keepdims=True))[..., None]
    squared, first = (jax.lax.stop_gradient(a) for a in (_matmul(matrix, matrix), alpha))
    eye, going = jnp.eye(matrix.shape[-1], dtype=matrix.dtype), jnp.ones((), bool)
    halvings = jnp.zeros((), matrix.dtype)
    for step in range(_HALVINGS):
        columns = jnp.abs(eye - first * 0.5**step * squared).sum(-2, keepdims=True)
        norm = columns.max() if shared_start else columns.max(-1, keepdims=True)
        going = going & (norm > _LARGEST)
        halvings = halvings + going.astype(matrix.dtype)
    return _iterate(matrix, alpha * 0.5**halvings * matrix, iterations)


def cubic_newton_inverse(matrix: ArrayLike, *, iterations: int = 6, shared_start: bool = False) -> jax.Array:
    """About the inverse of a matrix whose rows sum to 1, by Z ← ¼ Z (13 I - P (15 I - P (7 I - P))), P = K Z.

    An iteration of the third order from Z₀ = Kᵀ / (largest column sum), after Razavi et al. (2014), as Nyströmformer
    (Xiong et al., AAAI 2021, arXiv:2102.03902) has it. Gradients go through the iterations and the first value.

    Args:
      matrix: K, entries at least 0, `(…, m, m)`.
      iterations: of the rule.
      shared_start: whether the column sum is the largest of all matrices together, as in the authors' code: an example
        then depends on the others of its batch, and a head on the other heads. Else each matrix has its own.

    Returns:
      `(…, m, m)` in float32, or the dtype of `matrix` if that is wider.

    Raises:
      ValueError: for a matrix that is not square.
    """
    matrix = _square(matrix)
    columns = matrix.sum(-2)
    largest = jnp.max(columns, axis=None if shared_start else -1, keepdims=True)[..., None]
    eye = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)

    def step(z: jax.Array, _: None) -> tuple[jax.Array, None]:
        product = _matmul(matrix, z)
        inner = 15 * eye - _matmul(product, 7 * eye - product)
        return 0.25 * _matmul(z, 13 * eye - _matmul(product, inner)), None

    return jax.lax.scan(step, matrix.mT / largest, length=iterations)[0]


def _iterate(matrix: jax.Array, inverse: jax.Array, iterations: int) -> jax.Array:
    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return 2 * x - _matmul(_matmul(x, matrix), x), None

    return jax.lax.scan(step, inverse, length=iterations)[0]


def _square(matrix: ArrayLike) -> jax.Array:
    matrix = jnp.asarray(matrix)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix must be (…, m, m), got {matrix.shape}")
    return matrix.astype(at_least_float32(matrix.dtype))
