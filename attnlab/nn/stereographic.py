"""Spaces of constant curvature k in stereographic coordinates: the Poincaré ball (k < 0), the sphere (k > 0), and R^n.

With tan_k(r) = tanh(√-k r) / √-k, r, or tan(√k r) / √k, and arctan_k its inverse:

    exp0(v) = tan_k(|v|) v / |v|                                log0(x) = arctan_k(|x|) x / |x|
    x ⊕ y = ((1 - 2k x·y - k |y|²) x + (1 + k |x|²) y) / (1 - 2k x·y + k² |x|² |y|²)
    d(x, y) = 2 arctan_k(|(-x) ⊕ y|)                            λ_x = 2 / (1 + k |x|²)
    midpoint of weights a: m = Σ a_j λ_j x_j / Σ a_j (λ_j - 1),  result = ½ ⊗ m = tan_k(arctan_k(|m|) / 2) m / |m|

At the origin vectors are as long as their coordinates (exp0 takes |v|, not |v| / 2), as in geoopt (Kochurov et al.,
2020, arXiv:2005.02819), against which it is checked; see Bachmann et al. (2020, arXiv:1911.05076). All is float32 up,
and has finite gradients at the origin, where two points meet, and at the rim of the ball; `inside` keeps points off it.
k is a number or an array that broadcasts against the points without their last axis, of either sign.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.dtypes import at_least_float32

_SERIES = 0.03  # below, in |k| r², the series is closer than the quotient, whose slope cancels
_RIM = 1 - 1e-7
_MARGIN = 4e-3


def _wide(x: ArrayLike) -> jax.Array:
    return jnp.asarray(x, at_least_float32(jnp.result_type(x)))


def _square(x: jax.Array) -> jax.Array:
    return jnp.square(x).sum(-1)


def _root(square: jax.Array) -> jax.Array:
    """√, with slope 0 at 0."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _tan_ratio(u: jax.Array) -> jax.Array:
    """tan_k(r) / r as a function of u = k r²."""
    series = 1 + u * (1 / 3 + u * (2 / 15 + u * (17 / 315 + u * 62 / 2835)))
    s = jnp.sqrt(jnp.maximum(jnp.abs(u), _SERIES))
    return jnp.where(jnp.abs(u) < _SERIES, series, jnp.where(u < 0, jnp.tanh(s), jnp.tan(s)) / s)


def _arctan_ratio(u: jax.Array) -> jax.Array:
    """arctan_k(r) / r as a function of u = k r²."""
    series = 1 - u * (1 / 3 - u * (1 / 5 - u * (1 / 7 - u / 9)))
    s = jnp.sqrt(jnp.maximum(jnp.abs(u), _SERIES))
    far = jnp.where(u < 0, jnp.arctanh(jnp.minimum(s, _RIM)), jnp.arctan(s)) / s
    return jnp.where(jnp.abs(u) < _SERIES, series, far)


def exp0(v: ArrayLike, k: ArrayLike) -> jax.Array:
    """The point that is reached from the origin along v; `(..., D)`."""
    v = _wide(v)
    return v * _tan_ratio(k * _square(v))[..., None]


def log0(x: ArrayLike, k: ArrayLike) -> jax.Array:
    """The vector at the origin that leads to x; the inverse of `exp0` where that has one."""
    x = _wide(x)
    return x * _arctan_ratio(k * _square(x))[..., None]


def inside(x: ArrayLike, k: ArrayLike, *, margin: float = _MARGIN) -> jax.Array:
    """Points of the ball no farther out than (1 - margin) / √-k; others as they are."""
    x = _wide(x)
    share = jnp.sqrt(jnp.maximum(-k * _square(x), 0) + 1e-30) / (1 - margin)
    return x / jnp.maximum(share, 1)[..., None]


def mobius_add(x: ArrayLike, y: ArrayLike, k: ArrayLike) -> jax.Array:
    """x ⊕ y; `(..., D)`, of shapes that broadcast."""
    x, y = _wide(x), _wide(y)
    xy, xx, yy = (x * y).sum(-1), _square(x), _square(y)
    above = (1 - 2 * k * xy - k * yy)[..., None] * x + (1 + k * xx)[..., None] * y
    below = 1 - 2 * k * xy + jnp.square(jnp.asarray(k)) * xx * yy
    return above / jnp.maximum(below, 1e-15)[..., None]


def conformal_factor(x: ArrayLike, k: ArrayLike) -> jax.Array:
    """λ_x, `(...)`."""
    return 2 / jnp.maximum(1 + k * _square(_wide(x)), 1e-15)


def distance0(x: ArrayLike, k: ArrayLike) -> jax.Array:
    """From the origin, `(...)`."""
    square = _square(_wide(x))
    return 2 * _root(square) * _arctan_ratio(k * square)


