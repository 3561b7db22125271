"""Video mixture of block attention, VMoBA (Wu et al., 2025, arXiv:2506.23858), code at KwaiVGI/VMoBA.

Its parent, MoBA, is in `moba`. Tokens of a video see each other without order. Layers cut the video into blocks in
turn along one, two and three axes: runs of frames, windows of all frames, boxes. Each query attends to its own block
and to blocks that were chosen by

    k̄_s = mean of k over block s,   g_is = q_i·k̄_s                               not scaled, in float32
    y_i = softmax(q_i k_tᵀ / √D) v_t       over t in i's own block and in the blocks chosen for it

`"topk"` keeps the largest g of a *pool*: of the K blocks of a query (`"query_head"`) its own is one, so that K - 1
others are chosen; of a head's N·S pairs (K - 1)·N (`"head_global"`); of those of all heads (K - 1)·H·N (`"overall"`).
`"threshold"` keeps, in each pool (these three, and the H·N pairs of a block, `"block"`), the least number of the
largest pairs whose share reaches what the queries' own blocks leave of τ:

    n = (g - min g) / (max g - min g),   r = max(0, τ - Σ_own n / Σ n)
    kept = the largest n of other blocks, up to and with the first at which their sum / Σ n reaches r

so that every pool keeps one pair at least. Pools are those of one example. The choice has no gradient.

By `"topk"` in the first two pools the number of pairs is known, and work is O(N·K·c·D) beside the scores of blocks,
whatever is chosen (`attnlab.nn.chosen_blocks`). Else it follows the tiles that hold a chosen pair: blocks are compact,
so that neighbours choose alike.

Where no query has another block, with K = 1 for one, the authors' code attends to everything; `full_fallback` does so.
Their sizes must divide the video; here the blocks at its ends are smaller.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, Pattern, TokenMixer, record
from attnlab.nn.chosen_blocks import attend_pairs, block_means, block_scores, keys_of, largest, paired_table
from attnlab.nn.dense_mixer import Heads, HeadSizes
from attnlab.nn.grids import to_tokens
from attnlab.nn.head_parallel import head_parallel
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.masking import masked_softmax
from attnlab.nn.positions import grid_positions
from attnlab.nn.rotary import Rotary
from attnlab.nn.scans import inverse_order, permute, scan_order, scan_segments
from attnlab.nn.softmax import attention_scores
from attnlab.points import visit
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.array_masks import Chosen
from pallas_kernels.block_sparse_attention import block_sparse_attention

SelectMode = Literal["topk", "threshold"]
Pool = Literal["query_head", "head_global", "block", "overall"]
BlockSize = float | Sequence[int]
# Axes of (B, H, N, S) that are compared with each other.
_POOLS: dict[str, tuple[int, ...]] = {"query_head": (3,), "head_global": (2, 3), "block": (1, 2), "overall": (1, 2, 3)}
_MODES: dict[str, tuple[str, ...]] = {"topk": ("query_head", "head_global", "overall"), "threshold": tuple(_POOLS)}


def block_order(grid: Sequence[int], block: BlockSize) -> tuple[np.ndarray, np.ndarray]:
    """The order that puts the tokens of each block together, and their blocks.

    Args:
      grid: (T, H, W) of a video, (H, W) of an image, (N,) of a sequence, whose frames are single tokens.
      block: a number of frames (int(s·H·W) tokens in their order, so that it may be a fraction); (h, w) of a window of
        all frames; or (t, h, w) of a box.

    Returns:
      `(N,)` int32 each; the blocks ascend from 0.

    Raises:
      ValueError: for a block that the grid does not have.
    """
    frames = tuple(grid) if len(grid) == 3 else (1, *grid) if len(grid) == 2 else (*grid, 1, 1)
    if isinstance(block, int | float | np.number):
        if not block > 0:
            raise ValueError(f"block must be above 0 frames, got {block}")
        index = np.arange(math.prod(grid), dtype=np.int32)
        return index, index // max(1, int(block * frames[1] * frames[2]))
    if len(block) not in (2, 3) or len(block) > len(grid):
        raise ValueError(f"block must be a number of frames, or lengths of at most {len(grid)} axes, got {block}")
    size = tuple(block) if len(block) == 3 else (frames[0], *block)
    return scan_order("window", frames, size=size), scan_segments("window", frames, size)


class Choice(NamedTuple):
    """Blocks chosen beside a query's own: pairs of them, `(B, H, P)` rows and blocks, or a table `(B, H, N, S)`."""

    rows: jax.Array | None
    blocks: jax.Array | None
    table: jax.Array | None


