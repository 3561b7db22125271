"""Depthwise convolution of tokens on a grid: each channel has a kernel of its own.

It is computed as a sum of shifted products, one for each tap. XLA on a CPU turns a grouped convolution into a dense
one, five to ten times slower; and products leave channels alone, so heads that are cut over devices stay where they
are. On a CPU its backward pass is written by hand: the tokens' gradient is such a sum again, with the kernel turned
round, and the kernel's a loop over its taps. That takes two thirds of the time of what JAX makes of the sum, a third
where XLA would compute the cotangent anew for every tap, and compiles several times faster where the kernel is large.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.linear import Axes, compute_in_input_dtype, uniform_init
from pallas_kernels import dispatch
from pallas_kernels.dtypes import at_least_float32


def depthwise_conv(
    x: ArrayLike, kernel: ArrayLike, bias: ArrayLike | None = None, *, channel_axes: int = 1
) -> jax.Array:
    """Cross-correlation of each channel with its own kernel, zeros around the grid, the grid's size kept.

    Args:
      x: `(B, *S, *C)`; the channels may have several axes, such as `(H, E)`.
      kernel: `(*K, *C)` with odd K, or `(B, *K, *C)`: one for each example (as predicted by a network).
      bias: `(*C,)` or `(B, *C)`, or None.
      channel_axes: number of axes of the channels.

    Returns:
      `(B, *S, *C)` in the dtype of `x`; sums are in float32 (or wider).

    Raises:
      ValueError: if the kernel's rank does not fit or a side of it is even.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    axes = x.ndim - 1 - channel_axes
    if kernel.ndim not in (x.ndim - 1, x.ndim):
        raise ValueError(f"kernel must be (*K, *C) or (B, *K, *C) with {axes} axes K, got shape {kernel.shape}")
    kernel = kernel if kernel.ndim == x.ndim else kernel[None]
    size = kernel.shape[1 : 1 + axes]
    if any(side % 2 == 0 for side in size):
        raise ValueError(f"kernel must have odd sides to keep the grid's size, got {size}")
    wide = at_least_float32(x.dtype)
    by_hand = dispatch.current_platform() == "cpu" and not dispatch.in_forward_mode()
    y = (_correlate_by_hand if by_hand else _correlate)(x.astype(wide), kernel.astype(wide), axes)
    if bias is not None:
        bias = jnp.asarray(bias, wide)
        batch = bias.shape[: bias.ndim - channel_axes]
        y = y + bias.reshape(*batch, *(1,) * axes, *x.shape[1 + axes :])
    return y.astype(x.dtype)


def _correlate(x: jax.Array, kernel: jax.Array, axes: int) -> jax.Array:
    """`(B, *S, *C)` with `(B|1, *K, *C)`, of `axes` axes S; both of one dtype."""
    size, grid, channels = kernel.shape[1 : 1 + axes], x.shape[1 : 1 + axes], x.shape[1 + axes :]
    padded = _padded(x, size)
    taps = kernel.reshape(kernel.shape[0], -1, *(1,) * axes, *channels)
    y = jnp.zeros_like(x)
    for tap, offset in enumerate(np.ndindex(*size)):
        window = tuple(slice(o, o + length) for o, length in zip(offset, grid, strict=True))
        y = y + taps[:, tap] * padded[(slice(None), *window)]
    return y


def _padded(x: jax.Array, size: Sequence[int]) -> jax.Array:
    return jnp.pad(x, [(0, 0), *((side // 2, side // 2) for side in size), *[(0, 0)] * (x.ndim - 1 - len(size))])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _correlate_by_hand(x: jax.Array, kernel: jax.Array, axes: int) -> jax.Array:
    return _correlate(x, kernel, axes)


def _keep(x: jax.Array, kernel: jax.Array, axes: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _correlate_by_hand(x, kernel, axes), (x, kernel)


def _pull_back(axes: int, kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    over = tuple(range(1, 1 + axes))
    padded = _padded(x, kernel.shape[1 : 1 + axes])

    def tap(_: None, start: jax.Array) -> tuple[None, jax.Array]:
        window = jax.lax.dynamic_slice(padded, tuple(start), x.shape)
        return None, jnp.sum(window * dy, over)

    starts = np.array(list(np.ndindex(1, *kernel.shape[1 : 1 + axes], *(1,) * (x.ndim - 1 - axes))), np.int32)
    _, taps = jax.lax.scan(tap, None, starts)  # (taps, B, *C): examples on several devices are summed once, below
    dkernel = jnp.moveaxis(taps, 0, 1).reshape(x.shape[0], *kernel.shape[1:])
    if kernel.shape[0] != x.shape[0]:
        dkernel = dkernel.sum(0, keepdims=True)
    return _correlate_by_hand(dy, jnp.flip(kernel, over), axes), dkernel


_correlate_by_hand.defvjp(_keep, _pull_back)


class DepthwiseConv(nnx.Module):
    """`depthwise_conv` with learned kernels, `(B, *S, *C)` to the same shape.

    Args:
      channels: C, or several axes such as `(H, E)`: heads and their size.
      kernel_size: odd sides K of the kernel, one for each axis of the grid.
      use_bias: whether a bias `(*C,)` is added.
      axes: logical names of the channels' axes; `("embed",)` for one axis, else heads and no name for their size.
      kernel_init: of the kernel `(*K, *C)`; uniform in ±1/√ΠK unless given.
      bias_init: of the bias; the same.
      activation: of the result; none when None.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for an even side.
    """

    def __init__(
        self,
        channels: int | Sequence[int],
        kernel_size: Sequence[int],
        *,
        use_bias: bool = True,
        axes: Axes | None = None,
        kernel_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer | None = None,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        channels = (channels,) if isinstance(channels, int | np.integer) else tuple(channels)
        self.kernel_size, self.channels, self.dtype = tuple(kernel_size), channels, dtype
        if any(side % 2 == 0 for side in self.kernel_size):
            raise ValueError(f"kernel_size must be odd to keep the grid's size, got {self.kernel_size}")
        if axes is None:
            axes = ("embed",) if len(channels) == 1 else ("heads", *(None,) * (len(channels) - 1))
        init = uniform_init(math.prod(self.kernel_size))
        kernel = (init if kernel_init is None else kernel_init)(
            rngs.params(), (*self.kernel_size, *channels), param_dtype
        )
        self.kernel = nnx.Param(kernel, logical_axes=((None,) * len(self.kernel_size) + tuple(axes)))
        self.bias = nnx.data(None)
        if use_bias:
            bias = (init if bias_init is None else bias_init)(rngs.params(), channels, param_dtype)
            self.bias = nnx.Param(bias, logical_axes=tuple(axes))

    def __call__(self, x: ArrayLike) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = compute_in_input_dtype((x, self.kernel[...], bias), dtype=self.dtype)
        y = depthwise_conv(x, kernel, bias, channel_axes=len(self.channels))
        return y if self.activation is None else self.activation(y)


def on_tokens(convolution: Callable[[jax.Array], jax.Array], x: jax.Array, grid: Sequence[int]) -> jax.Array:
    """A convolution of `(B, *grid, *C)` on tokens `(B, N, *C)`; those in front of the grid's are left out and get 0."""
    front, channels = x.shape[1] - math.prod(grid), x.shape[2:]
    y = convolution(x[:, front:].reshape(x.shape[0], *grid, *channels))
    y = y.reshape(x.shape[0], -1, *channels)
    return jnp.pad(y, [(0, 0), (front, 0), *[(0, 0)] * len(channels)]) if front else y
