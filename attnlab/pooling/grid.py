"""Tokens as a map, for poolings that look at neighbours."""

import math

import jax


def two_axes(grid: tuple[int, ...]) -> tuple[int, int]:
    """The grid as (Hh, Ww); a sequence is one row.

    Raises:
      ValueError: if the grid has more than two axes.
    """
    if len(grid) > 2:
        raise ValueError(f"the grid must be that of an image (Hh, Ww) or of a sequence (N,), got {grid}")
    return (1, grid[0]) if len(grid) == 1 else tuple(grid)


def to_map(x: jax.Array, grid: tuple[int, int] | None) -> jax.Array:
    """Tokens (B, N, C) as a map (B, Hh, Ww, C); a square one when `grid` is None.

    Raises:
      ValueError: if N is not Hh·Ww, or no square when `grid` is None.
    """
    tokens = x.shape[1]
    side = math.isqrt(tokens)
    height, width = (side, side) if grid is None else grid
    if height * width != tokens:
        wanted = "a square number of tokens (give the pooling a grid for others)" if grid is None else f"{grid} tokens"
        raise ValueError(f"the map needs {wanted}, got {tokens}")
    return x.reshape(x.shape[0], height, width, x.shape[2])
