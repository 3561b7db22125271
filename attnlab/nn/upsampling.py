"""Finer grids by learned maps: the transposed convolution, and channels that become places."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.grids import lengths
from attnlab.nn.linear import compute_in_input_dtype, uniform_init


class ConvTranspose(nnx.Module):
    """The transpose of a convolution, with PyTorch's conventions: a grid of n to one of (n - 1) s + k - 2 p + o.

        y_u = Σ_t kernel[u + p - s t] x_t + bias,   where 0 ≤ u + p - s t < k

    Args:
      in_features: channels in.
      out_features: channels out.
      kernel_size: sides k of the kernel.
      stride: s.
      padding: p, at most k - 1.
      output_padding: o, below s: further tokens at the end of each axis.
      use_bias: whether a bias is added.
      axes: logical names of the last two axes of the kernel `(*k, in, out)`.
      kernel_init: uniform in ±1/√(out · Πk) unless given, as PyTorch has it; the bias too.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for a padding out of its range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        use_bias: bool = True,
        axes: Sequence[str | None] = ("embed", "embed"),
        kernel_init: nnx.Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        size = tuple(kernel_size)
        self.kernel_size, self.dtype = size, dtype
        self.stride = lengths(stride, len(size), "stride")
        padding = lengths(padding, len(size), "padding", least=0)
        more = lengths(output_padding, len(size), "output_padding", least=0)
        if any(p >= k for p, k in zip(padding, size, strict=True)):
            raise ValueError(f"padding must be below the sides of the kernel {size}, got {padding}")
        if any(o >= s for o, s in zip(more, self.stride, strict=True)):
            raise ValueError(f"output_padding must be below the stride {self.stride}, got {more}")
        self.padding = [(k - 1 - p, k - 1 - p + o) for k, p, o in zip(size, padding, more, strict=True)]
        init = uniform_init(out_features * math.prod(size))
        kernel = (init if kernel_init is None else kernel_init)(
            rngs.params(), (*size, in_features, out_features), param_dtype
        )
        self.kernel = nnx.Param(kernel, logical_axes=(*(None,) * len(size), *axes))
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(init(rngs.params(), (out_features,), param_dtype), logical_axes=(axes[1],))

    def __call__(self, x: ArrayLike) -> jax.Array:
        """`(B, *S, in_features)` to `(B, *S', out_features)`."""
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = compute_in_input_dtype((x, self.kernel[...], bias), dtype=self.dtype)
        sides = range(len(self.kernel_size))
        grid = (0, x.ndim - 1, *range(1, x.ndim - 1))
        layout = jax.lax.ConvDimensionNumbers(grid, (x.ndim - 1, x.ndim - 2, *sides), grid)
        y = jax.lax.conv_general_dilated(
            x,
            jnp.flip(kernel, tuple(sides)),
            window_strides=(1,) * len(sides),
            padding=self.padding,
            lhs_dilation=self.stride,
            dimension_numbers=layout,
        )
        return y if bias is None else y + bias


def pixel_shuffle(x: ArrayLike, factor: int) -> jax.Array:
    """Channels to a finer grid: `(B, *S, C·f^A)` to `(B, *(f S), C)` of A axes (Shi et al., 2016, arXiv:1609.05158).

    As PyTorch orders them: channels of the result vary slowest, then the place inside a token, row-major.

    Raises:
      ValueError: if the channels are no multiple of f^A.
    """
    x = jnp.asarray(x)
    axes = x.ndim - 2
    if factor < 1 or x.shape[-1] % factor**axes:
        raise ValueError(f"channels must be a multiple of {factor}^{axes}, got {x.shape[-1]}")
    grid = x.shape[1:-1]
    y = x.reshape(x.shape[0], *grid, -1, *(factor,) * axes)
    order = [0, *(place for axis in range(axes) for place in (1 + axis, 2 + axes + axis)), 1 + axes]
    return y.transpose(order).reshape(x.shape[0], *(factor * length for length in grid), -1)


def pixel_unshuffle(x: ArrayLike, factor: int) -> jax.Array:
    """Undoes `pixel_shuffle`: `(B, *S, C)` to `(B, *(S / f), C·f^A)`.

    Raises:
      ValueError: if the factor does not divide the grid.
    """
    x = jnp.asarray(x)
    axes, grid = x.ndim - 2, x.shape[1:-1]
    if factor < 1 or any(length % factor for length in grid):
        raise ValueError(f"factor must divide the grid {grid}, got {factor}")
    y = x.reshape(x.shape[0], *(part for length in grid for part in (length // factor, factor)), x.shape[-1])
    order = [0, *range(1, 2 * axes, 2), 2 * axes + 1, *range(2, 2 * axes + 1, 2)]
    return y.transpose(order).reshape(x.shape[0], *(length // factor for length in grid), -1)
