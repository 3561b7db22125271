"""Pooling and resizing of grids `(B, *S, C)` with PyTorch's conventions, for any number of grid axes.

Each is separable: one small matrix (or one gather) per axis. All compute in float32 (or wider) and return the dtype of
the input. Lengths are an int for all axes or a tuple with one entry each.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnlab.nn.grids import Lengths, lengths
from pallas_kernels.dtypes import at_least_float32


def adaptive_avg_pool(x: ArrayLike, size: Lengths) -> jax.Array:
    """Means over `size` cells per axis; cell i of p covers floor(i·n/p) to ceil((i+1)·n/p) - 1, so cells may overlap.

    Args:
      x: `(B, *S, C)`.
      size: cells per axis, more than tokens allowed.

    Returns:
      `(B, *size, C)`.
    """
    x = jnp.asarray(x)
    size = lengths(size, x.ndim - 2)
    matrices = []
    for length, cells in zip(x.shape[1:-1], size, strict=True):
        matrix = np.zeros((cells, length))
        for cell, (start, stop) in enumerate(_cells(length, cells)):
            matrix[cell, start:stop] = 1 / (stop - start)
        matrices.append(matrix)
    return _apply(x, matrices)


def adaptive_max_pool(x: ArrayLike, size: Lengths) -> jax.Array:
    """Maxima over the cells of `adaptive_avg_pool`."""
    y = jnp.asarray(x)
    for axis, cells in enumerate(lengths(size, y.ndim - 2), 1):
        bounds = _cells(y.shape[axis], cells)
        longest = max(stop - start for start, stop in bounds)
        # Shorter cells repeat their last token, which leaves the maximum as it is.
        index = np.array([[min(start + j, stop - 1) for j in range(longest)] for start, stop in bounds])
        y = jnp.take(y, index, axis=axis).max(axis + 1)
    return y


def avg_pool(
    x: ArrayLike,
    size: Lengths,
    *,
    stride: Lengths | None = None,
    padding: Lengths = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> jax.Array:
    """Means over windows.

    Args:
      x: `(B, *S, C)`.
      size: lengths of a window.
      stride: between windows; `size` when None.
      padding: zeros on both sides of each axis, at most half the window.
      ceil_mode: whether a last, partial window is kept; what lies beyond the padding is not counted.
      count_include_pad: whether padding counts in the divisor.

    Returns:
      `(B, *S', C)`.

    Raises:
      ValueError: for padding over half the window, or a window that exceeds the padded grid.
    """
    x = jnp.asarray(x)
    wide = x.astype(at_least_float32(x.dtype))
    grid = x.shape[1:-1]
    size, stride, padding, out = _pool_arguments(grid, size, stride, padding, ceil_mode)
    y = _reduce(wide, 0.0, jax.lax.add, size, stride, padding, out)
    for axis, (n, k, s, p, count) in enumerate(zip(grid, size, stride, padding, out, strict=True), 1):
        start = np.arange(count) * s - p
        least, most = (-p, n + p) if count_include_pad else (0, n)
        covered = np.minimum(start + k, most) - np.maximum(start, least)
        y = y / jnp.asarray(covered, y.dtype).reshape([-1 if a == axis else 1 for a in range(y.ndim)])
    return y.astype(x.dtype)


def max_pool(
    x: ArrayLike, size: Lengths, *, stride: Lengths | None = None, padding: Lengths = 0, ceil_mode: bool = False
) -> jax.Array:
    """Maxima over windows; arguments as `avg_pool`. Padding never wins."""
    x = jnp.asarray(x)
    size, stride, padding, out = _pool_arguments(x.shape[1:-1], size, stride, padding, ceil_mode)
    return _reduce(x, -jnp.inf, jax.lax.max, size, stride, padding, out)


def resize_bilinear(x: ArrayLike, size: Lengths, *, align_corners: bool = False) -> jax.Array:
    """Linear interpolation along each axis, as `torch.nn.functional.interpolate` (no antialiasing when shrinking).

    Args:
      x: `(B, *S, C)`.
      size: lengths of the result.
      align_corners: whether the first and last tokens of both grids coincide; else the outer edges do.

    Returns:
      `(B, *size, C)`.
    """
    x = jnp.asarray(x)
    size = lengths(size, x.ndim - 2)
    return _apply(x, [_linear_matrix(n, m, align_corners) for n, m in zip(x.shape[1:-1], size, strict=True)])


def resize_bicubic(x: ArrayLike, size: Lengths, *, align_corners: bool = False) -> jax.Array:
    """Cubic interpolation along each axis, as `torch.nn.functional.interpolate(mode="bicubic")`, without antialiasing.

    Four tokens count at each place, by Keys' kernel with a = -0.75; beyond the edge the outermost token stands.

    Args:
      x: `(B, *S, C)`.
      size: lengths of the result.
      align_corners: whether the first and last tokens of both grids coincide; else the outer edges do.

    Returns:
      `(B, *size, C)`.
    """
    x = jnp.asarray(x)
    size = lengths(size, x.ndim - 2)
    return _apply(x, [_cubic_matrix(n, m, align_corners) for n, m in zip(x.shape[1:-1], size, strict=True)])


RESIZES = {"bilinear": resize_bilinear, "bicubic": resize_bicubic}


def gaussian_blur(x: ArrayLike, sigma: float, *, radius: int | None = None, edge: str = "reflect") -> jax.Array:
    """Convolution with a Gaussian along each axis, its weights cut off at a radius and made to sum to 1.

    Args:
      x: `(B, *S, C)`.
      sigma: standard deviation in tokens; 0 changes nothing.
      radius: of the kernel; ⌈3 sigma⌉ when None.
      edge: what is beyond the edge: "reflect", the image mirrored at its last tokens, "repeat", the last tokens, or
        "zero".

    Returns:
      The shape of `x`.

    Raises:
      ValueError: for a negative sigma or radius, or another edge.
    """
    x = jnp.asarray(x)
    radius = math.ceil(3 * sigma) if radius is None else radius
    if sigma < 0 or radius < 0:
        raise ValueError(f"sigma and radius must be at least 0, got {sigma} and {radius}")
    if edge not in ("reflect", "repeat", "zero"):
        raise ValueError(f"edge must be 'reflect', 'repeat' or 'zero', got {edge!r}")
    if sigma == 0:
        return x
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    matrices = []
    for length in x.shape[1:-1]:
        place = np.arange(length)[:, None] + offsets
        inside = (place >= 0) & (place < length) if edge == "zero" else np.ones(place.shape, bool)
        if edge == "reflect":
            period = max(2 * length - 2, 1)
            place = length - 1 - np.abs(length - 1 - place % period)
        matrix = np.zeros((length, length))
        rows = np.broadcast_to(np.arange(length)[:, None], place.shape)
        np.add.at(matrix, (rows, np.clip(place, 0, length - 1)), np.where(inside, weights, 0))
        matrices.append(matrix)
    return _apply(x, matrices)


def resize_nearest(x: ArrayLike, size: Lengths) -> jax.Array:
    """Token floor(i·n/m) at place i of m, as `torch.nn.functional.interpolate(mode="nearest")`."""
    y = jnp.asarray(x)
    for axis, target in enumerate(lengths(size, y.ndim - 2), 1):
        y = jnp.take(y, np.arange(target) * y.shape[axis] // target, axis=axis)
    return y


def _cells(length: int, cells: int) -> list[tuple[int, int]]:
    return [(i * length // cells, -(-(i + 1) * length // cells)) for i in range(cells)]


def _linear_matrix(source: int, target: int, align_corners: bool) -> np.ndarray:
    if align_corners:
        where = np.arange(target) * ((source - 1) / (target - 1) if target > 1 else 0.0)
    else:
        where = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, None)
    low = np.minimum(np.floor(where).astype(int), source - 1)
    high = np.minimum(low + 1, source - 1)
    matrix = np.zeros((target, source))
    rows = np.arange(target)
    np.add.at(matrix, (rows, low), 1 - (where - low))
    np.add.at(matrix, (rows, high), where - low)
    return matrix


def _cubic_matrix(source: int, target: int, align_corners: bool, a: float = -0.75) -> np.ndarray:
    if align_corners:
        where = np.arange(target) * ((source - 1) / (target - 1) if target > 1 else 0.0)
    else:
        where = (np.arange(target) + 0.5) * source / target - 0.5
    low = np.floor(where).astype(int)
    matrix = np.zeros((target, source))
    for tap in range(-1, 3):
        apart = np.abs(where - (low + tap))
        near = (a + 2) * apart**3 - (a + 3) * apart**2 + 1
        far = a * (apart**3 - 5 * apart**2 + 8 * apart - 4)
        np.add.at(matrix, (np.arange(target), np.clip(low + tap, 0, source - 1)), np.where(apart <= 1, near, far))
    return matrix


def _apply(x: jax.Array, matrices: Sequence[np.ndarray]) -> jax.Array:
    """Multiplies each grid axis by its matrix."""
    y = x.astype(at_least_float32(x.dtype))
    for axis, matrix in enumerate(matrices, 1):
        # A default matmul would round float32 tokens to bfloat16 on a TPU; the matrices are small.
        product = jnp.tensordot(jnp.asarray(matrix, y.dtype), y, axes=(1, axis), precision=jax.lax.Precision.HIGHEST)
        y = jnp.moveaxis(product, 0, axis)
    return y.astype(x.dtype)


def _pool_arguments(
    grid: Sequence[int], size: Lengths, stride: Lengths | None, padding: Lengths, ceil_mode: bool
) -> list[tuple[int, ...]]:
    axes = len(grid)
    size = lengths(size, axes)
    stride = size if stride is None else lengths(stride, axes, "stride")
    padding = lengths(padding, axes, "padding", least=0)
    if any(2 * p > k for p, k in zip(padding, size, strict=True)):
        raise ValueError(f"padding {padding} is over half the window {size}")
    out = []
    for n, k, s, p in zip(grid, size, stride, padding, strict=True):
        space = n + 2 * p - k
        if space < 0 and not (ceil_mode and space > -s):
            raise ValueError(f"size: a window of {size} exceeds the grid {tuple(grid)} padded by {padding}")
        count = (math.ceil(space / s) if ceil_mode else space // s) + 1
        # A window may not start in the padding on the right.
        out.append(count - 1 if ceil_mode and (count - 1) * s >= n + p else count)
    return [size, stride, padding, tuple(out)]


def _reduce(x, start, operation, size, stride, padding, out) -> jax.Array:
    high = [
        max(0, (count - 1) * s + k - n - p)
        for n, k, s, p, count in zip(x.shape[1:-1], size, stride, padding, out, strict=True)
    ]
    widths = [(0, 0), *zip(padding, high, strict=True), (0, 0)]
    y = jax.lax.reduce_window(x, np.asarray(start, x.dtype), operation, (1, *size, 1), (1, *stride, 1), widths)
    return y[(slice(None), *(slice(count) for count in out))]
