"""Linear maps into heads and out of them, as arrays with an axis for the heads.

The head axis is the one that is cut over devices, so that a device always has whole heads: between the two maps nothing
is exchanged, and the second leaves one all-reduce. (A fused map to queries, keys and values, or one whose heads are
flattened into channels, is cut in the middle of a head or of the three.)
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.linear import Conv, Linear, compute_in_input_dtype, uniform_init

_into = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=0, out_axis=(1, 2))
_out_of = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1), out_axis=2)


class ToHeads(nnx.Module):
    """Affine map into heads: `(…, C)` to `(…, H, D)`.

    Args:
      in_features: channels C that come in.
      num_heads: heads H.
      head_dim: head size D.
      use_bias: whether a bias `(H, D)` is added.
      kernel_init: of the kernel `(C, H, D)`; normal with variance 1 / C unless given.
      bias_init: of the bias.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_dim: int,
        *,
        use_bias: bool = True,
        kernel_init: nnx.Initializer = _into,
        bias_init: nnx.Initializer = nnx.initializers.zeros,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.in_features, self.num_heads, self.head_dim, self.dtype = in_features, num_heads, head_dim, dtype
        kernel = kernel_init(rngs.params(), (in_features, num_heads, head_dim), param_dtype)
        self.kernel = nnx.Param(kernel, logical_axes=("embed", "heads", None))
        self.bias = nnx.data(None)
        if use_bias:
            bias = bias_init(rngs.params(), (num_heads, head_dim), param_dtype)
            self.bias = nnx.Param(bias, logical_axes=("heads", None))

    def __call__(self, x: ArrayLike) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = compute_in_input_dtype((x, self.kernel[...], bias), dtype=self.dtype)
        y = jnp.einsum("...c,chd->...hd", x, kernel)
        return y if bias is None else y + bias


class FromHeads(nnx.Module):
    """Affine map out of heads: `(…, H, E)` to `(…, C)`, summed over all heads.

    Args:
      num_heads: heads H.
      head_dim: head size E.
      features: channels C that go out.
      use_bias: whether a bias `(C,)` is added.
      kernel_init: of the kernel `(H, E, C)`; normal with variance 1 / (H·E) unless given.
      bias_init: of the bias.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        features: int,
        *,
        use_bias: bool = True,
        kernel_init: nnx.Initializer = _out_of,
        bias_init: nnx.Initializer = nnx.initializers.zeros,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.head_dim, self.features, self.dtype = num_heads, head_dim, features, dtype
        kernel = kernel_init(rngs.params(), (num_heads, head_dim, features), param_dtype)
        self.kernel = nnx.Param(kernel, logical_axes=("heads", None, "embed"))
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (features,), param_dtype), logical_axes=("embed",))

    def __call__(self, y: ArrayLike) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        y, kernel, bias = compute_in_input_dtype((y, self.kernel[...], bias), dtype=self.dtype)
        x = jnp.einsum("...hd,hdc->...c", y, kernel)
        return x if bias is None else x + bias


class WithinHeads(nnx.Module):
    """Affine map inside each head, heads apart: `(…, H, D)` to `(…, H, E)`; a grouped convolution of size one.

    Args:
      num_heads: heads H.
      in_dim: head size D that comes in.
      out_dim: head size E that goes out.
      use_bias: whether a bias `(H, E)` is added.
      kernel_init: of the kernel `(H, D, E)`; uniform in ±1/√D unless given.
      bias_init: of the bias; the same.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        num_heads: int,
        in_dim: int,
        out_dim: int,
        *,
        use_bias: bool = True,
        kernel_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.in_dim, self.out_dim, self.dtype = num_heads, in_dim, out_dim, dtype
        init = uniform_init(in_dim)
        kernel = (init if kernel_init is None else kernel_init)(
            rngs.params(), (num_heads, in_dim, out_dim), param_dtype
        )
        self.kernel = nnx.Param(kernel, logical_axes=("heads", None, None))
        self.bias = nnx.data(None)
        if use_bias:
            bias = (init if bias_init is None else bias_init)(rngs.params(), (num_heads, out_dim), param_dtype)
            self.bias = nnx.Param(bias, logical_axes=("heads", None))

    def __call__(self, x: ArrayLike) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = compute_in_input_dtype((x, self.kernel[...], bias), dtype=self.dtype)
        y = jnp.einsum("...hd,hde->...he", x, kernel)
        return y if bias is None else y + bias


def merge_heads(y: jax.Array) -> jax.Array:
    """`(…, H, E)` to `(…, H·E)`: heads one after the other as channels."""
    return y.reshape(*y.shape[:-2], -1)


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """`(…, H·D)` to `(…, H, D)`, the inverse of `merge_heads`."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def redraw_kernels(module: nnx.Module, init: nnx.Initializer, *, convolutions: bool = False, rngs: nnx.Rngs) -> None:
    """Draws the kernels of all linear maps in a module anew: of `Linear`, and of `ToHeads` and `FromHeads`.

    With `convolutions` also those of `Conv` and `DepthwiseConv`, whose biases become zero. For models whose authors fix
    one initialiser, commonly `trunc_normal`; the defaults follow the width instead, since 0.02 is too little for narrow
    models.
    """
    for _, part in nnx.iter_modules(module):
        if isinstance(part, Linear | ToHeads | FromHeads):
            part.kernel[...] = init(rngs.params(), part.kernel.shape, part.kernel.dtype)
        elif convolutions and isinstance(part, Conv | DepthwiseConv):
            part.kernel[...] = init(rngs.params(), part.kernel.shape, part.kernel.dtype)
            if part.bias is not None:
                part.bias[...] = jnp.zeros_like(part.bias[...])
