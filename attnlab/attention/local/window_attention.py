"""Window attention of the Swin Transformer (Liu et al., ICCV 2021, arXiv:2103.14030).

An image is tiled by windows of w x w tokens, and softmax attention runs inside each, with a learned bias for each
offset between two tokens:

    Y = softmax(Q Kᵀ / √D + B) V,    B[i, j] = table[(r_i - r_j, c_i - c_j)]     (H, n, n), n = w²

In every other layer the windows are shifted cyclically by half a window, and tokens that were not neighbours before
the shift do not see each other. Cost O(N·n·C) time, O(N·n·H) memory. The authors' code adds -100 to the scores of
such pairs; here their weights are exactly zero.

Reference for names and defaults: microsoft/Swin-Transformer.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, Site, TokenMixer, record
from attnlab.nn.linear import Linear
from attnlab.nn.positions import RelativePositionBias
from attnlab.nn.softmax import attention_weights, softmax_attention
from attnlab.nn.windows import ShiftedWindows
from attnlab.registry import Cost, Paper, Source, register


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    same_region: np.ndarray | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention inside windows.

    Args:
      q: queries, `(B·W, n, H, D)`: windows of an example follow each other.
      k: keys, `(B·W, n, H, D)`.
      v: values, `(B·W, n, H, E)`.
      bias: added to the scores, `(H, n, n)`.
      same_region: which pairs may see each other, booleans `(W, n, n)`, each token itself among them.
      scale: of the scores, D^-1/2 when None.
      dropout_rate: probability that a weight is dropped.
      dropout_key: random key, needed for dropout.

    Returns:
      `(B·W, n, H, E)` in the dtype of `q`; the softmax is computed in float32.
    """
    mask = _mask(same_region, q.shape[0])
    return softmax_attention(
        q, k, v, bias=bias, mask=mask, scale=scale, dropout_rate=dropout_rate, dropout_key=dropout_key
    )


def _mask(same_region: np.ndarray | None, windows: int) -> jax.Array | None:
    """The regions of one example's windows for those of all, `(B·W, 1, n, n)`."""
    if same_region is None:
        return None
    return jnp.tile(same_region, (windows // same_region.shape[0], 1, 1))[:, None]


@register(
    "window_attention",
    paper=Paper(
        "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", "Liu et al.", 2021, "2103.14030"
    ),
    source=Source.PAPER_TEXT,
    repository="microsoft/Swin-Transformer",
    cost=Cost(time="O(N·n·C)", memory="O(N·n·H)"),
    summary="softmax attention inside windows with relative position bias, shifted in every other layer",
)
class WindowAttention(TokenMixer):
    """Softmax attention inside windows of an image, with its projections.

    Args:
      features: channels C.
      num_heads: H.
      window: rows and columns of a window, one number for both; they must tile the image.
      shift: of the windows; half a window in odd layers when None, except along an axis that one window covers.
      grid: rows and columns of the image, if the model fixes them; the default of `shift` looks at it.
      layer: index of the layer, which the default of `shift` looks at.
      scale: of the scores, D^-1/2 when None.
      qkv_bias: whether queries, keys and values have a bias.
      relative_bias: whether scores have the learned bias of offsets.
      attention_dropout: rate on the weights.
      projection_dropout: rate on the result.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the heads do not divide the channels, or the windows do not tile the grid.
    """

    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        window: int | tuple[int, int] = 7,
        shift: int | tuple[int, int] | None = None,
        grid: tuple[int, int] | None = None,
        layer: int = 0,
        scale: float | None = None,
        qkv_bias: bool = True,
        relative_bias: bool = True,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
        self.features, self.num_heads, self.scale = features, num_heads, scale
        size = ShiftedWindows(window).size
        if shift is None:
            lengths = (None, None) if grid is None else grid
            shift = tuple(0 if layer % 2 == 0 or w == n else w // 2 for w, n in zip(size, lengths, strict=True))
        self.windows = ShiftedWindows(size, shift)
        if grid is not None:
            self.windows.check(grid)
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query_key_value = Linear(features, 3 * features, use_bias=qkv_bias, axes=("embed", "heads"), **common)
        self.projection = Linear(features, features, axes=("heads", "embed"), **common)
        self.bias = nnx.data(None)
        if relative_bias:
            self.bias = RelativePositionBias(size, num_heads, param_dtype=param_dtype, rngs=rngs)
        self.attention_dropout = attention_dropout
        self.dropout_rngs = rngs["dropout"].fork() if attention_dropout > 0 else nnx.data(None)
        self.dropout = nnx.Dropout(projection_dropout, rngs=rngs) if projection_dropout > 0 else nnx.data(None)

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        """Windows that tile the grid: per axis the longest of at most 7 tokens, the whole axis if none but 1 does."""
        if site.grid is None or len(site.grid) != 2:
            return {}
        fitting = (max(w for w in range(1, 8) if length % w == 0) for length in site.grid)
        return {"window": tuple(length if w == 1 else w for w, length in zip(fitting, site.grid, strict=True))}

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
        grid = x.shape[1:3]
        tokens = self.windows.partition(x)
        qkv = self.query_key_value(tokens).reshape(
            tokens.shape[0], -1, 3, self.num_heads, self.features // self.num_heads
        )
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        bias = None if self.bias is None else self.bias()
        region = self.windows.same_region(grid)
        record(self, "attention", lambda: self._map(q, k, bias, region, grid))
        dropout = {}
        if not deterministic and self.dropout_rngs is not None:
            dropout = {"dropout_rate": self.attention_dropout, "dropout_key": self.dropout_rngs()}
        y = window_attention(q, k, v, bias=bias, same_region=region, scale=self.scale, **dropout)
        y = self.projection(y.reshape(tokens.shape))
        if self.dropout is not None:
            y = self.dropout(y, deterministic=deterministic)
        return self.windows.merge(y, grid)

    def _map(
        self, q: jax.Array, k: jax.Array, bias: jax.Array | None, region: np.ndarray | None, grid: tuple[int, int]
    ) -> jax.Array:
        weights = attention_weights(q, k, bias=bias, mask=_mask(region, q.shape[0]), scale=self.scale)
        return self.windows.scatter_map(weights, grid)
