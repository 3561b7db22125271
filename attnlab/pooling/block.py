"""The pre-norm transformer block that two of the poolings put over their tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.nn.cross_attention import CrossAttention
from attnlab.nn.linear import trunc_normal
from attnlab.nn.mlp import MLP
from attnlab.nn.norms import LayerNorm


class SelfAttentionBlock(nnx.Module):
    """x = x + attention(LN(x)); x = x + MLP(LN(x)), LN of eps 1e-5.

    Args:
      features: channels C.
      num_heads: heads H.
      mlp_ratio: hidden channels of the MLP over C.
      use_bias: whether the maps to queries, keys and values have a bias.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        mlp_ratio: float = 4.0,
        use_bias: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.norm1 = LayerNorm(features, eps=1e-5, **options)
        self.attention = CrossAttention(
            features, num_heads=num_heads, use_bias=use_bias, kernel_init=trunc_normal, **options
        )
        self.norm2 = LayerNorm(features, eps=1e-5, **options)
        self.mlp = MLP(features, int(mlp_ratio * features), **options)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Tokens (B, N, C) and the weights (B, H, N, N); `mask` (B, N) says which tokens exist."""
        normed = self.norm1(x)
        y, weights = self.attention.with_weights(normed, normed, mask=mask)
        x = x + y
        return x + self.mlp(self.norm2(x)), weights
