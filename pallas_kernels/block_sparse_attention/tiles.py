"""Which tiles are visited: lists that are known when tracing, or made inside `jit`.

A *lane* is a list of tiles of its own; batch elements and heads that share their lists share a lane. All tiles of all
lanes stand in one flat list, ordered by lane, query block, key block. Where the mask is made of indices alone and no
blocks are given, the list is a constant. Otherwise candidates (all tiles that the static part of the mask leaves, or
those that `blocks` lists) are judged by the least and largest values of their rows and columns, and what is left is
packed to the front, with a count: what it costs to run follows the count.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import array_masks
from pallas_kernels.array_masks import Range, Verdict
from pallas_kernels.block_lists import lower
from pallas_kernels.block_sparse_attention.arguments import Arguments
from pallas_kernels.masks import EMPTY, FULL, Full, Interval, Mask


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is static in the tiles of a call.

    Attributes:
      batch: B.
      queries: N.
      keys: M.
      groups: G.
      repeats: R = H / G.
      block_q: queries of a tile.
      block_k: keys of a tile.
      lanes_b: 1, or B where batch elements have lists of their own.
      lanes_h: 1, or G or H where groups or heads have.
    """

    batch: int
    queries: int
    keys: int
    groups: int
    repeats: int
    block_q: int
    block_k: int
    lanes_b: int = 1
    lanes_h: int = 1

    @property
    def q_blocks(self) -> int:
        """Blocks of queries."""
        return -(-self.queries // self.block_q)

    @property
    def k_blocks(self) -> int:
        """Blocks of keys."""
        return -(-self.keys // self.block_k)

    @property
    def rows(self) -> int:
        """Query blocks of all lanes."""
        return self.lanes_b * self.lanes_h * self.q_blocks

    @property
    def inner(self) -> tuple[int, int, int]:
        """Batch elements, groups, and heads of a group that share a lane."""
        per_group = 1 if self.lanes_h > self.groups else self.repeats
        return self.batch // self.lanes_b, self.groups if self.lanes_h == 1 else 1, per_group


class Tiles(NamedTuple):
    """Visited tiles, flat; of NumPy where they are known when tracing.

    Attributes:
      row: lane · query blocks + query block of each, (T,) int32, ascending.
      column: key block, (T,) int32, ascending in a row.
      full: whether every pair of it is allowed, (T,) bool.
      offsets: the tiles of row r are `offsets[r]:offsets[r + 1]`, (rows + 1,) int32; what stands behind the last is
        no tile.
    """

    row: Any
    column: Any
    full: Any
    offsets: Any


def is_static(args: Arguments) -> bool:
    """Whether the tiles are known when tracing."""
    return args.blocks is None and args.rules.mask.static and args.extras.query_ids is None


def tiles_of(args: Arguments, block_q: int, block_k: int) -> tuple[Layout, Tiles]:
    """The tiles of a call.

    Args:
      args: the call.
      block_q: queries of a tile; where the call has `blocks`, theirs.
      block_k: keys of a tile, likewise.
    """
    layout = layout_of(args, block_q, block_k)
    return layout, static_tiles(args.rules.mask, layout) if is_static(args) else _dynamic(args, layout)


def layout_of(args: Arguments, block_q: int, block_k: int) -> Layout:
    """The layout of a call; arguments as `tiles_of`."""
    (b, n, h, _), (_, m, g, _) = args.q.shape, args.k.shape
    return Layout(b, n, m, g, h // g, block_q, block_k, *_lanes(args))


def head_of(layout: Layout, mask: Mask, lane: int) -> Mask:
    """The rule of a lane's heads."""
    return mask.head(lane * layout.repeats if layout.lanes_h == layout.groups else lane) if mask.heads > 1 else mask


def _lanes(args: Arguments) -> tuple[int, int]:
    (batch, _, heads, _), groups, x = args.q.shape, args.k.shape[2], args.extras
    arrays = jax.tree.leaves((x.queries, x.keys, x.tables, x.groups, x.query_ids))
    lanes_b = max([1, *(a.shape[0] for a in arrays)])
    per_head = [1 if a.shape[1] * a.shape[2] == 1 else heads if a.shape[2] > 1 else groups for a in arrays]
    mask = args.rules.mask
    if mask.heads > 1:
        repeats = heads // groups
        alike = all(mask.head(h) == mask.head(h // repeats * repeats) for h in range(heads)) if mask.static else False
        per_head.append(groups if alike else heads)
    if args.blocks is not None:
        lanes_b = max(lanes_b, args.blocks.indices.shape[0])
        per_head.append(args.blocks.indices.shape[1])
    return lanes_b if batch > 1 else 1, max([1, *per_head])


def static_tiles(mask: Mask, layout: Layout) -> Tiles:
    """The tiles of a mask of indices."""
    sizes = (layout.queries, layout.keys, layout.block_q, layout.block_k)
    lists = [lower(head_of(layout, mask, lane), *sizes) for lane in range(layout.lanes_h)]
    counts = np.concatenate([one.counts for one in lists])
    column = np.concatenate([one.key_blocks for one in lists])
    full = np.concatenate([one.is_full for one in lists]) & ((column + 1) * layout.block_k <= layout.keys)
    row = np.repeat(np.arange(layout.rows, dtype=np.int32), counts)
    return Tiles(row, column, full, np.append(0, np.cumsum(counts)).astype(np.int32))


def _dynamic(args: Arguments, layout: Layout) -> Tiles:
    columns, listed = _candidates(args, layout)
    verdict = _judged(args, layout, columns, listed)
    shape = (layout.lanes_b, layout.lanes_h, layout.q_blocks, columns.shape[-1])
    columns = jnp.broadcast_to(jnp.asarray(columns), shape)
    visited = jnp.broadcast_to(jnp.asarray(listed) & verdict.any, shape)
    full = jnp.broadcast_to(verdict.all, shape) & ((columns + 1) * layout.block_k <= layout.keys)
    (kept,) = jnp.nonzero(visited.reshape(-1), size=visited.size, fill_value=visited.size - 1)
    counts = visited.reshape(layout.rows, -1).sum(-1)
    return Tiles(
        (kept // shape[-1]).astype(jnp.int32),
        columns.reshape(-1)[kept].astype(jnp.int32),
        full.reshape(-1)[kept],
        jnp.append(0, jnp.cumsum(counts)).astype(jnp.int32),
    )


def _candidates(args: Arguments, layout: Layout) -> tuple[Any, Any]:
    """Key blocks (b, h, query blocks, W), ascending, and which of them count; of NumPy without `blocks`."""
    if args.blocks is not None:
        indices, counts = args.blocks.indices, args.blocks.counts
        if indices.shape[1] not in (1, layout.lanes_h):
            indices, counts = (jnp.repeat(x, layout.repeats, axis=1) for x in (indices, counts))
        return indices, jnp.arange(indices.shape[-1]) < counts[..., None]
    mask = args.rules.mask
    sizes = (layout.queries, layout.keys, layout.block_q, layout.block_k)
    lanes = range(layout.lanes_h if mask.heads > 1 else 1)
    lists = [lower(head_of(layout, mask, lane), *sizes) for lane in lanes]
    tables = [one.table()[0] for one in lists]
    width = max(table.shape[1] for table in tables)
    columns = np.stack([np.pad(table, ((0, 0), (0, width - table.shape[1])), mode="edge") for table in tables])[None]
    counts = np.stack([one.counts for one in lists])[None]
    return columns, np.arange(width) < counts[..., None]


def _judged(args: Arguments, layout: Layout, columns: Any, listed: Any) -> Verdict:
    """The verdict on candidates, broadcastable to (lanes_b, lanes_h, query blocks, W)."""
    mask, x = args.rules.mask, args.extras
    judge = _Judge(args, layout, columns)
    if mask.heads == 1:
        verdict = judge(mask, slice(None))
    else:
        each = [judge(head_of(layout, mask, lane), slice(lane, lane + 1)) for lane in range(layout.lanes_h)]
        shape = (layout.lanes_b, 1, layout.q_blocks, columns.shape[-1])
        verdict = Verdict(
            *(jnp.concatenate([jnp.broadcast_to(one, shape) for one in parts], 1) for parts in zip(*each, strict=True))
        )
    if x.query_ids is not None:
        ids = Range(*judge.of_rows(x.query_ids)), Range(*judge.of_columns(x.key_ids))
        verdict = verdict & (ids[0] == ids[1])
    return verdict


class _Judge:
    """Judges candidate tiles."""

    def __init__(self, args: Arguments, layout: Layout, columns: Any) -> None:
        self.args, self.layout, self.columns, self.lanes = args, layout, columns, slice(None)
        rows = np.arange(layout.q_blocks)[:, None]
        self.q = Interval(rows * layout.block_q, np.minimum((rows + 1) * layout.block_q, layout.queries) - 1)
        self.at = rows

    def __call__(self, mask: Mask, lanes: slice) -> Verdict:
        self.lanes = lanes
        if mask == Full():
            return Verdict(jnp.ones((1,) * 4, bool), jnp.ones((1,) * 4, bool))
        places = [lambda p=p: self._place(mask, p) for p in range(len(self.args.extras.queries))]
        return array_masks.judged(mask, self._static, places)

    @property
    def _columns(self) -> Any:
        return self.columns[:, self.lanes] if self.columns.shape[1] > 1 else self.columns

    def _keys(self) -> Interval:
        lo = self._columns * self.layout.block_k
        return Interval(lo, jnp.minimum(lo + self.layout.block_k, self.layout.keys) - 1)

    def _static(self, mask: Mask) -> Verdict:
        """Of a mask of indices: looked up in the verdicts on all blocks."""
        layout, lib = self.layout, np if isinstance(self.columns, np.ndarray) else jnp
        shape = layout.q_blocks, layout.k_blocks
        if self.args.rules.mask.static:
            lists = lower(mask, layout.queries, layout.keys, layout.block_q, layout.block_k)
            seen, full = np.zeros(shape, bool), np.zeros(shape, bool)
            rows = np.repeat(np.arange(shape[0]), lists.counts)
            seen[rows, lists.key_blocks], full[rows, lists.key_blocks] = True, lists.is_full
        else:
            lo = np.arange(shape[1]) * layout.block_k
            verdict = mask.judge(self.q, Interval(lo, np.minimum(lo + layout.block_k, layout.keys) - 1))
            seen, full = verdict != EMPTY, verdict == FULL
        return Verdict(*(jnp.asarray(lib.asarray(one)[self.at, self._columns]) for one in (seen, full)))

    def of_rows(self, x: jax.Array, head: slice = slice(None)) -> tuple[jax.Array, jax.Array]:
        """Least and largest value of each query block, (b, h, query blocks, 1), of (B|1, G|1, R|1, N, 1)."""
        least, largest = self._extremes(self._lane_heads(x)[..., 0], self.layout.block_q)
        return least[..., None], largest[..., None]

    def of_columns(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Least and largest value of the candidates' keys, (b, h, query blocks, W), of (B|1, G|1, R|1, 1, M)."""
        return tuple(self._at(one) for one in self._extremes(self._lane_heads(x)[..., 0, :], self.layout.block_k))

    def _at(self, x: jax.Array) -> jax.Array:
        """(b, h, key blocks) at the candidates."""
        return x[self._number(x, 0), self._number(x, 1), self._columns]

    def _number(self, x: jax.Array, axis: int) -> Any:
        return np.arange(x.shape[axis]).reshape([-1 if a == axis else 1 for a in range(4)])

    def _lane_heads(self, x: jax.Array) -> jax.Array:
        """(B|1, G|1, R|1, …) as (B|1, lanes or 1, …)."""
        layout = self.layout
        if x.shape[1] * x.shape[2] > 1 and layout.lanes_h > layout.groups:
            x = jnp.broadcast_to(x, (x.shape[0], layout.groups, layout.repeats, *x.shape[3:]))
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
        return x[:, self.lanes] if x.shape[1] > 1 else x

    def _extremes(self, x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)], mode="edge")
        x = x.reshape(*x.shape[:-1], -1, block)
        return x.min(-1), x.max(-1)

    def _place(self, mask: Mask, number: int) -> Verdict:
        x = self.args.extras
        table = x.tables[number]
        if table is None:
            k = self._keys()
            queries = [Range(*self.of_rows(a)) for a in x.queries[number]]
            keys = [Range(*self.of_columns(a)) for a in x.keys[number]]
            verdict = array_masks.rule_of(mask, number)(Range(*self.q), Range(*k), *queries, *keys)
            return Verdict(jnp.asarray(verdict.any), jnp.asarray(verdict.all))
        return self._chosen(self._lane_heads(table), x.groups[number][:, 0, 0, 0])

    def _chosen(self, table: jax.Array, groups: jax.Array) -> Verdict:
        """Of choices (b, h, N, S) of the groups (b, M)."""
        layout, size = self.layout, table.shape[-1]

        def per_block(fill: bool) -> jax.Array:
            x = jnp.pad(table, ((0, 0), (0, 0), (0, -table.shape[2] % layout.block_q), (0, 0)), constant_values=fill)
            return x.reshape(*x.shape[:2], -1, layout.block_q, size)

        groups = jnp.where((groups >= 0) & (groups < size), groups, size)
        grown = jnp.pad(groups, ((0, 0), (0, -layout.keys % layout.block_k)), mode="edge")
        grown = grown.reshape(grown.shape[0], -1, layout.block_k)
        batch, block = np.indices(grown.shape[:2])[..., None]
        there = jnp.zeros((*grown.shape[:2], size + 1), bool).at[batch, block, grown].set(True)
        there, outside = there[..., :size], there[..., size]

        def shared(x: jax.Array) -> jax.Array:
            """Whether a query block and a key block have a group in common, at the candidates."""
            count = jnp.einsum("bhqs,bks->bhqk", x.astype(jnp.float32), there.astype(jnp.float32))
            return (count > 0)[self._number(count, 0), self._number(count, 1), self.at, self._columns]

        missing = shared(~per_block(True).all(3)) | self._at(outside[:, None])
        return Verdict(shared(per_block(False).any(3)), ~missing)
