"""The attentive probe of AIM (El-Nouby et al., 2024, arXiv:2401.08541).

    x̂ = (x - mean) / √(variance + 1e-6)             per channel, over batch and tokens; running statistics at inference
    y = mean_q softmax(q_h k_hᵀ / √D) v_h,   k = x̂ W_k,  v = x̂ W_v

Learned queries are used unprojected, and nothing follows the attention: Q·C + 2C² weights, O(N·C²) time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Pooling, record
from attnlab.nn.heads import split_heads
from attnlab.nn.linear import Linear, uniform_init
from attnlab.nn.norms import BatchNorm
from attnlab.nn.softmax import softmax_attention
from attnlab.pooling.parts import given_queries, head_size, mean
from attnlab.registry import Cost, Paper, Source, register


@register(
    "efficient_probing.aim",
    paper=Paper(
        "Scalable Pre-training of Large Autoregressive Image Models", "El-Nouby et al.", 2024, arxiv="2401.08541"
    ),
    source=Source.AUTHORS_CODE,
    repository="billpsomas/efficient-probing",
    cost=Cost(time="O(N·C² + N·Q·C)", memory="O(N·Q·H)"),
    summary="multi-head cross-attention of learned queries to batch-normalised tokens, averaged over the queries",
)
class AIMPooling(Pooling):
    """Tokens (B, N, C) to one vector (B, C). See the module docstring for the equations.

    Args:
      features: channels C of the tokens.
      num_heads: heads H.
      num_queries: learned queries Q.
      use_bias: whether the maps to keys and values have a bias.
      scale: of the scores; D^-1/2 when None.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the heads do not divide the channels.
    """

    accepts = frozenset({"mask", "queries"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 12,
        num_queries: int = 1,
        use_bias: bool = False,
        scale: float | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        head_dim = head_size(features, num_heads)
        self.features = self.out_features = features
        self.num_heads, self.num_queries, self.dtype = num_heads, num_queries, dtype
        self.scale = head_dim**-0.5 if scale is None else scale
        init = uniform_init(features)
        options = {"param_dtype": param_dtype, "rngs": rngs}
        maps = {"use_bias": use_bias, "axes": ("embed", "heads"), "kernel_init": init, "bias_init": init} | options
        self.queries = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (num_queries, features), param_dtype), logical_axes=(None, "embed")
        )
        self.norm = BatchNorm(features, eps=1e-6, use_affine=False, **options)
        self.k = Linear(features, features, **maps)
        self.v = Linear(features, features, **maps)

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        """Pools. `queries` (B, Q, C) of the caller, for example class tokens, stand in for the learned ones."""
        if queries is None:
            queries = jnp.broadcast_to(self.queries[...].astype(x.dtype), (x.shape[0], *self.queries.shape))
        else:
            queries = given_queries(queries, x, self.num_queries)
        x = self.norm(x, deterministic=deterministic, mask=mask)
        q, k, v = (split_heads(a, self.num_heads) for a in (queries, self.k(x), self.v(x)))
        y, weights = softmax_attention(q, k, v, mask=mask, scale=self.scale, return_weights=True)
        record(self, "attention", lambda: weights)
        return mean(y, 1).reshape(x.shape[0], -1)
