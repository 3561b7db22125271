"""Blocked local attention with halos (HaloNet, Vaswani et al., CVPR 2021, arXiv:2103.12731).

The image is cut into blocks of b x b tokens. All queries of a block see the same w x w keys, w = b + 2 h: those of the
block and of a halo of h tokens around it. Query (i, j) of a block and key (u, v) of its window, both counted from the
upper left corner of their own, score

    s = D^-1/2 q · k + q · r[u - i] + q · c[v - j]

with learned vectors r, c for offsets of rows and of columns, which all heads share. Heads are put side by side; there
is no map of the result. Halos outside of the image are zeros as keys and values, and are attended to: their score is
that of their offset. Keys are read (w / b)² times, against w² times in windows around each query. Cost O(N·w²·C) time.

With stride 2 every second query of both axes is left, at i in 0..b/2 - 1, so that offsets mix the units of both; or,
for an odd b or on demand, all results are averaged over 2 x 2 tokens. The paper leaves details open and no code of its
authors is public: whether offsets are scaled, zeros hidden, and how queries are strided are those of the reference.

Reference for names and defaults: timm's HaloAttn.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, Site, TokenMixer, record
from attnlab.nn.conv import divisible
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.grids import to_tokens, unfold, unfold_index
from attnlab.nn.heads import ToHeads, merge_heads
from attnlab.nn.position_bias import relative_logits
from attnlab.nn.resampling import avg_pool
from attnlab.nn.softmax import attention_weights, softmax_attention
from attnlab.points import visit
from attnlab.registry import Cost, Paper, Source, register

PAPER = Paper(
    "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    "Vaswani et al.",
    2021,
    arxiv="2103.12731",
    number=15,
)


def position_scores(q: ArrayLike, rows: ArrayLike, columns: ArrayLike) -> jax.Array:
    """q · r[u - i] + q · c[v - j] of all queries of blocks and all keys of their windows.

    Args:
      q: queries of blocks `(B, Y, X, b', b', H, D)`, Y and X counting the blocks.
      rows: vectors r of the offsets -(w - 1)..w - 1, `(2 w - 1, D)`.
      columns: vectors c, of the same shape.

    Returns:
      `(B·Y·X, H, b'², w²)` in float32 (or wider).
    """
    q, rows, columns = jnp.asarray(q), jnp.asarray(rows), jnp.asarray(columns)
    window = (rows.shape[0] + 1) // 2
    options = {"num_keys": window, "zero": window - 1}
    # The axis of the queries whose offset is meant stands in front of the heads.
    by_row = relative_logits(q.swapaxes(3, 4), rows, **options).transpose(0, 1, 2, 4, 5, 3, 6)
    by_column = relative_logits(q, columns, **options).transpose(0, 1, 2, 4, 3, 5, 6)
    scores = by_row[..., :, None] + by_column[..., None, :]
    return scores.reshape(-1, q.shape[5], q.shape[3] * q.shape[4], window**2)


def halo_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    rows: ArrayLike,
    columns: ArrayLike,
    *,
    block: int,
    halo: int,
    scale_positions: bool = False,
    weights: bool = False,
) -> jax.Array:
    """Attention of the queries of each block to the keys in and around it; see the module docstring.

    Args:
      q: queries `(B, Hh', Ww', H, D)`, as many of each block along both axes.
      k: keys `(B, Hh, Ww, H, D)`, Hh and Ww multiples of the block.
      v: values `(B, Hh, Ww, H, E)`.
      rows: vectors of the offsets of rows, `(2 w - 1, D)`.
      columns: those of the offsets of columns.
      block: b.
      halo: h.
      scale_positions: whether their scores are scaled as those of keys.
      weights: whether the weights are wanted, not the sums of values.

    Returns:
      `(B, Hh', Ww', H, E)` in the dtype of `v`; or the weights of blocks `(B, Y·X, H, b'², w²)` in float32.

    Raises:
      ValueError: if blocks do not tile the keys, or the queries are not as many in each block.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    (batch, *grid, heads, size), window = k.shape, block + 2 * halo
    if any(length % block for length in grid):
        raise ValueError(f"blocks of {block} x {block} do not tile the grid {tuple(grid)}")
    blocks = [length // block for length in grid]
    sides = {length / count for length, count in zip(q.shape[1:3], blocks, strict=True)}
    side = int(min(sides))
    if sides != {side} or side < 1:
        raise ValueError(f"queries must be as many in each of {blocks} blocks, got a grid of {q.shape[1:3]}")
    q = q.reshape(batch, blocks[0], side, blocks[1], side, heads, size).transpose(0, 1, 3, 2, 4, 5, 6)
    scale, positions = size**-0.5, position_scores(q, rows, columns)
    positions = positions * jnp.asarray(scale, positions.dtype) if scale_positions else positions

    def around(x: jax.Array) -> jax.Array:
        patches = unfold(x.reshape(batch, *grid, -1), window, stride=block, padding=halo)
        return patches.reshape(-1, window**2, heads, x.shape[-1])

    q = q.reshape(-1, side**2, heads, size)
    if weights:
        found = attention_weights(q, around(k), bias=positions, scale=scale)
        return found.reshape(batch, -1, *found.shape[1:])
    y = softmax_attention(q, around(k), around(v), bias=positions, scale=scale)
    y = y.reshape(batch, *blocks, side, side, heads, -1).transpose(0, 1, 3, 2, 4, 5, 6)
    return y.reshape(batch, blocks[0] * side, blocks[1] * side, heads, -1)


class _Halo:
    """What attention with and without a stride share: projections, vectors of offsets, and the call on images."""

    def _build(
        self,
        features: int,
        out_features: int,
        *,
        num_heads: int,
        head_dim: int | None,
        block: int,
        halo: int,
        qk_ratio: float,
        qkv_bias: bool,
        scale_positions: bool,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        if out_features % num_heads:
            raise ValueError(f"num_heads must divide the {out_features} channels, got {num_heads}")
        if block < 1 or halo < 0:
            raise ValueError(f"block must be at least 1 and halo at least 0, got {block} and {halo}")
        size = divisible(out_features * qk_ratio) // num_heads if head_dim is None else head_dim
        if size < 1:
            raise ValueError(f"head_dim must be at least 1, got {size}: give it for {num_heads} heads")
        self.features, self.num_heads, self.block, self.halo = features, num_heads, block, halo
        self.scale_positions = scale_positions
        common = {"use_bias": qkv_bias, "dtype": self.dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query, self.key = (ToHeads(features, num_heads, size, **common) for _ in range(2))
        self.value = ToHeads(features, num_heads, out_features // num_heads, **common)
        init = nnx.initializers.truncated_normal(size**-0.5)
        self.rows, self.columns = (
            nnx.Param(
                init(rngs.params(), (2 * (block + 2 * halo) - 1, size), param_dtype),
                logical_axes=(None, None),
                weight_decay=False,
            )
            for _ in range(2)
        )

    def _attend(self, heads: Heads, **options: Any) -> jax.Array:
        """`halo_attention` of heads that are laid out as images."""
        tables = (table[...].astype(heads.q.dtype) for table in (self.rows, self.columns))
        sizes = {"block": self.block, "halo": self.halo, "scale_positions": self.scale_positions}
        return halo_attention(*heads[:3], *tables, **sizes, **options)


@register(
    "halonet",
    paper=PAPER,
    source=Source.THIRD_PARTY,
    repository="huggingface/pytorch-image-models",
    cost=Cost(time="O(N·(b+2h)²·C)", memory="O(N·(b+2h)²·H)"),
    summary="blocks of queries attend to the keys of their block and of a halo around it",
    small={"halo": 1},
)
class HaloAttention(_Halo, TokenMixer):
    """Attention of an image's blocks to themselves and their surroundings, without a map of the result.

    Args:
      features: channels C.
      num_heads: heads H.
      head_dim: channels D of queries and keys; those of the values, rounded to multiples of 8 of all heads, when None.
      block: tokens b on a side of a block; must divide both sides of the image.
      halo: tokens h around it.
      qk_ratio: channels of queries and keys over those of values, where `head_dim` is None.
      qkv_bias: whether queries, keys and values have a bias.
      scale_positions: whether scores of offsets are scaled as those of keys are.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the heads do not divide the channels, or sizes are too small.
    """

    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE
    points = frozenset({"qkv", "heads"})
    # Heads are not summed by a map: they are gathered, and the gradients of the tokens summed.
    collectives = frozenset({"all-gather", "all-reduce"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 8,
        head_dim: int | None = None,
        block: int = 8,
        halo: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        scale_positions: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self._build(
            features,
            features,
            num_heads=num_heads,
            head_dim=head_dim,
            block=block,
            halo=halo,
            qk_ratio=qk_ratio,
            qkv_bias=qkv_bias,
            scale_positions=scale_positions,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        """Blocks of the most tokens, up to 8 on a side, that tile the grid."""
        if site.grid is None or len(site.grid) != 2:
            return {}
        return {"block": max(b for b in range(1, 9) if not (site.grid[0] % b or site.grid[1] % b))}

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        grid, tokens = x.shape[1:3], to_tokens(x)
        heads = Heads(self.query(tokens), self.key(tokens), self.value(tokens))
        heads = visit(self, given.edits, "qkv", heads)
        image = Heads(*(part.reshape(part.shape[0], *grid, *part.shape[2:]) for part in heads[:3]))
        record(self, "attention", lambda: self._map(image, grid))
        y = self._attend(image)
        y = visit(self, given.edits, "heads", y.reshape(y.shape[0], -1, *y.shape[3:]))
        return merge_heads(y).reshape(x.shape)

    def _map(self, image: Heads, grid: tuple[int, int]) -> jax.Array:
        """Weights `(B, H, N, N)`, without those on the zeros around the image."""
        weights = jnp.moveaxis(self._attend(image, weights=True), 2, 1)
        window, tokens = self.block + 2 * self.halo, grid[0] * grid[1]
        keys = unfold_index(grid, window, stride=self.block, padding=self.halo).reshape(-1, 1, window**2)
        queries = unfold_index(grid, self.block, stride=self.block).reshape(-1, self.block**2, 1)
        whole = jnp.zeros((*weights.shape[:2], tokens, tokens + 1), weights.dtype)
        return whole.at[:, :, queries, np.where(keys < 0, tokens, keys)].add(weights)[..., :tokens]


class HaloDownsampling(_Halo, nnx.Module):
    """The same with a stride or other channels: `(B, H, W, C)` to `(B, H/s, W/s, C')`.

    Args:
      features: channels C.
      out_features: channels C'; C when None.
      stride: s, 1 or 2.
      averaged: whether all queries attend and results are averaged over 2 x 2 tokens, as they are for an odd block.
      num_heads: heads H.
      head_dim: channels of queries and keys; as `HaloAttention`.
      block: tokens b on a side of a block.
      halo: tokens h around it.
      qk_ratio: channels of queries and keys over those of values, where `head_dim` is None.
      qkv_bias: whether queries, keys and values have a bias.
      scale_positions: whether scores of offsets are scaled as those of keys are.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for another stride, or as `HaloAttention`.
    """

    def __init__(
        self,
        features: int,
        out_features: int | None = None,
        *,
        stride: int = 2,
        averaged: bool = False,
        num_heads: int = 8,
        head_dim: int | None = None,
        block: int = 8,
        halo: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        scale_positions: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        self.dtype, self.stride = dtype, stride
        self.averaged = stride > 1 and (averaged or block % stride != 0)
        self._build(
            features,
            features if out_features is None else out_features,
            num_heads=num_heads,
            head_dim=head_dim,
            block=block,
            halo=halo,
            qk_ratio=qk_ratio,
            qkv_bias=qkv_bias,
            scale_positions=scale_positions,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Raises `ValueError` if blocks do not tile the image."""
        x = jnp.asarray(x, self.dtype)
        step = 1 if self.averaged else self.stride
        y = self._attend(Heads(self.query(x[:, ::step, ::step]), self.key(x), self.value(x)))
        y = y.reshape(*y.shape[:3], -1)
        return avg_pool(y, 2) if self.averaged else y
