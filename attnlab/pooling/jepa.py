"""The attentive probe of V-JEPA (Bardes et al., 2024, arXiv:2404.08471).

    z = t + Attention(t; LN(x))         t learned queries, not normalised; k, v of the normalised tokens
    y = z + MLP(LN(z))

With `depth` above 1, ordinary blocks mix the queries afterwards, which says something only for more than one query.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Pooling, record
from attnlab.nn.cross_attention import CrossAttention
from attnlab.nn.linear import trunc_normal
from attnlab.nn.mlp import MLP
from attnlab.nn.norms import LayerNorm
from attnlab.pooling.block import SelfAttentionBlock
from attnlab.pooling.parts import given_queries
from attnlab.registry import Cost, Paper, Source, register


@register(
    "efficient_probing.jepa",
    paper=Paper(
        "Revisiting Feature Prediction for Learning Visual Representations from Video",
        "Bardes et al.",
        2024,
        arxiv="2404.08471",
    ),
    source=Source.AUTHORS_CODE,
    repository="billpsomas/efficient-probing",
    cost=Cost(time="O(N·C²)", memory="O(N·Q·H)"),
    summary="a cross-attention block with a residual and a feed-forward on a learned query",
)
class JEPAPooling(Pooling):
    """Tokens (B, N, C) to one vector (B, Q·C), the queries side by side. See the module docstring for the equations.

    Args:
      features: channels C of the tokens.
      num_heads: heads H.
      num_queries: learned queries Q.
      mlp_ratio: hidden channels of the feed-forwards over C.
      depth: 1, plus the number of blocks over the queries.
      use_bias: whether the maps to queries, keys and values have a bias.
      complete_block: False leaves the attention alone: no norms, no residual, no feed-forward.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the heads do not divide the channels, or `depth` is less than 1.
    """

    accepts = frozenset({"mask", "queries"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 12,
        num_queries: int = 1,
        mlp_ratio: float = 4.0,
        depth: int = 1,
        use_bias: bool = True,
        complete_block: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.features, self.out_features = features, num_queries * features
        self.num_queries, self.dtype = num_queries, dtype
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.queries = nnx.Param(
            trunc_normal(rngs.params(), (num_queries, features), param_dtype), logical_axes=(None, "embed")
        )
        self.attention = CrossAttention(
            features, num_heads=num_heads, use_bias=use_bias, kernel_init=trunc_normal, **options
        )
        _shrink(self.attention.out, 1)
        self.norm1 = self.norm2 = self.mlp = nnx.data(None)
        if complete_block:
            self.norm1 = LayerNorm(features, eps=1e-5, **options)
            self.norm2 = LayerNorm(features, eps=1e-5, **options)
            self.mlp = MLP(features, int(mlp_ratio * features), **options)
            _shrink(self.mlp.fc2, 1)
        self.blocks = nnx.List(
            SelfAttentionBlock(features, num_heads=num_heads, mlp_ratio=mlp_ratio, use_bias=use_bias, **options)
            for _ in range(depth - 1)
        )
        for layer, block in enumerate(self.blocks, 2):
            _shrink(block.attention.out, layer)
            _shrink(block.mlp.fc2, layer)

    def pool_branches(
        self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        """Pools. `queries` (B, Q, C) of the caller, for example class tokens, stand in for the learned ones."""
        if queries is None:
            q = jnp.broadcast_to(self.queries[...].astype(x.dtype), (x.shape[0], *self.queries.shape))
        else:
            q = given_queries(queries, x, self.num_queries)
        if self.mlp is None:
            q, weights = self.attention.with_weights(q, x, mask=mask)
        else:
            y, weights = self.attention.with_weights(q, self.norm1(x), mask=mask)
            q = q + y
            q = q + self.mlp(self.norm2(q))
        record(self, "attention", lambda: weights)
        for block in self.blocks:
            q, _ = block(q)
        return q


def _shrink(linear: nnx.Linear, layer: int) -> None:
    """Divides the last map of a residual branch by √(2·layer) at the start, so that depth does not add variance."""
    linear.kernel[...] = linear.kernel[...] / (2.0 * layer) ** 0.5
