"""Grids of tokens: windows, neighbourhoods, pooling and resizing of `(B, *S, C)`.

`S` is the grid: one axis for a sequence, (H, W) for an image, (T, H, W) for a video; every function here works for any
number of grid axes. Lengths along the axes (`window`, `size`, `stride`, ...) are an int for all axes or a tuple with
one entry each. Channels stay last and whole, and flattened axes are in row-major order. Pooling and resizing compute in
float32 (or wider) and return the dtype of the input.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Lengths = int | Sequence[int]


def lengths(value: Lengths, axes: int, name: str = "size", least: int = 1) -> tuple[int, ...]:
    """`value` as a tuple with one entry for each grid axis.

    Raises:
      ValueError: if it has another number of entries, or one below `least`.
    """
    entries = (value,) * axes if isinstance(value, int | np.integer) else tuple(int(entry) for entry in value)
    if len(entries) != axes or any(entry < least for entry in entries):
        raise ValueError(f"{name} must be an int or {axes} ints, each at least {least}, got {value!r}")
    return entries


def to_tokens(x: ArrayLike) -> jax.Array:
    """`(B, *S, C)` to `(B, N, C)`, N the product of S."""
    x = jnp.asarray(x)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def to_grid(tokens: ArrayLike, grid: Sequence[int]) -> jax.Array:
    """`(B, N, C)` to `(B, *grid, C)`.

    Raises:
      ValueError: if the grid does not hold N tokens.
    """
    tokens = jnp.asarray(tokens)
    if math.prod(grid) != tokens.shape[1]:
        raise ValueError(f"grid {tuple(grid)} holds {math.prod(grid)} tokens, got {tokens.shape[1]}")
    return tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1])


# Windows


def pad_to_multiple(x: ArrayLike, multiple: Lengths) -> tuple[jax.Array, np.ndarray | None]:
    """Zeros at the end of each grid axis, up to a multiple of a window.

    Returns:
      `(B, *S', C)`, and the mask of real tokens `(*S',)` as a NumPy boolean array, None if nothing was added.
    """
    x = jnp.asarray(x)
    grid = x.shape[1:-1]
    extra = [-length % m for length, m in zip(grid, lengths(multiple, len(grid), "multiple"), strict=True)]
    if not any(extra):
        return x, None
    widths = [(0, e) for e in extra]
    return jnp.pad(x, [(0, 0), *widths, (0, 0)]), np.pad(np.ones(grid, bool), widths)


def crop(x: ArrayLike, grid: Sequence[int]) -> jax.Array:
    """The first `grid` entries of each grid axis: undoes `pad_to_multiple`."""
    return jnp.asarray(x)[(slice(None), *(slice(length) for length in grid))]


def window_partition(x: ArrayLike, window: Lengths, *, shift: Lengths = 0) -> jax.Array:
    """Cuts the grid into windows side by side; a window as long as the grid in one axis is a stripe.

    Args:
      x: `(B, *S, C)`.
      window: lengths of a window, which divide S (see `pad_to_multiple`).
      shift: the windows start at this offset and wrap around (Liu et al., 2021, arXiv:2103.14030); pair it with
        `shift_mask` where wrapped tokens must not mix.

    Returns:
      `(B, W, P, C)`: W windows of P tokens.

    Raises:
      ValueError: if the window does not divide the grid.
    """
    return _partition(_roll(jnp.asarray(x), shift, -1), window)


def window_merge(windows: ArrayLike, window: Lengths, grid: Sequence[int], *, shift: Lengths = 0) -> jax.Array:
    """Undoes `window_partition`: `(B, W, P, C)` to `(B, *grid, C)`."""
    windows = jnp.asarray(windows)
    counts, window = _counts(grid, window)
    y = windows.reshape(windows.shape[0], *counts, *window, windows.shape[-1])
    return _roll(_scatter_pairs(y, len(grid)).reshape(windows.shape[0], *grid, windows.shape[-1]), shift, 1)


def dilated_partition(x: ArrayLike, size: Lengths) -> jax.Array:
    """Groups of `size` tokens that stand evenly over the whole grid: the grid attention of MaxViT, arXiv:2204.01697.

    Token `s` of group `g` is at `s · (S / size) + g` along each axis.

    Returns:
      `(B, W, P, C)`: W groups of P tokens.

    Raises:
      ValueError: if `size` does not divide the grid.
    """
    x = jnp.asarray(x)
    grid = x.shape[1:-1]
    counts, size = _counts(grid, size, "size")
    y = _gather_pairs(x.reshape(x.shape[0], *_interleave(size, counts), x.shape[-1]), len(grid))
    y = y.reshape(x.shape[0], math.prod(size), math.prod(counts), x.shape[-1])
    return y.swapaxes(1, 2)


def dilated_merge(groups: ArrayLike, size: Lengths, grid: Sequence[int]) -> jax.Array:
    """Undoes `dilated_partition`: `(B, W, P, C)` to `(B, *grid, C)`."""
    groups = jnp.asarray(groups)
    counts, size = _counts(grid, size, "size")
    y = groups.swapaxes(1, 2).reshape(groups.shape[0], *size, *counts, groups.shape[-1])
    return _scatter_pairs(y, len(grid)).reshape(groups.shape[0], *grid, groups.shape[-1])


def shift_mask(grid: Sequence[int], window: Lengths, shift: Lengths) -> np.ndarray:
    """Which tokens of a shifted window were neighbours before the grid wrapped around.

    Args:
      grid: lengths of the grid, multiples of the window.
      window: lengths of a window.
      shift: as given to `window_partition`.

    Returns:
      `(W, P, P)` boolean, True where a pair may attend.
    """
    region = np.zeros(tuple(grid), np.int32)
    for axis, (length, offset) in enumerate(zip(grid, lengths(shift, len(grid), "shift", least=0), strict=True)):
        wrapped = np.arange(length) >= length - offset % length
        region = 2 * region + wrapped.reshape([-1 if a == axis else 1 for a in range(len(grid))])
    ids = _partition(region[None, ..., None], window)[0, :, :, 0]
    return ids[:, :, None] == ids[:, None, :]


def _partition(x: Any, window: Lengths) -> Any:
    grid = x.shape[1:-1]
    counts, window = _counts(grid, window)
    y = x.reshape(x.shape[0], *_interleave(counts, window), x.shape[-1])
    return _gather_pairs(y, len(grid)).reshape(x.shape[0], math.prod(counts), math.prod(window), x.shape[-1])


def _counts(grid: Sequence[int], window: Lengths, name: str = "window") -> tuple[tuple[int, ...], tuple[int, ...]]:
    window = lengths(window, len(grid), name)
    if any(length % size for length, size in zip(grid, window, strict=True)):
        raise ValueError(f"{name} {window} does not divide the grid {tuple(grid)}; pad it with pad_to_multiple")
    return tuple(length // size for length, size in zip(grid, window, strict=True)), window


def _interleave(outer: Sequence[int], inner: Sequence[int]) -> list[int]:
    return [length for pair in zip(outer, inner, strict=True) for length in pair]


def _gather_pairs(x: Any, axes: int) -> Any:
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2)]
    return x.transpose(*order, *range(2 * axes + 1, x.ndim))


def _scatter_pairs(x: jax.Array, axes: int) -> jax.Array:
    order = [
        0,
        *(axis for pair in zip(range(1, axes + 1), range(axes + 1, 2 * axes + 1), strict=True) for axis in pair),
    ]
    return x.transpose(*order, *range(2 * axes + 1, x.ndim))


def _roll(x: jax.Array, shift: Lengths, sign: int) -> jax.Array:
    axes = x.ndim - 2
    shift = lengths(shift, axes, "shift", least=0)
    return jnp.roll(x, [sign * s for s in shift], range(1, axes + 1)) if any(shift) else x


# Neighbourhoods


def unfold(
    x: ArrayLike, size: Lengths, *, stride: Lengths = 1, dilation: Lengths = 1, padding: Lengths = 0, fill: float = 0
) -> jax.Array:
    """The patch of `size` tokens at each place of the grid.

    Overlapping windows with a halo (HaloNet, arXiv:2103.12731) are `size=block + 2 * halo, stride=block,
    padding=halo`. `unfold_mask` says which tokens of a patch lie inside the grid.

    Args:
      x: `(B, *S, C)`.
      size: lengths of a patch.
      stride: between the starts of patches.
      dilation: between tokens of a patch.
      padding: added on both sides of each axis.
      fill: value of the padding.

    Returns:
      `(B, *S', K, C)` with K tokens per patch in row-major order,
      S' = (S + 2·padding - dilation·(size - 1) - 1) // stride + 1.

    Raises:
      ValueError: if a patch is longer than the padded grid.
    """
    y = jnp.asarray(x)
    axes = y.ndim - 2
    size, stride, dilation, padding = _patch(axes, size, stride, dilation, padding)
    out = _patch_counts(y.shape[1:-1], size, stride, dilation, padding)
    y = jnp.pad(y, [(0, 0), *((p, p) for p in padding), (0, 0)], constant_values=fill)
    # Axis by axis: the sum of the patch's sides in slices, not their product. Axis `a` stands behind `a` patch axes.
    for a in range(axes):
        axis = 1 + 2 * a
        span = (out[a] - 1) * stride[a] + 1
        slices = [
            jax.lax.slice_in_dim(y, j * dilation[a], j * dilation[a] + span, stride[a], axis) for j in range(size[a])
        ]
        y = jnp.stack(slices, axis + 1)
    return _gather_pairs(y, axes).reshape(y.shape[0], *out, math.prod(size), y.shape[-1])


def unfold_mask(
    grid: Sequence[int], size: Lengths, *, stride: Lengths = 1, dilation: Lengths = 1, padding: Lengths = 0
) -> np.ndarray:
    """`(*S', K)` boolean: which tokens of the patches of `unfold` lie inside the grid."""
    index = unfold_index(grid, size, stride=stride, dilation=dilation, padding=padding)
    return index >= 0


def unfold_index(
    grid: Sequence[int], size: Lengths, *, stride: Lengths = 1, dilation: Lengths = 1, padding: Lengths = 0
) -> np.ndarray:
    """`(*S', K)` int32: the flat index in the grid of each token of the patches of `unfold`, -1 outside of it."""
    axes = len(grid)
    size, stride, dilation, padding = _patch(axes, size, stride, dilation, padding)
    out = _patch_counts(grid, size, stride, dilation, padding)
    flat, inside = np.zeros((1,) * (2 * axes), np.int32), np.ones((1,) * (2 * axes), bool)
    for a, length in enumerate(grid):
        where = np.arange(out[a])[:, None] * stride[a] + np.arange(size[a]) * dilation[a] - padding[a]
        shape = [1] * (2 * axes)
        shape[a], shape[axes + a] = where.shape
        where = where.reshape(shape)
        flat = flat * length + where
        inside = inside & (where >= 0) & (where < length)
    return np.where(inside, flat, -1).astype(np.int32).reshape(*out, math.prod(size))


def _patch(axes: int, size: Lengths, stride: Lengths, dilation: Lengths, padding: Lengths) -> list[tuple[int, ...]]:
    return [
        lengths(size, axes, "size"),
        lengths(stride, axes, "stride"),
        lengths(dilation, axes, "dilation"),
        lengths(padding, axes, "padding", least=0),
    ]


def _patch_counts(
    grid: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
) -> tuple[int, ...]:
    counts = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, d, p in zip(grid, size, stride, dilation, padding, strict=True)
    )
    if any(count < 1 for count in counts):
        raise ValueError(f"a patch of size {size} and dilation {dilation} exceeds the grid {tuple(grid)} + 2·{padding}")
    return counts