def distance(x: ArrayLike, y: ArrayLike, k: ArrayLike) -> jax.Array:
    """Between points `(..., D)` of shapes that broadcast, `(...)`."""
    return distance0(mobius_add(-_wide(x), y, k), k)


def distances(x: ArrayLike, y: ArrayLike, k: ArrayLike) -> jax.Array:
    """Between all points `(..., N, D)` and `(..., M, D)`, `(..., N, M)`, from their products alone.

    |(-x) ⊕ y|² = |x - y|² / (1 + 2k x·y + k² |x|² |y|²). In float32 points closer than 1e-3 of their length are not
    told apart. k broadcasts against the result.
    """
    x, y = _wide(x), _wide(y)
    xy = jnp.einsum("...nd,...md->...nm", x, y, precision="highest")
    xx, yy = _square(x)[..., :, None], _square(y)[..., None, :]
    below = 1 + 2 * k * xy + jnp.square(jnp.asarray(k)) * xx * yy
    square = jnp.maximum(xx + yy - 2 * xy, 0) / jnp.maximum(below, 1e-15)
    return 2 * _root(square) * _arctan_ratio(k * square)


def half(m: ArrayLike, k: ArrayLike) -> jax.Array:
    """½ ⊗ m, the point half-way from the origin; by tan(θ/2) = tan θ / (1 + 1 / cos θ)."""
    m = _wide(m)
    return m / (1 + _root(jnp.maximum(1 + k * _square(m), 0)))[..., None]


def scaled(factor: ArrayLike, x: ArrayLike, k: ArrayLike) -> jax.Array:
    """factor ⊗ x: the point `factor` times as far from the origin."""
    return exp0(jnp.asarray(factor)[..., None] * log0(x, k), k)


def weighted_midpoint(
    x: ArrayLike, weights: ArrayLike, k: ArrayLike, *, lincomb: bool = False, margin: float = 0.0
) -> jax.Array:
    """The gyromidpoint of points.

    Args:
      x: points, `(..., M, E)`.
      weights: `(..., N, M)`, at least 0; they need not sum to 1. Rows of zeros give the origin.
      k: curvature; it broadcasts against `(..., M)` and `(..., N)`.
      lincomb: whether the result is scaled by the sum of its weights.
      margin: as in `inside`, of the points.

    Returns:
      `(..., N, E)`.
    """
    x, weights = _wide(x), _wide(weights)
    x = inside(x, k, margin=margin) if margin else x
    factor = conformal_factor(x, k)[..., None]
    above = jnp.matmul(weights, factor * x, precision="highest")
    below = jnp.matmul(weights, factor - 1, precision="highest")
    small = jnp.abs(below) < 1e-10
    middle = half(above / jnp.where(small, jnp.where(below < 0, -1e-10, 1e-10), below), k)
    return scaled(weights.sum(-1), middle, k) if lincomb else middle


def tangent_midpoint(v: ArrayLike, weights: ArrayLike, c: ArrayLike, *, margin: float = _MARGIN) -> jax.Array:
    """log0 of the midpoint of the points exp0(v) in the ball of curvature -c, from the vectors themselves.

    With s = √c |v|, λ x = sinh(2s) v / s and λ - 1 = cosh(2s): nothing is the small rest of a difference, as 1 - c |x|²
    is close to the rim.

    Args:
      v: vectors at the origin, `(..., M, E)`; those that lead beyond the `margin` of `inside` are shortened.
      weights: `(..., N, M)`, at least 0. Rows of zeros give zeros.
      c: above 0; it broadcasts against `(..., M)` and `(..., N)`.
      margin: as in `inside`.

    Returns:
      `(..., N, E)`.
    """
    v, weights = _wide(v), _wide(weights)
    longest = math.atanh(1 - margin)
    u = c * _square(v)
    shorter = longest / jnp.sqrt(jnp.maximum(u, longest**2))
    v, u = v * shorter[..., None], u * jnp.square(shorter)
    near, s = u < _SERIES, jnp.sqrt(jnp.maximum(u, _SERIES))
    w = 4 * u
    sines = jnp.where(near, 2 + w * (1 / 3 + w * (1 / 60 + w * (1 / 2520 + w / 181440))), jnp.sinh(2 * s) / s)
    cosines = jnp.where(near, 1 + w * (1 / 2 + w * (1 / 24 + w * (1 / 720 + w / 40320))), jnp.cosh(2 * s))
    above = jnp.matmul(weights, sines[..., None] * v, precision="highest")
    below = jnp.matmul(weights, cosines[..., None], precision="highest")
    return log0(above / jnp.where(below > 0, below, 1), -jnp.asarray(c)) / 2