def choose_blocks(
    scores: jax.Array, own: jax.Array, there: jax.Array, *, select_mode: str, topk: int, threshold: float, pool: str
) -> Choice:
    """Which blocks are chosen.

    Args:
      scores: g `(B, H, N, S)`.
      own: boolean `(B|1, 1, N, S)`, a query's own block.
      there: boolean `(B|1, 1, N, S)`, which pairs exist.
      select_mode, topk, threshold, pool: as in `vmoba_attention`.
    """
    other = there & ~own
    if select_mode == "threshold":
        return Choice(None, None, _above_threshold(scores, own, there, threshold, _POOLS[pool]) & other)
    batch, heads, queries, blocks = scores.shape
    count = min(topk, blocks) - 1
    scores = jnp.where(other, scores, -jnp.inf)
    if pool == "query_head":
        score, chosen = largest(scores, count)
        rows = jnp.broadcast_to(jnp.arange(queries)[:, None], chosen.shape)
        chosen = jnp.where(score > -jnp.inf, chosen, blocks)
        return Choice(rows.reshape(batch, heads, -1), chosen.reshape(batch, heads, -1), None)
    real = jnp.broadcast_to(there.any(-1), (batch, 1, queries)).sum(-1, dtype=jnp.int32)
    if pool == "head_global":
        score, place = largest(scores.reshape(batch, heads, -1), count * queries)
        kept = (score > -jnp.inf) & (jnp.arange(count * queries) < count * real[..., None])
        return Choice(place // blocks, jnp.where(kept, place % blocks, blocks), None)
    score, place = largest(scores.reshape(batch, -1), count * heads * queries)
    kept = (score > -jnp.inf) & (jnp.arange(score.shape[-1]) < count * heads * real)
    table = jnp.put_along_axis(jnp.zeros((batch, scores[0].size), bool), place, kept, axis=-1, inplace=False)
    return Choice(None, None, table.reshape(scores.shape))


def _above_threshold(
    scores: jax.Array, own: jax.Array, there: jax.Array, threshold: float, axes: tuple[int, ...]
) -> jax.Array:
    """The pairs that a threshold keeps, `(B, H, N, S)`; what it says of a query's own block does not count."""
    largest = jnp.finfo(scores.dtype).max
    low = jnp.where(there, scores, largest).min(axes, keepdims=True)
    high = jnp.where(there, scores, -largest).max(axes, keepdims=True)
    width = jnp.where(high - low <= 1e-6, 1, high - low)
    share = jnp.where(there, (jnp.where(there, scores, low) - low) / width, 0)
    total = share.sum(axes, keepdims=True) + 1e-6
    missing = jnp.maximum(threshold - (jnp.where(own, share, 0).sum(axes, keepdims=True) / total), 0)
    others = jnp.where(own, 0, share)
    # The pool as one last axis.
    ahead = tuple(axis for axis in range(4) if axis not in axes)
    turned = others.transpose(*ahead, *axes)
    flat = turned.reshape(*turned.shape[: len(ahead)], -1)
    order = jnp.argsort(-flat, axis=-1, stable=True)
    total, missing = (x.transpose(*ahead, *axes).reshape(*flat.shape[:-1], 1) for x in (total, missing))
    reached = jnp.cumsum(jnp.take_along_axis(flat, order, axis=-1), axis=-1) / total >= missing
    last = jnp.where(reached.any(-1, keepdims=True), jnp.argmax(reached, axis=-1, keepdims=True), flat.shape[-1] - 1)
    # By ranks, not by writing where the order says: XLA would gather all heads for that.
    kept = jnp.argsort(order, axis=-1) <= last
    return kept.reshape(turned.shape).transpose(*np.argsort((*ahead, *axes)))


def vmoba_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    grid: Sequence[int],
    block: BlockSize,
    select_mode: SelectMode = "threshold",
    topk: int = 3,
    threshold: float = 0.25,
    pool: Pool = "query_head",
    mask: ArrayLike | None = None,
    scale: float | None = None,
    full_fallback: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Attention to each query's own block and to those that are chosen for it.

    Args:
      q: queries, (B, N, H, D), N the tokens of the grid in row-major order.
      k: keys, (B, N, G, D), G a divisor of H.
      v: values, (B, N, G, E).
      grid: (T, H, W), (H, W) or (N,).
      block: as in `block_order`.
      select_mode: "topk" or "threshold".
      topk: K, blocks of a query, its own included, for "topk".
      threshold: τ, for "threshold".
      pool: whose pairs are compared: "query_head", "head_global", "overall", or with "threshold" "block".
      mask: boolean (B, N), which tokens exist. Runs of a sequence are counted among those.
      scale: of the token scores; D^-1/2 when None.
      full_fallback: whether all attend to all where no query of the call has another block.
      implementation: of `block_sparse_attention`.

    Returns:
      (B, N, H, E) in the dtype of `q`.

    Raises:
      ValueError: for options that are not there, or do not fit.
    """
    _check(select_mode, topk, threshold, pool)
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    order, blocks, q, k, v, ids, choice = _chosen(q, k, v, grid, block, mask, select_mode, topk, threshold, pool)
    options: dict[str, Any] = {"scale": scale, "implementation": implementation}
    none = int(blocks[-1]) + 1
    segments = None if mask is None else (jnp.where(ids < 0, -1, 0), jnp.where(ids < 0, -2, 0))

    def in_table(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.asarray(block_sparse_attention(q, k, v, mask=Chosen(table, ids), **options))

    def sparse(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if choice.table is not None:
            table, batch = choice.table | _own(ids, blocks), (len(q), len(order))
            axes = ("BNHD", "BMGD", "BMGE", "BHNS", "BM")
            return head_parallel(in_table, axes, "BNHE", q, k, v, table, jnp.broadcast_to(ids, batch))
        # Each query with its own block, beside the others.
        own = jnp.broadcast_to(jnp.where(ids < 0, none, ids)[:, None], (*choice.rows.shape[:2], len(order)))
        every = jnp.broadcast_to(jnp.arange(len(order)), own.shape)
        rows, pairs = jnp.concatenate([choice.rows, every], -1), jnp.concatenate([choice.blocks, own], -1)
        return attend_pairs(q, k, v, rows, pairs, ids, **options)

    def full(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.asarray(block_sparse_attention(q, k, v, segment_ids=segments, **options))

    if not full_fallback:
        y = sparse(q, k, v)
    elif choice.table is None and not choice.rows.shape[-1]:
        y = full(q, k, v)
    else:
        found = choice.table.any() if choice.rows is None else (choice.blocks < none).any()
        y = jax.lax.cond(found, sparse, full, q, k, v)
    return permute(y, inverse_order(order))


def _check(select_mode: str, topk: int, threshold: float, pool: str) -> None:
    if select_mode not in _MODES:
        raise ValueError(f"select_mode must be one of {', '.join(_MODES)}, got {select_mode!r}")
    if pool not in _MODES[select_mode]:
        raise ValueError(f"pool must be one of {', '.join(_MODES[select_mode])} with {select_mode}, got {pool!r}")
    if topk < 1 or not 0 <= threshold <= 1:
        raise ValueError(f"topk must be at least 1 and threshold in 0..1, got {topk} and {threshold}")


def _own(ids: jax.Array, blocks: np.ndarray) -> jax.Array:
    return (ids[..., None] == jnp.arange(blocks[-1] + 1))[:, None]


def _chosen(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    grid: Sequence[int],
    block: BlockSize,
    mask: ArrayLike | None,
    select_mode: str,
    topk: int,
    threshold: float,
    pool: str,
) -> tuple[Any, ...]:
    """The order and blocks of tokens, heads in it, the block of each token that exists (else -1), and the choice."""
    order, blocks = block_order(grid, block)
    if q.shape[1] != len(order):
        raise ValueError(f"q must have the {len(order)} tokens of the grid {tuple(grid)}, got {q.shape[1]}")
    q, k, v = (permute(one, order) for one in (q, k, v))
    ids = jnp.asarray(blocks)[None]
    if mask is not None:
        real = permute(mask, order)
        if len(grid) == 1:
            ids = ids[:, jnp.cumsum(real, axis=1) - 1][0]
        ids = jnp.where(real, ids, -1)
    count = int(blocks[-1]) + 1
    means, sizes = block_means(k, ids, count)
    own = _own(ids, blocks)
    there = (ids >= 0)[:, None, :, None] & (sizes > 0)[:, None, None]
    scores = block_scores(q, means)
    options: dict[str, Any] = {"select_mode": select_mode, "topk": topk, "threshold": threshold, "pool": pool}
    return order, blocks, q, k, v, ids, choose_blocks(scores, own, there, **options)


@register(
    "vmoba",
    paper=Paper(
        "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", "Wu et al.", 2025, arxiv="2506.23858", number=67
    ),
    source=Source.AUTHORS_CODE,
    repository="KwaiVGI/VMoBA",
    cost=Cost(
        time="O(N·(K·c + S)·H·(D+E)) by topk in S blocks of c tokens, by threshold O(N·S·H·D) and the visited tiles",
        memory="O(N·(K·(D+E) + S)·H)",
    ),
    kernel="block_sparse_attention",
    summary="tokens of a video attend to their block and to chosen ones, in blocks of 1, 2 and 3 axes by turns",
    small={"blocks": (0.5,), "threshold": 0.5},
)
class VideoMixtureOfBlockAttention(TokenMixer):
    """Videos and images to the same shape; of sequences there is MoBA. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: query heads H.
      num_kv_heads: key and value heads G, a divisor of H; H when None.
      head_dim: D; C / H when None.
      layout: of the tokens.
      layer: index of the layer, which picks its blocks.
      blocks: blocks of the layers in turn, each as in `block_order`: a number of frames, (h, w) or (t, h, w). When None
        those of a video are (2, (8, 8), (2, 8, 8)), of an image ((8, 8),).
      select_mode: "topk" or "threshold".
      topk: K, blocks of a query, its own included, for "topk".
      threshold: τ, for "threshold".
      pool: whose pairs are compared: "query_head", "head_global", "overall", or with "threshold" "block".
      rotary: rotary positions along the axes of the layout, or theta for `Rotary(theta)`; none when None.
      scale: of the token scores; D^-1/2 when None.
      full_fallback: whether all attend to all where no query of the call has another block.
      qkv_bias: whether the maps to queries, keys and values have a bias.
      out_bias: whether the last map has a bias.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for sizes or options that do not fit.
    """

    patterns = frozenset({Pattern.SELF})
    layouts = frozenset({Layout.IMAGE, Layout.VIDEO})
    accepts = frozenset({"key_mask"})
    points = frozenset({"qkv", "heads"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layout: Layout = Layout.VIDEO,
        layer: int = 0,
        blocks: Sequence[BlockSize] | None = None,
        select_mode: SelectMode = "threshold",
        topk: int = 3,
        threshold: float = 0.25,
        pool: Pool = "head_global",
        rotary: Rotary | float | None = None,
        scale: float | None = None,
        full_fallback: bool = False,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check(select_mode, topk, threshold, pool)
        groups, size, _ = HeadSizes.of(features, num_heads, num_kv_heads, head_dim)
        self.features, self.num_heads, self.layout, self.dtype = features, num_heads, Layout(layout), dtype
        blocks = _BLOCKS[self.layout] if blocks is None else blocks
        block = blocks[layer % len(blocks)]
        self.block = tuple(block) if isinstance(block, Sequence) else block
        block_order((1,) * self.layout.axes, self.block)
        self.choice = (("select_mode", select_mode), ("topk", int(topk)), ("threshold", threshold), ("pool", pool))
        self.rotary, self.scale, self.full_fallback = Rotary.of(rotary), scale, full_fallback
        if self.rotary is not None:
            self.rotary.check(size, self.layout.axes)
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = ToHeads(features, num_heads, size, use_bias=qkv_bias, **common)
        self.key, self.value = (ToHeads(features, groups, size, use_bias=qkv_bias, **common) for _ in range(2))
        self.out = FromHeads(num_heads, size, features, use_bias=out_bias, **common)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        grid, tokens = x.shape[1:-1], to_tokens(x)
        heads = Heads(self.query(tokens), self.key(tokens), self.value(tokens))
        q, k, v = visit(self, given.edits, "qkv", heads)[:3]
        if self.rotary is not None:
            at = grid_positions(grid)
            q, k = self.rotary(q, at), self.rotary(k, at)
        options: dict[str, Any] = {"grid": grid, "block": self.block, "mask": given.mask, **dict(self.choice)}
        y = vmoba_attention(q, k, v, **options, scale=self.scale, full_fallback=self.full_fallback)
        record(self, "attention", functools.partial(self._weights, q, k, options))
        return self.out(visit(self, given.edits, "heads", y)).reshape(x.shape)

    def _weights(self, q: jax.Array, k: jax.Array, options: dict[str, Any]) -> jax.Array:
        order, blocks, q, k, _, ids, choice = _chosen(q, k, k, **options)
        count = int(blocks[-1]) + 1
        table = paired_table(choice.rows, choice.blocks, len(order), count) if choice.table is None else choice.table
        if self.full_fallback:
            table = jnp.where(table.any(), table, (ids >= 0)[:, None, :, None])
        seen = keys_of(table | _own(ids, blocks), ids)
        weights, back = masked_softmax(attention_scores(q, k, scale=self.scale), seen), inverse_order(order)
        return permute(permute(weights, back, axis=2), back, axis=3)


_BLOCKS: dict[Layout, tuple[Any, ...]] = {
    Layout.VIDEO: (2, (8, 8), (2, 8, 8)),
    Layout.IMAGE: ((8, 8),),
}
