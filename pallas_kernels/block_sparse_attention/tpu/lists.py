"""The list of tiles as a TPU grid walks it: prefetched scalars, and the masks of partial tiles.

A grid point is a tile that is visited, and no other: its row, column and flags lie in scalar memory before the kernel
starts, so that the blocks of the next tile are copied while this one is worked on, and what two tiles in turn have in
common is not copied again. Partial tiles of a mask of indices share their masks where they are equal.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention.tiles import Layout, Tiles, head_of, static_tiles
from pallas_kernels.masks import Full, Mask

FIRST, LAST, WHOLE, NOTHING = 1, 2, 4, 8  # begins and ends what is written; needs no mask; is there for its zeros
LANE = 4  # bits below the number of the lane


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


def walks(layout: Layout, tiles: Tiles, masks: Any) -> tuple[Walk, Walk]:
    """The tiles row by row, and column by column.

    Args:
      layout: of the call.
      tiles: of the call.
      masks: the number of the mask of each tile, (T,), or None.
    """
    lib = np if isinstance(tiles.row, np.ndarray) else jnp
    count = tiles.offsets[-1]
    lane, row = tiles.row // layout.q_blocks, tiles.row % layout.q_blocks
    masks = lib.zeros_like(tiles.column) if masks is None else masks
    by_row = _walk(lib, lane * layout.q_blocks + row, lane, row, tiles.column, tiles.full, masks, count)
    # Of lanes that are heads, those of one group write the same keys.
    writes = lane // layout.repeats if layout.lanes_h > layout.groups else lane
    place = writes * layout.k_blocks + tiles.column
    inside = lib.arange(lane.size) < count
    order = lib.lexsort((tiles.row, place, ~inside))
    sorted_ = (x[order] for x in (place, lane, row, tiles.column, tiles.full, masks))
    return by_row, _walk(lib, *sorted_, count)


def _walk(lib: Any, place: Any, lane: Any, row: Any, column: Any, full: Any, masks: Any, count: Any) -> Walk:
    if not place.size:
        return Walk(row, column, lane, masks, 0)
    number = lib.arange(place.size)
    inside, end = number < count, number == count - 1
    change = place[1:] != place[:-1]
    first = lib.concatenate([lib.ones(1, bool), change])
    last = lib.concatenate([change, lib.ones(1, bool)]) | end
    flags = (lane << LANE) + FIRST * first + LAST * last + WHOLE * full
    # Where nothing is visited, one grid point writes its zeros: a grid has at least one.
    flags = lib.where(inside, flags, FIRST + LAST + NOTHING)
    zero = lib.zeros_like(row)
    row, column, masks = (lib.where(inside, x, zero).astype(lib.int32) for x in (row, column, masks))
    total = int(count) if lib is np else jnp.maximum(count, 1).astype(jnp.int32)
    return Walk(row, column, flags.astype(lib.int32), masks, total)


@functools.lru_cache(maxsize=16)
def masks_of(mask: Mask, layout: Layout) -> tuple[np.ndarray, np.ndarray] | None:
    """The masks of partial tiles, keys by queries, (P, block_k, block_q) int8, and the number of each tile's.

    Of a mask of indices alone; None where no tile is partial.
    """
    tiles = static_tiles(mask, layout)
    # A short last block of keys is partial too: its padding is masked.
    lanes = tuple(head_of(layout, mask, lane) for lane in range(layout.lanes_h))
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
