"""Toeplitz positions along the axes of a grid (Qin et al., 2024, arXiv:2405.21022: TPE and MD-TPE).

Tokens tell their places by what they mix with. Along each axis, a causal exponential kernel per head:

    u_t = Σ_{s ≤ t} (q_h·k_h) λ_h^(t-s) x_s,   λ_h = sigmoid(γ_h)        y = Σ_axes rms_norm(u) W_o

with learned constants q and k of C channels, in H heads. What comes out is added to the tokens before the first block.
Cost O(N·C) per axis.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.heads import merge_heads, split_heads
from attnlab.nn.linear import Linear
from attnlab.nn.norms import RMSNorm
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.linear_attention import linear_attention


class AxisToeplitz(nnx.Module):
    """The kernel along one axis, with norm and map; arguments as `ToeplitzPositions`."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        eps: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % num_heads:
            raise ValueError(f"features {features} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        draw = nnx.initializers.normal(1.0)
        self.query, self.key = (
            nnx.Param(draw(rngs.params(), (features,), param_dtype), logical_axes=("embed",)) for _ in range(2)
        )
        self.log_decay = nnx.Param(draw(rngs.params(), (num_heads,), param_dtype), logical_axes=("heads",))
        self.norm = RMSNorm(features, eps=eps, param_dtype=param_dtype, rngs=rngs)
        self.out = Linear(features, features, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(B, N, C)` to the same shape."""
        query, key, decay = (jnp.asarray(p[...], jnp.float32) for p in (self.query, self.key, self.log_decay))
        strength = split_heads(query * key, self.num_heads).sum(-1)
        v = split_heads(x, self.num_heads).astype(at_least_float32(x.dtype))
        ones = jnp.ones((*v.shape[:3], 1), v.dtype)
        u = linear_attention(ones * strength[:, None].astype(v.dtype), ones, v, log_decay=jax.nn.log_sigmoid(decay))
        return self.out(self.norm(merge_heads(u)).astype(x.dtype))


class ToeplitzPositions(nnx.Module):
    """Positions `(B, *S, C)` of tokens `(B, *S, C)`, to be added to them; see the module docstring.

    Args:
      features: channels C.
      num_heads: heads H, each with a kernel of its own.
      axes: along which, as negative axes of the tokens: `(-2,)` for a sequence, `(-2, -3)` for an image.
      eps: of the norms.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the heads do not divide the channels, or an axis is not negative or that of the channels.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        axes: Sequence[int] = (-2,),
        eps: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not axes or max(axes) > -2:
            raise ValueError(f"axes must be at most -2, the axis before the channels, got {tuple(axes)}")
        self.axes, self.dtype = tuple(axes), dtype
        common = {"eps": eps, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.along = nnx.List([AxisToeplitz(features, num_heads, **common) for _ in self.axes])

    def __call__(self, x: ArrayLike) -> jax.Array:
        """`(B, *S, C)` to the same shape."""
        x = jnp.asarray(x, self.dtype)
        total = jnp.zeros_like(x)
        for axis, part in zip(self.axes, self.along, strict=True):
            moved = jnp.moveaxis(x, axis, -2)
            y = part(moved.reshape(-1, *moved.shape[-2:])).reshape(moved.shape)
            total = total + jnp.moveaxis(y, -2, axis)
        return total
