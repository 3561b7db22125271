"""The attentional pooling of CoCa (Yu et al., 2022, arXiv:2205.01917), as in lucidrains/CoCa-pytorch.

    q_h = LN(t) W_q,h,   k, v = x W_kv                  queries t learned; one head of keys and values for all H
    y   = [softmax(q_h kᵀ / √D) v]_h W_o  (+ SwiGLU(LN(t)))

Of the learned queries (256 in the paper, for its captioner) the first is the image's vector, the one computed here.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Pooling, record
from attnlab.nn.linear import Linear, uniform_init
from attnlab.nn.norms import LayerNorm
from attnlab.nn.softmax import softmax_attention
from attnlab.registry import Cost, Paper, Source, register


@register(
    "efficient_probing.coca",
    paper=Paper("CoCa: Contrastive Captioners are Image-Text Foundation Models", "Yu et al.", 2022, arxiv="2205.01917"),
    source=Source.AUTHORS_CODE,
    repository="billpsomas/efficient-probing",
    cost=Cost(time="O(N·C·D + N·H·D)", memory="O(N·H)"),
    summary="multi-query cross-attention: many heads of a learned query share one head of keys and values",
)
class CoCaPooling(Pooling):
    """Tokens (B, N, C) to one vector (B, out_features). See the module docstring for the equations.

    Args:
      features: channels C of the tokens.
      num_heads: heads H of the query.
      head_dim: D.
      num_queries: learned queries; only the first is read.
      out_features: channels of the queries and of the result; C when None.
      context_norm: whether the tokens are normalised first.
      feed_forward: whether a SwiGLU feed-forward of the query is added to the attention.
      mlp_ratio: its hidden channels over `out_features`.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    accepts = frozenset({"mask", "queries"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 8,
        head_dim: int = 64,
        num_queries: int = 196,
        out_features: int | None = None,
        context_norm: bool = False,
        feed_forward: bool = False,
        mlp_ratio: float = 4,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        width = features if out_features is None else out_features
        self.features, self.out_features, self.num_heads, self.dtype = features, width, num_heads, dtype
        self.scale = head_dim**-0.5
        self.queries = nnx.Param(
            jax.random.normal(rngs.params(), (num_queries, width), param_dtype), logical_axes=(None, "embed")
        )

        def linear(inputs: int, outputs: int, axes: tuple[str, str]) -> Linear:
            init = uniform_init(inputs)
            return Linear(
                inputs, outputs, use_bias=False, axes=axes, kernel_init=init, param_dtype=param_dtype, rngs=rngs
            )

        norm = {"eps": 1e-5, "use_bias": False, "param_dtype": param_dtype, "rngs": rngs}
        self.norm = LayerNorm(width, **norm)
        self.context_norm = LayerNorm(features, **norm) if context_norm else nnx.data(None)
        self.q = linear(width, num_heads * head_dim, ("embed", "heads"))
        self.kv = linear(features, 2 * head_dim, ("embed", None))
        self.out = linear(num_heads * head_dim, width, ("heads", "embed"))
        hidden = int(mlp_ratio * width)
        self.mlp_in = linear(width, 2 * hidden, ("embed", "mlp")) if feed_forward else nnx.data(None)
        self.mlp_out = linear(hidden, width, ("mlp", "embed")) if feed_forward else nnx.data(None)

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        """Pools. The first of `queries` (B, Q, out_features) of the caller stands in for the first learned one.

        Raises:
          ValueError: if `x` or `queries` has another shape.
        """
        batch = x.shape[0]
        if queries is None:
            query = jnp.broadcast_to(self.queries[0].astype(x.dtype), (batch, self.out_features))
        else:
            shape = jnp.shape(queries)
            if len(shape) != 3 or shape[0] != batch or shape[2] != self.out_features:
                raise ValueError(f"queries must have shape ({batch}, Q, {self.out_features}), got {shape}")
            query = queries[:, 0]
        query = self.norm(query)
        x = x if self.context_norm is None else self.context_norm(x)
        k, v = jnp.split(self.kv(x)[:, :, None], 2, axis=-1)
        q = self.q(query).reshape(batch, 1, self.num_heads, -1)
        y, weights = softmax_attention(q, k, v, mask=mask, scale=self.scale, return_weights=True)
        record(self, "attention", lambda: weights)
        y = self.out(y.reshape(batch, -1))
        if self.mlp_in is None:
            return y
        inner, gate = jnp.split(self.mlp_in(query), 2, axis=-1)
        return y + self.mlp_out(jax.nn.silu(gate) * inner)
