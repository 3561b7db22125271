"""The list of tiles as a TPU grid walks it: prefetched scalars, and the masks of partial tiles.

A grid point is a tile that is visited, and no other: its row, column and flags lie in scalar memory before the kernel
starts, so that the blocks of the next tile are copied while this one is worked on, and what two tiles in turn have in
common is not copied again. Partial tiles of a mask of indices share their masks where they are equal. Of a tile that
needs a mask only the sub-tiles that hold a pair are computed: which ones is its pattern, and few patterns occur.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_lists import live_parts, lower
from pallas_kernels.block_sparse_attention.tiles import Layout, Tiles, head_of, static_tiles
from pallas_kernels.masks import Full, Mask
from pallas_kernels.tpu.chips import LANES

# Flags of a tile, from the lowest bit: whether it begins and ends what is written; what is computed of it; its lane.
FIRST, LAST = 1, 2
WORK, LANE = 2, 5  # bits below
WHOLE, MASKED = 1, 2  # all of it, without a mask; its first pattern, with one; 0 is nothing
PART = LANES  # queries and keys of a sub-tile
MOST_PATTERNS = 4  # each is a body of its own in a kernel


class Piece(NamedTuple):
    """Neighboring sub-tiles that are computed together: their first query and key in the tile, and how many."""

    i: int
    j: int
    queries: int
    keys: int


Pattern = tuple[Piece, ...]
"""The pieces of a tile that hold an allowed pair."""


class Patterns(NamedTuple):
    """What is computed of the tiles of a mask of indices.

    Attributes:
      kinds: of tiles that need a mask.
      number: of each tile, `WHOLE`, or `MASKED` and the number of its pattern, (T,) int32.
      computed: pairs in what is computed of all of them.
    """

    kinds: tuple[Pattern, ...]
    number: np.ndarray
    computed: int


class Walk(NamedTuple):
    """Scalars of each grid point, (T,) int32 each, and how many grid points there are.

    Attributes:
      row: query block.
      column: key block.
      flags: see the constants.
      mask: which mask a partial tile has; of a full one, that of the tile before, which is there already.
      total: a number, or an array where the list is made at run time.
    """

    row: Any
    column: Any
    flags: Any
    mask: Any
    total: Any


def walks(layout: Layout, tiles: Tiles, masks: Any, work: Any) -> tuple[Walk, Walk]:
    """The tiles row by row, and column by column.

    Args:
      layout: of the call.
      tiles: of the call.
      masks: the number of the mask of each tile, (T,), or None.
      work: what is computed of each, from `patterns`.
    """
    lib = np if isinstance(tiles.row, np.ndarray) else jnp
    count = tiles.offsets[-1]
    lane, row = tiles.row // layout.q_blocks, tiles.row % layout.q_blocks
    masks = lib.zeros_like(tiles.column) if masks is None else masks
    by_row = _walk(lib, lane * layout.q_blocks + row, lane, row, tiles.column, work, masks, count)
    # Of lanes that are heads, those of one group write the same keys.
    writes = lane // layout.repeats if layout.lanes_h > layout.groups else lane
    place = writes * layout.k_blocks + tiles.column
    inside = lib.arange(lane.size) < count
    order = lib.lexsort((tiles.row, place, ~inside))
    sorted_ = (x[order] for x in (place, lane, row, tiles.column, work, masks))
    return by_row, _walk(lib, *sorted_, count)


def _walk(lib: Any, place: Any, lane: Any, row: Any, column: Any, work: Any, masks: Any, count: Any) -> Walk:
    if not place.size:
        return Walk(row, column, lane, masks, 0)
    number = lib.arange(place.size)
    inside, end = number < count, number == count - 1
    change = place[1:] != place[:-1]
    first = lib.concatenate([lib.ones(1, bool), change])
    last = lib.concatenate([change, lib.ones(1, bool)]) | end
    flags = (lane << LANE) + (work << WORK) + FIRST * first + LAST * last
    # Where nothing is visited, one grid point writes its zeros: a grid has at least one.
    flags = lib.where(inside, flags, FIRST + LAST)
    zero = lib.zeros_like(row)
    row, column, masks = (lib.where(inside, x, zero).astype(lib.int32) for x in (row, column, masks))
    total = int(count) if lib is np else jnp.maximum(count, 1).astype(jnp.int32)
    return Walk(row, column, flags.astype(lib.int32), masks, total)


def lanes_of(mask: Mask, layout: Layout) -> tuple[Mask, ...]:
    """The rule of each lane of tiles that are known when tracing."""
    return tuple(head_of(layout, mask, lane) for lane in range(layout.lanes_h))


def patterns(mask: Mask, layout: Layout, tiles: Tiles) -> tuple[tuple[Pattern, ...], Any]:
    """The patterns of a call, and what is computed of each tile, (T,) int32, as in `Patterns.number`.

    What arrays decide at run time is taken as allowed.

    Args:
      mask: of the call.
      layout: of the call.
      tiles: of the call.
    """
    sizes = layout.queries, layout.keys, layout.block_q, layout.block_k
    if isinstance(tiles.row, np.ndarray):
        found = patterns_of(lanes_of(mask, layout), *sizes)
        return found.kinds, found.number
    if mask == Full() or sizes[2:] == (PART, PART):
        whole = (Piece(0, 0, layout.block_q, layout.block_k),)
        return (whole,), jnp.where(tiles.full, WHOLE, MASKED)
    found = patterns_of((mask,), *sizes, False)
    lists = lower(mask, *sizes)
    table = np.zeros((layout.q_blocks, layout.k_blocks), np.int32)
    table[np.repeat(np.arange(layout.q_blocks), lists.counts), lists.key_blocks] = found.number
    return found.kinds, jnp.where(tiles.full, WHOLE, jnp.asarray(table)[tiles.row % layout.q_blocks, tiles.column])


@functools.lru_cache(maxsize=64)
def patterns_of(
    lanes: tuple[Mask, ...], queries: int, keys: int, block_q: int, block_k: int, whole: bool = True
) -> Patterns:
    """The patterns of masks of indices.

    The kinds of tiles that save most are told apart, the others are computed whole: a kernel has code for each kind.

    Args:
      lanes: the rule of each.
      queries: N.
      keys: M.
      block_q: queries of a tile.
      block_k: keys of a tile.
      whole: whether a tile that the masks allow whole needs no mask.
    """
    sizes = queries, keys, block_q, block_k
    live = np.concatenate([live_parts(lane, *sizes, PART, PART) for lane in lanes])
    lists = [lower(lane, *sizes) for lane in lanes]
    # A short last block of keys is masked.
    full = np.concatenate([one.is_full & ((one.key_blocks + 1) * block_k <= keys) for one in lists]) & whole
    number = np.full(full.size, WHOLE, np.int32)
    if full.all():
        return Patterns((), number, full.size * block_q * block_k)
    kinds, kind, counts = np.unique(live[~full], axis=0, return_inverse=True, return_counts=True)
    saved = counts * (~kinds).sum((1, 2))
    order = np.argsort(-saved, kind="stable")
    all_kept = order.size <= MOST_PATTERNS
    kept = order if all_kept else order[: MOST_PATTERNS - 1]
    place = np.full(order.size, kept.size, np.int32)
    place[kept] = np.arange(kept.size)
    chosen = [kinds[at] for at in kept] + ([] if all_kept else [np.ones(kinds.shape[1:], bool)])
    number[~full] = MASKED + place[kind.reshape(-1)]
    area = np.asarray([0, block_q * block_k, *(one.sum() * PART**2 for one in chosen)])
    return Patterns(tuple(_pieces(one) for one in chosen), number, int(area[number].sum()))


def _pieces(live: np.ndarray) -> Pattern:
    """Keys that the same queries see are together, and each run of these queries is a piece.

    So pieces are long in queries, which are lanes: that takes fewer bundles than pieces long in keys (README).
    """
    pieces, first = [], 0
    for queries, alike in itertools.groupby(live.T.tolist()):
        count = len(list(alike))
        edges = np.flatnonzero(np.diff(queries, prepend=False, append=False)).tolist()
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            pieces.append(Piece(start * PART, first * PART, (end - start) * PART, count * PART))
        first += count
    return tuple(pieces)


@functools.lru_cache(maxsize=16)
def masks_of(mask: Mask, layout: Layout) -> tuple[np.ndarray, np.ndarray] | None:
    """The masks of partial tiles, keys by queries, (P, block_k, block_q) int8, and the number of each tile's.

    Of a mask of indices alone; None where no tile is partial.
    """
    tiles = static_tiles(mask, layout)
    # A short last block of keys is partial too: its padding is masked.
    lanes = lanes_of(mask, layout)
    if tiles.full.all() or (mask == Full() and layout.keys % layout.block_k == 0):
        return None
    lane, row = tiles.row // layout.q_blocks, tiles.row % layout.q_blocks
    bounds = np.stack([lane, row * layout.block_q, tiles.column * layout.block_k])[:, ~tiles.full]
    key = _key(lanes, layout, bounds)
    _, examples, kind = np.unique(key, axis=1, return_index=True, return_inverse=True)
    found: dict[bytes, int] = {}
    made: list[np.ndarray] = []
    numbers = np.zeros(examples.size, np.int32)
    for at, example in enumerate(examples):
        h, i, j = (int(x) for x in bounds[:, example])
        k_idx = j + np.arange(layout.block_k)[:, None]
        seen = np.asarray(lanes[h](i + np.arange(layout.block_q)[None], k_idx)) & (k_idx < layout.keys)
        one = np.broadcast_to(seen, (layout.block_k, layout.block_q)).astype(np.int8)
        numbers[at] = found.setdefault(one.tobytes(), len(made))
        if numbers[at] == len(made):
            made.append(one)
    number = np.zeros(tiles.row.size, np.int32)
    number[~tiles.full] = numbers[kind.reshape(-1)]
    return np.stack(made), number


def _key(lanes: tuple[Mask, ...], layout: Layout, bounds: np.ndarray) -> np.ndarray:
    """Equal for tiles whose masks are equal for certain: moved copies by a period of the rule."""
    lane, i, j = bounds
    periods = np.asarray([mask.period or 0 for mask in lanes])[lane]
    moved = np.where(periods > 0, np.minimum(i, j) // np.maximum(periods, 1) * periods, 0)
    short = j + layout.block_k > layout.keys
    moved = np.where(short, 0, moved)
    return np.stack([lane, i - moved, j - moved])
