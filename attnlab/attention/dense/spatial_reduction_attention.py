"""Spatial-reduction attention of the Pyramid Vision Transformer (Wang et al., ICCV 2021, arXiv:2102.12122).

Softmax attention of all tokens of an image on a smaller image of keys and values:

    X' = LayerNorm(Conv_{r x r, stride r}(X))     (M, C), M = N / r²
    Y  = softmax(Q K'ᵀ / √D) V',   K', V' = X' W_k, X' W_v

With r = 1 it is plain softmax attention. Cost O(N·M·C) time, O(N·M·H) memory.

Reference for names and defaults: whai362/PVT.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Given, Layout, Pattern, Site, View, record
from attnlab.nn.dense_mixer import Core, DenseMixer, Heads, HeadSizes
from attnlab.nn.grids import to_tokens
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.reduction import SpatialReduction, check_reduction
from attnlab.nn.softmax_core import SoftmaxCore
from attnlab.points import visit
from attnlab.registry import Cost, Paper, Source, register


@register(
    "spatial_reduction_attention",
    paper=Paper(
        "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions",
        "Wang et al.",
        2021,
        "2102.12122",
    ),
    source=Source.PAPER_TEXT,
    repository="whai362/PVT",
    cost=Cost(time="O(N·M·C)", memory="O(N·M·H)"),
    summary="softmax attention on keys and values from a strided convolution of the image",
)
class SpatialReductionAttention(DenseMixer):
    """Softmax attention of an image on a reduced image, with its projections.

    The recorded map spreads the weight of each reduced key evenly over the tokens that it was made of.

    Args:
      features: channels C.
      num_heads: H.
      reduction: r, the stride of the convolution, which must divide rows and columns; 1 for none.
      scale: of the scores, D^-1/2 when None.
      qkv_bias: whether queries, keys and values have a bias.
      attention_dropout: rate on the weights.
      projection_dropout: rate on the result.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the heads do not divide the channels, or `reduction` is less than 1.
    """

    patterns = frozenset({Pattern.SELF})
    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        reduction: int = 1,
        scale: float | None = None,
        qkv_bias: bool = True,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.sizes = groups, size, _ = HeadSizes.of(features, num_heads)
        if reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {reduction}")
        self.features, self.num_heads, self.reduction, self.dtype = features, num_heads, reduction, dtype
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query, self.key, self.value = (
            ToHeads(features, groups, size, use_bias=qkv_bias, **common) for _ in range(3)
        )
        self.out = FromHeads(num_heads, size, features, **common)
        self.reduce = SpatialReduction(features, reduction, **common) if reduction > 1 else nnx.data(None)
        self.dropout = nnx.Dropout(projection_dropout, rngs=rngs) if projection_dropout > 0 else nnx.data(None)
        self.set_core(SoftmaxCore(num_heads, scale=scale, dropout=attention_dropout, rngs=rngs))

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        """A reduction by 2 where the grid allows it."""
        even = site.grid is not None and len(site.grid) == 2 and not any(length % 2 for length in site.grid)
        return {"reduction": 2 if even else 1}

    def set_core(self, core: Core) -> None:
        super().set_core(core)
        # Keys are no tokens: nothing that speaks of tokens as keys reaches the core.
        self.accepts, self.points = frozenset(), frozenset({"qkv", "heads"})

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        tokens, grid = to_tokens(x), x.shape[1:3]
        check_reduction(self.reduction, grid)
        source = tokens if self.reduce is None else self.reduce(tokens, grid)
        heads = visit(self, given.edits, "qkv", self.project(tokens, source, given))
        record(self, "attention", lambda: self._map(heads, grid))
        y, _ = self.core(heads, View(), deterministic=given.deterministic)
        y = visit(self, given.edits, "heads", y)
        return self.merge(y, tokens, deterministic=given.deterministic).reshape(x.shape)

    def project(self, x: jax.Array, source: jax.Array, given: Given) -> Heads:
        return Heads(self.query(x), self.key(source), self.value(source))

    def merge(self, y: jax.Array, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        y = self.out(y)
        return y if self.dropout is None else self.dropout(y, deterministic=deterministic)

    def _map(self, heads: Heads, grid: tuple[int, int]) -> jax.Array:
        weights = self.core.attention(heads, View())
        return weights if self.reduce is None else self.reduce.spread(weights, grid)
