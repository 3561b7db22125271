"""Values of a grid at real positions, and keys that are read at learned ones.

A position along an axis is in tokens: 0 is the centre of the first, n - 1 that of the last. Between tokens values are
interpolated linearly along each axis; beyond the grid there are zeros, so that a value fades over the distance of one
token. This is torch's `grid_sample` with zero padding, for any number of axes.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.activations import gelu
from attnlab.nn.grids import Lengths, lengths
from attnlab.nn.linear import Conv, Linear
from attnlab.nn.norms import LayerNorm
from pallas_kernels.dtypes import at_least_float32


def corners(points: ArrayLike, grid: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """The tokens around positions and the weights of their values.

    Args:
      points: positions `(…, A)` along the axes of the grid.
      grid: lengths of the A axes.

    Returns:
      Flat row-major places `(…, 2^A)` int32, always on the grid, and weights `(…, 2^A)` in float32 (or wider), zero for
      what is not on it. The lower token of each axis comes first, the last axis varies fastest.

    Raises:
      ValueError: if there are not as many axes as lengths.
    """
    points = jnp.asarray(points)
    if points.shape[-1] != len(grid):
        raise ValueError(f"points must have {len(grid)} coordinates for the grid {tuple(grid)}, got {points.shape}")
    wide = points.astype(at_least_float32(points.dtype))
    sides = jnp.asarray(grid, wide.dtype)
    # Farther out all weights are zero; a number that no integer holds would be worse.
    wide = jnp.clip(wide, -1, sides)
    low = jnp.floor(jax.lax.stop_gradient(wide))
    share = wide - low
    places, weights = [], []
    for corner in itertools.product((0, 1), repeat=len(grid)):
        at = low + np.asarray(corner, np.float32)
        inside = ((at >= 0) & (at < sides)).all(-1)
        weight = jnp.where(np.asarray(corner, bool), share, 1 - share).prod(-1)
        at = jnp.clip(at, 0, sides - 1).astype(jnp.int32)
        flat = jnp.zeros(at.shape[:-1], jnp.int32)
        for axis, length in enumerate(grid):
            flat = flat * length + at[..., axis]
        places.append(flat)
        weights.append(jnp.where(inside, weight, 0))
    return jnp.stack(places, -1), jnp.stack(weights, -1)


def sample(x: ArrayLike, points: ArrayLike) -> jax.Array:
    """Values at positions.

    Args:
      x: `(B, *S, C)` with A axes S.
      points: `(B, *P, A)`, with any axes P.

    Returns:
      `(B, *P, C)` in the dtype of `x`; sums are in float32 (or wider). Differentiable in both.

    Raises:
      ValueError: if the examples or the axes do not fit.
    """
    x, points = jnp.asarray(x), jnp.asarray(points)
    if points.ndim < 2 or points.shape[0] != x.shape[0]:
        raise ValueError(f"points must be (B, *P, {x.ndim - 2}) with B = {x.shape[0]}, got shape {points.shape}")
    places, weights = corners(points, x.shape[1:-1])
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    total = jnp.zeros((*points.shape[:-1], x.shape[-1]), at_least_float32(x.dtype))
    for corner in range(places.shape[-1]):
        index = places[..., corner].reshape(x.shape[0], -1, 1)
        values = jnp.take_along_axis(flat, index, axis=1).reshape(total.shape)
        total = total + weights[..., corner, None] * values
    return total.astype(x.dtype)


def reference_points(grid: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """The centres of `counts` equal cells along each axis of a grid, `(*counts, A)` float32, in tokens."""
    axes = [(np.arange(count) + 0.5) * length / count - 0.5 for length, count in zip(grid, counts, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).astype(np.float32)


class DeformableSampling(nnx.Module):
    """Tokens that are read where a small network says, as keys and values for all queries.

        δ = reach · tanh(W gelu(LN(depthwise convolution of x, with a stride)))
        z_m = source(p_m + δ_m),    p the centres of as many cells as the convolution has places

    From deformable attention (DAT, Xia et al., CVPR 2022, arXiv:2201.00520). W starts at zero, so that at first tokens
    are read on an even grid.

    Args:
      features: channels C of x, of which the network makes offsets.
      axes: A, axes of the grid.
      stride: of the convolution, one number or one for each axis.
      kernel_size: of the convolution; odd.
      groups: of channels of the source, each of which is read at positions of its own, made of its share of x.
      reach: most distance from the centre of a cell along an axis, in tokens.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the groups do not divide the channels, or a side of the kernel is even.
    """

    def __init__(
        self,
        features: int,
        *,
        axes: int = 2,
        stride: Lengths = 1,
        kernel_size: Lengths = 3,
        groups: int = 1,
        reach: float = 2.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        size = lengths(kernel_size, axes, "kernel_size")
        if groups < 1 or features % groups:
            raise ValueError(f"groups must divide the {features} channels, got {groups}")
        if any(side % 2 == 0 for side in size):
            raise ValueError(f"kernel_size must be odd, got {size}")
        self.axes, self.groups, self.reach, self.dtype = axes, groups, reach, dtype
        stored, share = {"param_dtype": param_dtype, "rngs": rngs}, features // groups
        self.conv = Conv(
            share,
            share,
            size,
            strides=lengths(stride, axes, "stride"),
            feature_group_count=share,
            dtype=dtype,
            **stored,
        )
        self.norm = LayerNorm(share, eps=1e-5, **stored)
        zeros = nnx.initializers.zeros
        self.offset = Linear(
            share, axes, use_bias=False, axes=("embed", None), kernel_init=zeros, dtype=dtype, **stored
        )

    def points(self, x: ArrayLike, grid: Sequence[int] | None = None) -> jax.Array:
        """Positions `(B, *M, groups, A)` in float32 on a grid, that of the tokens `x` `(B, *S, C)` when None."""
        x = jnp.asarray(x, self.dtype)
        if x.ndim != self.axes + 2:
            raise ValueError(f"x must be (B, *S, C) with {self.axes} axes S, got shape {x.shape}")
        shares = jnp.moveaxis(x.reshape(*x.shape[:-1], self.groups, -1), -2, 1)
        hidden = self.conv(shares.reshape(-1, *shares.shape[2:]))
        offsets = self.offset(gelu(self.norm(hidden)))
        offsets = self.reach * jnp.tanh(offsets.astype(at_least_float32(offsets.dtype)))
        offsets = jnp.moveaxis(offsets.reshape(x.shape[0], self.groups, *offsets.shape[1:]), 1, -2)
        centres = reference_points(x.shape[1:-1] if grid is None else grid, offsets.shape[1:-2])
        return jnp.asarray(centres)[..., None, :] + offsets

    def __call__(self, x: ArrayLike, source: ArrayLike | None = None) -> jax.Array:
        """Tokens `(B, *M, C')` of a source `(B, *S', C')`, x itself when None, at the positions that x says."""
        source = jnp.asarray(x if source is None else source, self.dtype)
        at = jnp.moveaxis(self.points(x, source.shape[1:-1]), -2, 1)
        shares = jnp.moveaxis(source.reshape(*source.shape[:-1], self.groups, -1), -2, 1)
        y = sample(shares.reshape(-1, *shares.shape[2:]), at.reshape(-1, *at.shape[2:]))
        y = jnp.moveaxis(y.reshape(source.shape[0], self.groups, *y.shape[1:]), 1, -2)
        return y.reshape(*y.shape[:-2], -1)
