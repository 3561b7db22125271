"""The attention pooling of CLIP's ResNets (Radford et al., 2021, arXiv:2103.00020).

    z = [mean_n LN(x); LN(x)] + e                    N + 1 tokens, e learned, one row per position
    y = MultiHeadAttention(z)_0                      q, k, v with bias; scale D^-1/2; output projection

Only the row of the mean token is kept, so only its query is computed: O(N·C²), never quadratic in N.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Pooling, Site, UnsupportedArgument, record
from attnlab.nn.cross_attention import CrossAttention
from attnlab.nn.norms import LayerNorm
from attnlab.pooling.parts import given_queries, token_mean
from attnlab.registry import Cost, Paper, Source, register


@register(
    "efficient_probing.clip",
    paper=Paper(
        "Learning Transferable Visual Models From Natural Language Supervision",
        "Radford et al.",
        2021,
        arxiv="2103.00020",
    ),
    source=Source.AUTHORS_CODE,
    repository="billpsomas/efficient-probing",
    cost=Cost(time="O(N·C²)", memory="O(N·H)"),
    summary="the mean token, with learned positions, attends to itself and to the tokens",
)
class CLIPPooling(Pooling):
    """Tokens (B, N, C) of a fixed grid to one vector (B, out_features). See the module docstring for the equations.

    Args:
      features: channels C of the tokens.
      grid: lengths of the token axes; N is their product.
      num_heads: heads H.
      embed_features: channels of the attention, H·D; C when None.
      out_features: channels of the result; C when None.
      use_bias: whether the maps to queries, keys and values have a bias.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the heads do not divide the channels of the attention.
    """

    accepts = frozenset({"mask", "queries"})

    def __init__(
        self,
        features: int,
        *,
        grid: tuple[int, ...],
        num_heads: int = 4,
        embed_features: int | None = None,
        out_features: int | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        embed_features = features if embed_features is None else embed_features
        if embed_features % num_heads:
            raise ValueError(f"num_heads must divide embed_features {embed_features}, got {num_heads}")
        self.features, self.dtype = features, dtype
        self.out_features = features if out_features is None else out_features
        self.num_tokens = math.prod(grid)
        init = nnx.initializers.truncated_normal(stddev=features**-0.5)
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.positions = nnx.Param(
            init(rngs.params(), (self.num_tokens + 1, features), param_dtype), logical_axes=(None, "embed")
        )
        self.norm = LayerNorm(features, eps=1e-6, **options)
        self.attention = CrossAttention(
            features,
            num_heads=num_heads,
            head_dim=embed_features // num_heads,
            out_features=self.out_features,
            use_bias=use_bias,
            kernel_init=init,
            **options,
        )

    @classmethod
    def check_site(cls, site: Site) -> None:
        if site.grid is None:
            raise UnsupportedArgument("CLIPPooling has one learned position per token: the site must say its grid")

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        """Pools. `queries` (B, 1, C), for example class tokens, stand in for the mean token; they are not normalised.

        The recorded weights are those of the N tokens; what they lack to 1 is the share of the mean token itself.
        """
        if x.shape[1] != self.num_tokens:
            raise ValueError(f"CLIPPooling was built for {self.num_tokens} tokens, got x of shape {x.shape}")
        x = self.norm(x)
        if queries is None:
            first = token_mean(x, mask, keepdims=True)
        else:
            first = given_queries(queries, x, 1)
        z = jnp.concatenate([first, x], 1) + self.positions[...].astype(x.dtype)
        seen = None if mask is None else jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
        y, weights = self.attention.with_weights(z[:, :1], z, mask=seen)
        record(self, "attention", lambda: weights[..., 1:])
        return y[:, 0]
