"""Smaller images of keys and values (PVT, arXiv:2102.12122)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.nn.linear import Conv
from attnlab.nn.norms import LayerNorm


class SpatialReduction(nnx.Module):
    """LayerNorm(Conv_{r x r, stride r}(X)): tokens `(B, N, C)` of an image to `(B, N / r², C)`.

    Args:
      features: channels C.
      reduction: r.
      dtype: of the computation; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self, features: int, reduction: int, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.reduction, stride = reduction, (reduction, reduction)
        common = {"param_dtype": param_dtype, "rngs": rngs}
        self.conv = Conv(features, features, stride, strides=stride, padding="VALID", dtype=dtype, **common)
        self.norm = LayerNorm(features, eps=1e-5, **common)

    def __call__(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """`grid` is that of the tokens `x`, which r divides."""
        y = self.norm(self.conv(x.reshape(x.shape[0], *grid, x.shape[-1])))
        return y.reshape(y.shape[0], -1, y.shape[-1])

    def spread(self, weights: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Weights on reduced keys `(B, H, N, M)` as weights on tokens `(B, H, N, M·r²)`, even over each patch."""
        keys = check_reduction(self.reduction, grid)
        patches = weights.reshape(*weights.shape[:3], *keys) / self.reduction**2
        patches = jnp.repeat(jnp.repeat(patches, self.reduction, 3), self.reduction, 4)
        return patches.reshape(*weights.shape[:3], math.prod(grid))


def check_reduction(reduction: int, grid: tuple[int, int]) -> tuple[int, int]:
    """The reduced grid.

    Raises:
      ValueError: if the reduction does not divide the grid.
    """
    if reduction < 1 or any(length % reduction for length in grid):
        raise ValueError(f"reduction must be at least 1 and divide the grid {tuple(grid)}, got {reduction}")
    return grid[0] // reduction, grid[1] // reduction
