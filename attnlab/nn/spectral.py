"""Filters in the spectrum of a grid of tokens: a circular convolution as large as the grid, by the FFT.

    y = irfft(W ⊙ rfft(x))        per channel, over all axes of the grid, orthonormal

after the global filter of GFNet (Rao et al., NeurIPS 2021, arXiv:2107.00645). Of the last axis, n long, only the
frequencies 0..n/2 are held. Of the frequencies that are their own conjugates (0, and n/2 for even n) the inverse reads
the real part alone. Cost O(N log N) per channel, in float32.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.resampling import resize_bilinear
from pallas_kernels.dtypes import at_least_float32

_init = nnx.initializers.normal(0.02)


def spectrum_of(grid: Sequence[int]) -> tuple[int, ...]:
    """How many frequencies the spectrum of a real grid has along each axis."""
    return (*grid[:-1], grid[-1] // 2 + 1)


def global_filter(x: ArrayLike, weight: ArrayLike) -> jax.Array:
    """Multiplies the spectrum of a grid of tokens.

    Args:
      x: `(B, *S, C)`, of one axis or several.
      weight: `(*spectrum_of(S), C, 2)`: real and imaginary part.

    Returns:
      `(B, *S, C)` in the dtype of `x`.

    Raises:
      ValueError: for weights of another grid.
    """
    x, weight = jnp.asarray(x), jnp.asarray(weight)
    grid, axes = x.shape[1:-1], tuple(range(1, x.ndim - 1))
    if weight.shape != (*spectrum_of(grid), x.shape[-1], 2):
        raise ValueError(f"weight must be {(*spectrum_of(grid), x.shape[-1], 2)} for x {x.shape}, got {weight.shape}")
    wide = at_least_float32(x.dtype)
    spectrum = jnp.fft.rfftn(x.astype(wide), axes=axes, norm="ortho")
    weight = weight.astype(wide)
    filtered = spectrum * jax.lax.complex(weight[..., 0], weight[..., 1])
    return jnp.fft.irfftn(filtered, s=grid, axes=axes, norm="ortho").astype(x.dtype)


class GlobalFilter(nnx.Module):
    """`global_filter` with learned weights.

    Args:
      features: channels C.
      spectrum: frequencies along each axis, see `spectrum_of`.
      resize: whether weights are interpolated linearly for tokens of another grid; else these are refused.
      init: of the weights, normal of deviation 0.02 unless given.
      param_dtype: of the weights.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        spectrum: Sequence[int],
        *,
        resize: bool = False,
        init: nnx.Initializer = _init,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.resize = resize
        weight = init(rngs.params(), (*spectrum, features, 2), param_dtype)
        self.weight = nnx.Param(weight, logical_axes=(*[None] * len(spectrum), "embed", None), weight_decay=True)

    def __call__(self, x: ArrayLike) -> jax.Array:
        """`(B, *S, C)` to the same shape and dtype."""
        x, weight = jnp.asarray(x), self.weight[...]
        wanted = spectrum_of(x.shape[1:-1])
        if self.resize and weight.shape[:-2] != wanted:
            flat = resize_bilinear(weight.reshape(1, *weight.shape[:-2], -1), wanted, align_corners=True)
            weight = flat.reshape(*wanted, *weight.shape[-2:])
        return global_filter(x, weight)
