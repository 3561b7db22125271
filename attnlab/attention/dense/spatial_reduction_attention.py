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
from jax.typing import ArrayLike

from attnlab.contract import Layout, Site, TokenMixer, record
from attnlab.nn.linear import Conv, Linear
from attnlab.nn.norms import LayerNorm
from attnlab.nn.softmax import attention_weights, softmax_attention
from attnlab.nn.windows import spread_map
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
class SpatialReductionAttention(TokenMixer):
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
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
        if reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {reduction}")
        self.features, self.num_heads, self.reduction, self.scale = features, num_heads, reduction, scale
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = Linear(features, features, use_bias=qkv_bias, axes=("embed", "heads"), **common)
        self.key_value = Linear(features, 2 * features, use_bias=qkv_bias, axes=("embed", "heads"), **common)
        self.projection = Linear(features, features, axes=("heads", "embed"), **common)
        self.reduce = self.reduce_norm = nnx.data(None)
        if reduction > 1:
            stride = (reduction, reduction)
            self.reduce = Conv(features, features, stride, strides=stride, padding="VALID", **common)
            self.reduce_norm = LayerNorm(features, eps=1e-5, param_dtype=param_dtype, rngs=rngs)
        self.attention_dropout = attention_dropout
        self.dropout_rngs = rngs["dropout"].fork() if attention_dropout > 0 else nnx.data(None)
        self.dropout = nnx.Dropout(projection_dropout, rngs=rngs) if projection_dropout > 0 else nnx.data(None)

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        """A reduction by 2 where the grid allows it."""
        even = site.grid is not None and len(site.grid) == 2 and not any(length % 2 for length in site.grid)
        return {"reduction": 2 if even else 1}

    def __call__(
        self,
        x: ArrayLike,
        context: ArrayLike | None = None,
        *,
        mask: ArrayLike | None = None,
        segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
        positions: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        self.check_call(x, context=context, mask=mask, segment_ids=segment_ids, positions=positions)
        x = jnp.asarray(x)
        if x.shape[1] % self.reduction or x.shape[2] % self.reduction:
            raise ValueError(f"reduction {self.reduction} does not divide the image of shape {x.shape}")
        source = x if self.reduce is None else self.reduce_norm(self.reduce(x))
        batch, size = x.shape[0], self.features // self.num_heads
        q = self.query(x).reshape(batch, -1, self.num_heads, size)
        kv = self.key_value(source).reshape(batch, -1, 2, self.num_heads, size)
        k, v = kv[:, :, 0], kv[:, :, 1]
        key_grid = source.shape[1:3]
        record(
            self,
            "attention",
            lambda: spread_map(attention_weights(q, k, scale=self.scale), key_grid, self.reduction),
        )
        dropout = {}
        if not deterministic and self.dropout_rngs is not None:
            dropout = {"dropout_rate": self.attention_dropout, "dropout_key": self.dropout_rngs()}
        y = self.projection(softmax_attention(q, k, v, scale=self.scale, **dropout).reshape(x.shape))
        return y if self.dropout is None else self.dropout(y, deterministic=deterministic)
