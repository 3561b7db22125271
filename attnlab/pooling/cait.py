"""Class attention of CaiT (Touvron et al., 2021, arXiv:2103.17239), as a pooling.

A class token c reads the tokens, which stay as they are; `iterations` times:

    c = c + γ₁ ⊙ Attention(LN(c); LN([c; x]))        the class token is among the keys
    c = c + γ₂ ⊙ MLP(LN(c))

then y = LN(c). γ start at 1e-5.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Pooling, record
from attnlab.nn.cross_attention import CrossAttention
from attnlab.nn.linear import trunc_normal, uniform_init
from attnlab.nn.mlp import MLP, LayerScale
from attnlab.nn.norms import LayerNorm
from attnlab.pooling.parts import given_queries
from attnlab.registry import Cost, Paper, Source, register


class ClassAttentionBlock(nnx.Module):
    """One iteration: the class token (B, 1, C) and the tokens (B, N, C) to the class token.

    Args:
      features: channels C.
      num_heads: heads H.
      mlp_ratio: hidden channels of the feed-forward over C, rounded down.
      use_bias: whether the maps to queries, keys and values have a bias.
      scale: of the scores; D^-1/2 when None.
      init: γ at the start; None for none.
      norm_eps: of both norms.
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
        scale: float | None = None,
        init: float | None = 1e-5,
        norm_eps: float = 1e-6,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.norm1 = LayerNorm(features, eps=norm_eps, **options)
        self.attention = CrossAttention(
            features,
            num_heads=num_heads,
            use_bias=use_bias,
            scale=scale,
            kernel_init=uniform_init(features),
            **options,
        )
        self.norm2 = LayerNorm(features, eps=norm_eps, **options)
        self.mlp = MLP(features, int(mlp_ratio * features), **options)
        self.scale1, self.scale2 = (
            nnx.data(None) if init is None else LayerScale(features, init=init, **options) for _ in range(2)
        )

    def __call__(self, cls: jax.Array, x: jax.Array, *, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """The new class token, and the weights (B, H, 1, N + 1), the class token's own first."""
        keys = self.norm1(jnp.concatenate([cls, x], 1))
        seen = None if mask is None else jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
        y, weights = self.attention.with_weights(keys[:, :1], keys, mask=seen)
        cls = cls + (y if self.scale1 is None else self.scale1(y))
        y = self.mlp(self.norm2(cls))
        return cls + (y if self.scale2 is None else self.scale2(y)), weights


@register(
    "efficient_probing.cait",
    paper=Paper("Going deeper with Image Transformers", "Touvron et al.", 2021, arxiv="2103.17239"),
    source=Source.AUTHORS_CODE,
    repository="billpsomas/efficient-probing",
    cost=Cost(time="O(N·C²)", memory="O(N·H)"),
    summary="a class token attends to itself and to the tokens, with layer scale and a feed-forward",
)
class CaiTPooling(Pooling):
    """Tokens (B, N, C) to one vector (B, C). See the module docstring for the equations.

    Args:
      features: channels C of the tokens.
      num_heads: heads H.
      iterations: class attention blocks, each with its own weights.
      mlp_ratio: hidden channels of the feed-forward over C.
      use_bias: whether the maps to queries, keys and values have a bias.
      scale: of the scores; D^-1/2 when None.
      init_scale: γ at the start.
      norm_eps: of the norm behind the blocks.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the heads do not divide the channels, or `iterations` is less than 1.
    """

    accepts = frozenset({"mask", "queries"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 4,
        iterations: int = 1,
        mlp_ratio: float = 4.0,
        use_bias: bool = True,
        scale: float | None = None,
        init_scale: float = 1e-5,
        norm_eps: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        self.features = self.out_features = features
        self.dtype = dtype
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.blocks = nnx.List(
            ClassAttentionBlock(
                features,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                use_bias=use_bias,
                scale=scale,
                init=init_scale,
                **options,
            )
            for _ in range(iterations)
        )
        self.norm = LayerNorm(features, eps=norm_eps, **options)
        self.cls = nnx.Param(trunc_normal(rngs.params(), (features,), param_dtype), logical_axes=("embed",))

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        """Pools. `queries` (B, 1, C), for example class tokens of an encoder, stand in for the learned one.

        Recorded are the last block's weights of the N tokens; what they lack to 1 is the class token's own share.
        """
        if queries is None:
            cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (x.shape[0], 1, self.features))
        else:
            cls = given_queries(queries, x, 1)
        for block in self.blocks:
            cls, weights = block(cls, x, mask=mask)
        record(self, "attention", lambda: weights[..., 1:])
        return self.norm(cls)[:, 0]
