"""The attention pooling head of SigLIP (Zhai et al., 2023, arXiv:2303.15343).

    z = Attention(t; x) W_o             t learned latents; q, k, v with bias
    y = z + MLP(norm(z))                norm is the identity in the probe; a layer norm with `use_norm`

The head is that of Zhai et al. (2022, arXiv:2106.04560), after the set transformer. Of several latents the first is
kept, or their mean, or all, side by side.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Pooling, record
from attnlab.nn.cross_attention import CrossAttention
from attnlab.nn.linear import uniform_init
from attnlab.nn.mlp import MLP
from attnlab.nn.norms import LayerNorm
from attnlab.pooling.parts import mean
from attnlab.registry import Cost, Paper, Source, register


@register(
    "efficient_probing.siglip",
    paper=Paper("Sigmoid Loss for Language Image Pre-Training", "Zhai et al.", 2023, arxiv="2303.15343"),
    source=Source.AUTHORS_CODE,
    repository="billpsomas/efficient-probing",
    cost=Cost(time="O(N·C²)", memory="O(N·L·H)"),
    summary="cross-attention of learned latents to the tokens, then a residual feed-forward",
)
class SigLIPPooling(Pooling):
    """Tokens (B, N, C) to one vector (B, C), or (B, L·C). See the module docstring for the equations.

    Args:
      features: channels C of the tokens.
      num_heads: heads H.
      num_latents: learned latents L.
      reduce: what becomes of them: "first", "mean", or "all", side by side.
      mlp_ratio: hidden channels of the feed-forward over C.
      use_bias: whether the maps to queries, keys and values have a bias.
      use_norm: whether the feed-forward reads normalised latents (eps 1e-5).
      qk_norm: whether queries and keys are normalised in each head (eps 1e-5).
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the heads do not divide the channels, or `reduce` is none of those named.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 8,
        num_latents: int = 1,
        reduce: Literal["first", "mean", "all"] = "first",
        mlp_ratio: float = 4.0,
        use_bias: bool = True,
        use_norm: bool = False,
        qk_norm: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if reduce not in ("first", "mean", "all"):
            raise ValueError(f"reduce must be 'first', 'mean' or 'all', got {reduce!r}")
        self.features, self.reduce, self.dtype = features, reduce, dtype
        self.out_features = num_latents * features if reduce == "all" else features
        options = {"param_dtype": param_dtype, "rngs": rngs}
        init = nnx.initializers.truncated_normal(stddev=features**-0.5)
        self.latents = nnx.Param(
            init(rngs.params(), (num_latents, features), param_dtype), logical_axes=(None, "embed")
        )
        self.attention = CrossAttention(
            features,
            num_heads=num_heads,
            use_bias=use_bias,
            qk_norm=qk_norm,
            kernel_init=uniform_init(features),
            **options,
        )
        self.norm = LayerNorm(features, eps=1e-5, **options) if use_norm else nnx.data(None)
        self.mlp = MLP(features, int(mlp_ratio * features), **options)

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        z = self.pool_branches(x, queries, mask, deterministic)
        return mean(z, 1) if self.reduce == "mean" else z.reshape(z.shape[0], -1)

    def pool_branches(
        self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        # Latents do not see one another: those that are not read need not be computed.
        latents = self.latents[:1] if self.reduce == "first" else self.latents[...]
        z, weights = self.attention.with_weights(
            jnp.broadcast_to(latents.astype(x.dtype), (x.shape[0], *latents.shape)), x, mask=mask
        )
        record(self, "attention", lambda: weights)
        return z + self.mlp(z if self.norm is None else self.norm(z))
