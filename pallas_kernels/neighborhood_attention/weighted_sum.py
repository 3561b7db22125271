"""Sums of values over the neighborhoods of `windows`, with weights that are given: those of a kernel made elsewhere.

    y_i = Σ_t w_i[t] v_{first(i) + t}        t over the taps of the window of i, in row-major order

At a border the window is shifted, never cut, so that every weight meets a token. `neighborhood_attention` without its
scores; in NATTEN `na1d_av`, `na2d_av`, `na3d_av`.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.neighborhood_attention.api import PerAxis, neighborhood_mask


def neighborhood_places(shape: Sequence[int], kernel_size: PerAxis) -> tuple[np.ndarray, ...]:
    """Along each axis, the position of each tap of the window of each token: int32 (length, k).

    Raises:
      ValueError: if a window is longer than its axis.
    """
    windows: Any = neighborhood_mask(shape, kernel_size).masks
    firsts = (window.table()[0][0] for window in windows)
    return tuple(
        (first[:, None] + np.arange(window.kernel_size)).astype(np.int32)
        for first, window in zip(firsts, windows, strict=True)
    )


def neighborhood_sum(weights: ArrayLike, v: ArrayLike, kernel_size: PerAxis) -> jax.Array:
    """Weighted sums over the neighborhood of each token, on 1, 2 or 3 axes of tokens *S.

    Sums are float32 (float64 for float64 inputs). Differentiable in both arrays. Memory is that of the weights and, for
    one row of taps at a time, k copies of the values.

    Args:
      weights: (B, *S, H, K), K the product of the kernel's sides, taps in row-major order; any numbers.
      v: values, (B, *S, H, E).
      kernel_size: taps of a window, one number or one per axis, at most the length of the axis.

    Returns:
      y (B, *S, H, E) in the dtype of v.

    Raises:
      ValueError: for shapes that do not fit, or a window that is longer than its axis.
    """
    weights, v = jnp.asarray(weights), jnp.asarray(v)
    if v.ndim not in (4, 5, 6):
        raise ValueError(f"v must be (B, *S, H, E) with 1, 2 or 3 axes of tokens *S, got shape {v.shape}")
    places = neighborhood_places(v.shape[1:-2], kernel_size)
    taps = math.prod(place.shape[1] for place in places)
    if weights.shape != (*v.shape[:-1], taps):
        raise ValueError(f"weights must be (B, *S, H, K) = {(*v.shape[:-1], taps)}, got shape {weights.shape}")
    wide = at_least_float32(v.dtype)
    rows = weights.reshape(*weights.shape[:-1], -1, places[-1].shape[1])
    key = tuple(tuple(map(tuple, place.tolist())) for place in places)
    return _sum(key, jnp.moveaxis(rows, -2, 0).astype(wide), v.astype(wide)).astype(v.dtype)


_Places = tuple[tuple[tuple[int, ...], ...], ...]


@functools.lru_cache(maxsize=256)
def _tables(places: _Places) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Which tap of each axis but the last a row of taps is, the columns of a row, and the positions of all axes."""
    arrays = tuple(np.asarray(place, np.int32) for place in places)
    rows = list(itertools.product(*(range(array.shape[1]) for array in arrays[:-1])))
    return np.asarray(rows, np.int32).reshape(len(rows), len(arrays) - 1), arrays[-1], arrays[:-1]


def _row(places: _Places, v: jax.Array, row: jax.Array) -> jax.Array:
    """What the taps of a row see: (B, *S, k, H, E)."""
    _, columns, others = _tables(places)
    for axis, place in enumerate(others, 1):
        v = jnp.take(v, jnp.asarray(place)[:, row[axis - 1]], axis=axis, mode="clip")
    return jnp.take(v, columns, axis=len(places), mode="clip")


def _add_row(places: _Places, seen: jax.Array, row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The transpose of `_row`."""
    zeros = jnp.zeros(shape, seen.dtype)
    return jax.linear_transpose(lambda v: _row(places, v, row), zeros)(seen)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(places: _Places, weights: jax.Array, v: jax.Array) -> jax.Array:
    """Weights (rows, B, *S, H, k), values (B, *S, H, E)."""

    def step(y: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        row, w = inputs
        return y + jnp.einsum("...hk,...khe->...he", w, _row(places, v, row), precision="highest"), None

    return jax.lax.scan(step, jnp.zeros_like(v), (jnp.asarray(_tables(places)[0]), weights))[0]


def _forward(places: _Places, weights: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _sum(places, weights, v), (weights, v)


def _backward(places: _Places, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights, v = saved

    def step(dv: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row, w = inputs
        dw = jnp.einsum("...he,...khe->...hk", dy, _row(places, v, row), precision="highest")
        seen = jnp.einsum("...hk,...he->...khe", w, dy, precision="highest")
        return dv + _add_row(places, seen, row, v.shape), dw

    dv, dw = jax.lax.scan(step, jnp.zeros_like(v), (jnp.asarray(_tables(places)[0]), weights))
    return dw, dv


_sum.defvjp(_forward, _backward)
