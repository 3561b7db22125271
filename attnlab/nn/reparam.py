"""A large depthwise convolution that learns with small, dilated ones beside it, and is one without them at inference.

    y = BN(conv_K(x)) + Σ_i BN_i(conv_{k_i, dilation r_i}(x))

From UniRepLKNet (Ding et al., CVPR 2024, arXiv:2311.15599). A batch norm at inference scales and shifts, and a dilated
kernel is a larger one with zeros between its taps, so that the sum is one K × K kernel with a bias. In training each
branch has the statistics of its batch and is computed by itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.conv import ConvNorm
from attnlab.nn.depthwise import depthwise_conv
from attnlab.nn.norms import BatchNorm
from pallas_kernels.dtypes import at_least_float32

BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    3: (),
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""Side and dilation of each branch, by the side of the large kernel; the least has none."""
ROWS = 9
"""Side of a kernel from which on its rows are a loop of the program: unrolled, its taps take long to compile."""


def large_depthwise_conv(x: ArrayLike, kernel: ArrayLike, bias: ArrayLike | None = None) -> jax.Array:
    """`depthwise_conv` of images with a kernel `(K, K', C)`, of which large ones are taken row by row."""
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    side, length = kernel.shape[0], x.shape[1]
    if side < ROWS:
        return depthwise_conv(x, kernel, bias)
    wide = at_least_float32(x.dtype)
    padded = jnp.pad(x, ((0, 0), (side // 2, side // 2), (0, 0), (0, 0))).astype(wide)

    @jax.checkpoint
    def row(index: jax.Array, taps: jax.Array) -> jax.Array:
        return depthwise_conv(jax.lax.dynamic_slice_in_dim(padded, index, length, 1), taps[None])

    y, _ = jax.lax.scan(
        lambda y, inputs: (y + row(*inputs), None),
        jnp.zeros(x.shape, wide),
        (jnp.arange(side, dtype=jnp.int32), kernel.astype(wide)),
    )
    return (y if bias is None else y + jnp.asarray(bias, wide)).astype(x.dtype)


class DilatedReparamConv(nnx.Module):
    """Images `(B, H, W, C)` to the same shape; see the module docstring.

    Args:
      features: channels C.
      kernel_size: side K of the large kernel, one of `BRANCHES`.
      merged: whether it is the one kernel with a bias that is left at inference, see `merge`.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for another side.
    """

    def __init__(
        self,
        features: int,
        kernel_size: int,
        *,
        merged: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if kernel_size not in BRANCHES:
            raise ValueError(f"kernel_size must be one of {', '.join(map(str, BRANCHES))}, got {kernel_size}")
        self.features, self.kernel_size, self.merged, self.dtype = features, kernel_size, merged, dtype
        options: dict[str, Any] = {"groups": features, "axes": (None, "embed"), "param_dtype": param_dtype}
        options |= {"dtype": dtype, "use_bias": merged, "norm": None if merged else BatchNorm, "rngs": rngs}
        self.large = ConvNorm(features, features, kernel_size, **options)
        self.branches = nnx.List(
            ConvNorm(features, features, side, dilation=dilation, **options)
            for side, dilation in (() if merged else BRANCHES[kernel_size])
        )

    def whole(self) -> tuple[jax.Array, jax.Array]:
        """The one kernel `(K, K, C)` and its bias `(C,)` at inference, in float32 (or wider)."""
        kernel, bias = _scaled(self.large)
        kernel = kernel.reshape(self.kernel_size, self.kernel_size, -1)
        for branch, (side, dilation) in zip(self.branches, BRANCHES[self.kernel_size], strict=False):
            taps, shift = _scaled(branch)
            edge, zero = (self.kernel_size - dilation * (side - 1) - 1) // 2, jnp.zeros((), kernel.dtype)
            widths = ((edge, edge, dilation - 1),) * 2 + ((0, 0, 0),)
            kernel = kernel + jax.lax.pad(taps.reshape(side, side, -1), zero, widths)
            bias = bias + shift
        return kernel, bias

    def merge(self) -> "DilatedReparamConv":
        """A copy for inference with the one kernel in place of all."""
        kernel, bias = self.whole()
        stored = self.large.conv.kernel.dtype
        one = DilatedReparamConv(
            self.features, self.kernel_size, merged=True, dtype=self.dtype, param_dtype=stored, rngs=nnx.Rngs(0)
        )
        conv: Any = one.large.conv
        conv.kernel[...], conv.bias[...] = kernel.astype(stored), bias.astype(stored)
        return one

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        x = jnp.asarray(x, self.dtype)
        if deterministic or self.merged:
            kernel, bias = self.whole()
            return large_depthwise_conv(x, kernel.astype(x.dtype), bias)
        norm: Any = self.large.norm
        y = norm(large_depthwise_conv(x, self.large.conv.kernel[...].astype(x.dtype)), deterministic=False)
        for branch in self.branches:
            y = y + branch(x, deterministic=False)
        return y


def _scaled(part: ConvNorm) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias of a convolution with the norm behind it, as it is at inference."""
    conv: Any = part.conv
    wide = at_least_float32(conv.kernel.dtype)
    kernel = conv.kernel[...].astype(wide)
    bias = jnp.zeros(kernel.shape[-1:], wide) if conv.bias is None else conv.bias[...].astype(wide)
    norm: Any = part.norm
    if norm is None:
        return kernel, bias
    factor = norm.scale[...].astype(wide) * jax.lax.rsqrt(norm.var[...].astype(wide) + norm.epsilon)
    return kernel * factor, (bias - norm.mean[...].astype(wide)) * factor + norm.bias[...].astype(wide)


def merged_branches(model: nnx.Module) -> nnx.Module:
    """A copy of a model for inference, each `DilatedReparamConv` in it merged."""
    model = nnx.clone(model)
    for _, part in nnx.iter_modules(model):
        for name, child in list(vars(part).items()):
            if isinstance(child, DilatedReparamConv) and not child.merged:
                setattr(part, name, child.merge())
    return model
