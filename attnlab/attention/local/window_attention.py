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
from attnlab.nn.linear import Linear, trunc_normal
from attnlab.nn.windows import ShiftedWindows
from attnlab.registry import Cost, Paper, Source, register


def relative_index(size: tuple[int, int]) -> np.ndarray:
    """Row of the bias table for each pair (query, key) of a window: integers `(n, n)` below (2h-1)(2w-1)."""
    rows, columns = np.divmod(np.arange(size[0] * size[1]), size[1])
    return (rows[:, None] - rows + size[0] - 1) * (2 * size[1] - 1) + columns[:, None] - columns + size[1] - 1


def window_weights(
    q: jax.Array,
    k: jax.Array,
    *,
    bias: jax.Array | None = None,
    same_region: jax.Array | np.ndarray | None = None,
    scale: float | None = None,
) -> jax.Array:
    """The softmax weights `(B·W, H, n, n)` of `window_attention`, in float32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=wide) * scale
    if bias is not None:
        scores = scores + bias
    if same_region is not None:
        windows = same_region.shape[0]
        apart = scores.reshape(-1, windows, *scores.shape[1:])
        apart = jnp.where(same_region[None, :, None], apart, -jnp.inf)
        scores = apart.reshape(scores.shape)
    return jax.nn.softmax(scores, -1)


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    same_region: jax.Array | np.ndarray | None = None,
    scale: float | None = None,
    dropout: Any = None,
) -> jax.Array:
    """Softmax attention inside windows.

    Args:
      q: queries, `(B·W, n, H, D)`: windows of an example follow each other.
      k: keys, `(B·W, n, H, D)`.
      v: values, `(B·W, n, H, E)`.
      bias: added to the scores, `(H, n, n)`.
      same_region: which pairs may see each other, booleans `(W, n, n)`, each token itself among them.
      scale: of the scores, D^-1/2 when None.
      dropout: function applied to the weights, in training.

    Returns:
      `(B·W, n, H, E)` in the dtype of `v`; the softmax is computed in float32.
    """
    weights = window_weights(q, k, bias=bias, same_region=same_region, scale=scale)
    if dropout is not None:
        weights = dropout(weights)
    y = jnp.einsum("bhnm,bmhe->bnhe", weights.astype(v.dtype), v, preferred_element_type=weights.dtype)
    return y.astype(v.dtype)


@register(
    "window_attention",
    paper=Paper(
        "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", "Liu et al.", 2021, "2103.14030"
    ),
    source=Source.PAPER_TEXT,
    repository="microsoft/Swin-Transformer",
    cost=Cost(time="O(N·n·C)", memory="O(N·n·H)"),
    summary="Softmax attention inside windows with relative position bias, shifted in every other layer.",
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
        offsets = (2 * size[0] - 1) * (2 * size[1] - 1)
        self.table = (
            nnx.Param(trunc_normal(rngs.params(), (offsets, num_heads), param_dtype))
            if relative_bias
            else nnx.data(None)
        )
        self.weight_dropout = nnx.Dropout(attention_dropout, rngs=rngs) if attention_dropout > 0 else nnx.data(None)
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
        options = {"bias": self._bias(), "same_region": self.windows.same_region(grid), "scale": self.scale}
        record(self, "attention", lambda: self.windows.scatter_map(window_weights(q, k, **options), grid))
        if self.weight_dropout is not None:
            options["dropout"] = lambda weights: self.weight_dropout(weights, deterministic=deterministic)
        y = self.projection(window_attention(q, k, v, **options).reshape(tokens.shape))
        if self.dropout is not None:
            y = self.dropout(y, deterministic=deterministic)
        return self.windows.merge(y, grid)

    def _bias(self) -> jax.Array | None:
        if self.table is None:
            return None
        table = self.table[...]
        table = table.astype(jnp.promote_types(table.dtype, jnp.float32))
        return jnp.moveaxis(table[relative_index(self.windows.size)], -1, 0)
