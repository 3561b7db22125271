"""A class token that alone reads another stream: the fusion of CrossViT (Chen et al., 2021, arXiv:2103.14899).

    y = z_0 + softmax(q_0 Kᵀ / √D) V W_o,    q_0, K, V = LN(z_0) W_q, LN(z) W_k, LN(z) W_v

z_0, in front of z, is the class token, which is among the keys. There is no feed-forward. Cost O(N·C) for one query.
`attnlab.models.crossvit` is built of it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.activations import gelu
from attnlab.nn.cross_attention import CrossAttention
from attnlab.nn.linear import Linear
from attnlab.nn.mlp import DropPath
from attnlab.nn.norms import LayerNorm


class ClassCrossAttention(nnx.Module):
    """The class token in front reads all tokens, itself among them: `(B, 1 + N, C)` to `(B, 1, C)`.

    Args:
      features: channels C.
      num_heads: heads H.
      qkv_bias: whether queries, keys and values have a bias.
      scale: of the scores; D^-1/2 when None.
      attention_dropout: rate on the weights.
      dtype: of the computation; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        qkv_bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.attention = CrossAttention(
            features,
            num_heads=num_heads,
            use_bias=qkv_bias,
            scale=scale,
            dropout=attention_dropout,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """The class token's result alone."""
        x = jnp.asarray(x)
        return self.attention(x[:, :1], x, deterministic=deterministic)


class ClassFusion(nnx.Module):
    """x_0 + ClassCrossAttention(LN(x)): `(B, 1 + N, C)` to the class token `(B, 1, C)`, without a feed-forward.

    Args:
      features: channels C.
      num_heads: heads H.
      norm_eps: of the norm.
      drop_path: probability that the branch is dropped for an example in training.
      dtype: of the computation; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **attention: further arguments of `ClassCrossAttention`.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        self.norm = LayerNorm(features, eps=norm_eps, **stored)
        self.mixer = ClassCrossAttention(features, num_heads=num_heads, dtype=dtype, **attention, **stored)
        self.drop_path = DropPath(drop_path, rngs=rngs) if drop_path > 0 else nnx.data(None)

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        x = jnp.asarray(x)
        y = self.mixer(self.norm(x), deterministic=deterministic)
        return x[:, :1] + (y if self.drop_path is None else self.drop_path(y, deterministic=deterministic))


class NormedMap(nnx.Module):
    """W GELU(LN(x)), from one branch's width to another's."""

    def __init__(self, features: int, out_features: int, *, norm_eps: float, dtype: Any, **stored: Any):
        self.norm = LayerNorm(features, eps=norm_eps, **stored)
        self.linear = Linear(features, out_features, dtype=dtype, **stored)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(gelu(self.norm(x)))
