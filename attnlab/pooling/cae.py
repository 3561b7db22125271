"""The attentive probe of the context autoencoder, CAE (Chen et al., 2022, arXiv:2202.03026).

    y = (softmax(q_h k_hᵀ / √D) v_h) W_o,   q = LN_q(t) W_q,  k = LN_k(x) W_k,  v = LN_v(x) W_v

One learned token t; three layer norms; no residual and no feed-forward. With biases, only queries and values have one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Pooling, record
from attnlab.nn.cross_attention import CrossAttention
from attnlab.nn.linear import uniform_init
from attnlab.nn.norms import LayerNorm
from attnlab.registry import Cost, Paper, Source, register


@register(
    "efficient_probing.cae",
    paper=Paper(
        "Context Autoencoder for Self-Supervised Representation Learning", "Chen et al.", 2022, arxiv="2202.03026"
    ),
    source=Source.AUTHORS_CODE,
    repository="billpsomas/efficient-probing",
    cost=Cost(time="O(N·C²)", memory="O(N·H)"),
    summary="cross-attention of one learned token, with a layer norm each for query, keys and values",
)
class CAEPooling(Pooling):
    """Tokens (B, N, C) to one vector (B, C). See the module docstring for the equations.

    Args:
      features: channels C of the tokens.
      num_heads: heads H.
      head_dim: D; C / H when None.
      use_bias: whether the maps to query and values have a bias.
      scale: of the scores; D^-1/2 when None.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the heads do not divide the channels and `head_dim` is not given.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 8,
        head_dim: int | None = None,
        use_bias: bool = False,
        scale: float | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.features = self.out_features = features
        self.dtype = dtype
        # The published code starts the token at zero, where its norm gives a query of zeros and no gradient through it.
        self.query = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (features,), param_dtype), logical_axes=("embed",)
        )
        self.norm_q = LayerNorm(features, eps=1e-5, **options)
        self.norm_k = LayerNorm(features, eps=1e-5, **options)
        self.norm_v = LayerNorm(features, eps=1e-5, **options)
        self.attention = CrossAttention(
            features,
            num_heads=num_heads,
            head_dim=head_dim,
            use_bias=use_bias,
            key_bias=False,
            scale=scale,
            kernel_init=uniform_init(features),
            **options,
        )

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        query = jnp.broadcast_to(self.norm_q(self.query[...].astype(x.dtype)), (x.shape[0], 1, self.features))
        y, weights = self.attention.with_weights(query, self.norm_k(x), self.norm_v(x), mask=mask)
        record(self, "attention", lambda: weights)
        return y[:, 0]
