"""Lowering of masks to lists of blocks, so that a kernel skips the empty ones and masks only the partial ones.

Large blocks are judged first, and those that are neither empty nor full are cut into smaller ones, down to the size
that is asked for: the cost follows the border of the mask, not N·M.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np

from pallas_kernels.masks import EMPTY, FULL, PARTIAL, UNKNOWN, Interval, Mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CHUNK = 1 << 22  # elements, or blocks, looked at together: tens of megabytes
_FACTOR = 8  # blocks of one level that make one of the level above, along an axis
_TOP = 32  # blocks of the highest level along an axis, at most


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockLists:
    """A mask lowered to blocks: those that are not empty, sorted by query block, then key block.

    The last block of an axis is shorter where the block size does not divide the length; it is judged by the tokens
    that exist.

    Its `repr` is a picture.

    Attributes:
      num_q_blocks: blocks of queries.
      num_k_blocks: blocks of keys.
      offsets: (num_q_blocks + 1,) int32; the blocks of query block i are `offsets[i]:offsets[i + 1]`.
      key_blocks: key block of each, int32.
      is_full: whether the mask allows every pair of it, bool; the others are partial.
    """

    num_q_blocks: int
    num_k_blocks: int
    offsets: np.ndarray
    key_blocks: np.ndarray
    is_full: np.ndarray

    def visited(self, i: int) -> np.ndarray:
        """Key blocks with an allowed pair for query block `i`, ascending."""
        return self.key_blocks[self.offsets[i] : self.offsets[i + 1]]

    def full(self, i: int) -> np.ndarray:
        """Key blocks that query block `i` sees whole."""
        return self.visited(i)[self.is_full[self.offsets[i] : self.offsets[i + 1]]]

    def partial(self, i: int) -> np.ndarray:
        """Key blocks that query block `i` sees in part."""
        return self.visited(i)[~self.is_full[self.offsets[i] : self.offsets[i + 1]]]

    def empty(self, i: int) -> np.ndarray:
        """Key blocks that query block `i` does not see."""
        return np.setdiff1d(np.arange(self.num_k_blocks, dtype=np.int32), self.visited(i), assume_unique=True)

    @property
    def counts(self) -> np.ndarray:
        """Visited key blocks of each query block, (num_q_blocks,) int32."""
        return np.diff(self.offsets).astype(np.int32)

    @property
    def fraction(self) -> float:
        """Share of all blocks that is visited."""
        return self.key_blocks.size / max(1, self.num_q_blocks * self.num_k_blocks)

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """The lists as rectangles, as kernels prefetch them: visited key blocks and whether each is full.

        Both are (num_q_blocks, max(1, max(counts))). A shorter row is filled up with its last key block (0 in an
        empty row), marked as not full, so that a kernel that runs on fetches nothing new; it must stop at `counts`.
        """
        counts = self.counts
        width = max(1, int(counts.max(initial=0)))
        at = self.offsets[:-1, None] + np.minimum(np.arange(width), np.maximum(counts - 1, 0)[:, None])
        inside = np.arange(width) < counts[:, None]
        padded, full = np.append(self.key_blocks, 0), np.append(self.is_full, False)
        at = np.where(counts[:, None] > 0, at, self.key_blocks.size)
        return padded[at].astype(np.int32), full[at] & inside

    def __repr__(self) -> str:
        visited, full = 100 * self.fraction, 100 * self.is_full.mean() if self.is_full.size else 0.0
        size = f"{self.num_q_blocks}×{self.num_k_blocks} blocks"
        return f"BlockLists({size}, {visited:.3g} % visited, {full:.3g} % of these full)\n{self.picture()}"

    def picture(self, columns: int = 32) -> str:
        """A character for each block, or for a square of them: `█` full, `▒` partial, `·` empty."""
        step = max(1, -(-max(self.num_q_blocks, self.num_k_blocks) // columns))
        shape = -(-self.num_q_blocks // step), -(-self.num_k_blocks // step)
        rows = np.repeat(np.arange(self.num_q_blocks), self.counts) // step
        visited, full = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        np.add.at(visited, (rows, self.key_blocks // step), 1)
        np.add.at(full, (rows, self.key_blocks // step), self.is_full)
        sizes = [np.diff(np.append(np.arange(0, n, step), n)) for n in (self.num_q_blocks, self.num_k_blocks)]
        marks = np.where(full == np.outer(*sizes), "█", np.where(visited > 0, "▒", "·"))
        return "\n".join("".join(row) for row in marks)

    def transpose(self) -> "BlockLists":
        """The same blocks listed per key block, for the gradients of keys and values."""
        q_blocks = np.repeat(np.arange(self.num_q_blocks, dtype=np.int32), self.counts)
        order = np.argsort(self.key_blocks, kind="stable")
        counts = np.bincount(self.key_blocks, minlength=self.num_k_blocks)
        return _lists(self.num_k_blocks, self.num_q_blocks, counts, q_blocks[order], self.is_full[order])


@functools.lru_cache(maxsize=256)
def lower(mask: Mask, num_queries: int, num_keys: int, block_q: int, block_k: int) -> BlockLists:
    """Lowers `mask` for N queries and M keys to lists of blocks; exact, and remembered for equal arguments.

    Where a mask looks at arrays, a block that they decide counts as partial.

    Args:
      mask: which pairs are allowed, the same ones for all heads.
      num_queries: N.
      num_keys: M.
      block_q: queries of a block.
      block_k: keys of a block.

    Raises:
      TypeError: if `mask` is not a `Mask`.
      ValueError: for a length or block size below 1, or a mask that has rules per head.
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"mask must be a Mask, got {type(mask).__name__}")
    if mask.heads != 1:
        raise ValueError(f"mask has {mask.heads} rules for {mask.heads} heads: lower each, as in mask.head(0)")
    sizes = {"num_queries": num_queries, "num_keys": num_keys, "block_q": block_q, "block_k": block_k}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    q_blocks, k_blocks = -(-num_queries // block_q), -(-num_keys // block_k)
    level = 0
    while max(q_blocks, k_blocks) > _TOP * _FACTOR**level:
        level += 1
    step = _FACTOR**level
    row, column = (x.ravel() for x in np.indices((-(-q_blocks // step), -(-k_blocks // step)), np.int32))
    verdict = np.full(row.size, UNKNOWN, np.int8)
    while True:
        open_ = np.nonzero(verdict != FULL)[0]
        q, k = (num_queries, block_q * step), (num_keys, block_k * step)
        verdict[open_] = _judged(mask, row[open_], column[open_], q, k, step == 1)
        seen = verdict != EMPTY
        row, column, verdict = row[seen], column[seen], verdict[seen]
        if step == 1:
            break
        step //= _FACTOR
        children, there = _children(row, column, (_FACTOR, _FACTOR), -(-q_blocks // step), -(-k_blocks // step))
        row, column = (x[there] for x in children)
        verdict = np.repeat(verdict, _FACTOR**2)[there]
    order = np.argsort(row.astype(np.int64) * k_blocks + column, kind="stable")
    return _lists(q_blocks, k_blocks, np.bincount(row, minlength=q_blocks), column[order], verdict[order] == FULL)


def lower_heads(mask: Mask, num_queries: int, num_keys: int, block_q: int, block_k: int) -> tuple[BlockLists, ...]:
    """The lists of each head that has rules of its own, or the one of all; arguments as `lower`."""
    return tuple(lower(mask.head(h), num_queries, num_keys, block_q, block_k) for h in range(mask.heads))


def live_parts(
    mask: Mask, num_queries: int, num_keys: int, block_q: int, block_k: int, part_q: int, part_k: int
) -> np.ndarray:
    """Which parts of the blocks of `lower(mask, num_queries, num_keys, block_q, block_k)` hold an allowed pair.

    Exact as those are. The parts of a full block are not judged, so that the cost follows the border of the mask.

    Args:
      mask: as for `lower`, as are lengths and block sizes.
      num_queries: N.
      num_keys: M.
      block_q: queries of a block.
      block_k: keys of a block.
      part_q: queries of a part; a divisor of `block_q`.
      part_k: keys of a part; a divisor of `block_k`.

    Returns:
      (blocks, block_q // part_q, block_k // part_k) bool.

    Raises:
      ValueError: if a part does not divide its block.
    """
    for name, block, part in (("part_q", block_q, part_q), ("part_k", block_k, part_k)):
        if part < 1 or block % part:
            raise ValueError(f"{name} must divide the block of {block}, got {part}")
    lists = lower(mask, num_queries, num_keys, block_q, block_k)
    shape = block_q // part_q, block_k // part_k
    rows = np.repeat(np.arange(lists.num_q_blocks, dtype=np.int32), lists.counts)
    ends = -(-num_queries // part_q), -(-num_keys // part_k)
    (row, column), live = _children(rows, lists.key_blocks, shape, *ends)
    some = np.flatnonzero(live & np.repeat(~lists.is_full, shape[0] * shape[1]))
    live[some] = _judged(mask, row[some], column[some], (num_queries, part_q), (num_keys, part_k), True) != EMPTY
    return live.reshape(-1, *shape)


def pictured(mask: Mask, num_queries: int, num_keys: int, columns: int) -> str:
    """See `Mask.picture`."""
    block = max(1, -(-max(num_queries, num_keys) // columns))
    lists = lower_heads(mask, num_queries, num_keys, block, block)
    heads = [f"head {h}: " if len(lists) > 1 else "" for h in range(len(lists))]
    return "\n".join(f"{head}blocks of {block}: {one!r}" for head, one in zip(heads, lists, strict=True))


def plotted(mask: Mask, num_queries: int, num_keys: int, ax: "Axes | None") -> "Axes":
    """See `Mask.plot`."""
    import matplotlib.pyplot as plt

    block = max(1, -(-max(num_queries, num_keys) // 512))
    lists = lower(mask, num_queries, num_keys, block, block)
    image = np.zeros((lists.num_q_blocks, lists.num_k_blocks))
    rows = np.repeat(np.arange(lists.num_q_blocks), lists.counts)
    image[rows, lists.key_blocks] = np.where(lists.is_full, 1.0, 0.5)
    if ax is None:
        _, ax = plt.subplots(figsize=(4, 4))
    ax.imshow(image, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", extent=(0, num_keys, num_queries, 0))
    ax.set(xlabel="key", ylabel="query", title=f"{100 * lists.fraction:.3g} % of the blocks of {block}")
    return ax


def _children(
    row: np.ndarray, column: np.ndarray, factors: tuple[int, int], q_blocks: int, k_blocks: int
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Row and column of the smaller blocks that make these, and whether they are among those that exist."""
    inner = (x.ravel() for x in np.indices(factors, np.int32))
    row, column = ((x[:, None] * n + at).ravel() for x, n, at in zip((row, column), factors, inner, strict=True))
    return (row, column), (row < q_blocks) & (column < k_blocks)


def _judged(
    mask: Mask, row: np.ndarray, column: np.ndarray, q: tuple[int, int], k: tuple[int, int], settle: bool
) -> np.ndarray:
    """The verdict on blocks, q and k being length and block size; without UNKNOWN if it is to be settled."""
    verdict = np.zeros(row.size, np.int8)
    for at in range(0, row.size, _CHUNK):
        some = slice(at, at + _CHUNK)
        of_q = _block_intervals(row[some].astype(np.int64), q[1], q[0])
        of_k = _block_intervals(column[some].astype(np.int64), k[1], k[0])
        verdict[some] = mask.judge(of_q, of_k)
        if settle and mask.static:
            verdict[some] = _looked(mask, verdict[some], of_q, of_k)
        elif settle:
            verdict[some] = np.where(verdict[some] == UNKNOWN, PARTIAL, verdict[some])
    return verdict


def _looked(mask: Mask, verdict: np.ndarray, q: Interval, k: Interval) -> np.ndarray:
    """The verdict with its UNKNOWN blocks settled by their elements."""
    unknown = np.nonzero(verdict == UNKNOWN)[0]
    if not unknown.size:
        return verdict
    bounds = np.stack([q.lo[unknown], q.hi[unknown], k.lo[unknown], k.hi[unknown]])
    if mask.period is not None:  # blocks that are moved copies of each other are looked at once
        bounds = bounds - np.minimum(bounds[0], bounds[2]) // mask.period * mask.period
    bounds, copies = np.unique(bounds, axis=1, return_inverse=True)
    q_size, k_size = int((bounds[1] - bounds[0]).max()) + 1, int((bounds[3] - bounds[2]).max()) + 1
    together = max(1, _CHUNK // (q_size * k_size))
    found = np.zeros(bounds.shape[1], np.int8)
    for at in range(0, found.size, together):
        q_lo, q_hi, k_lo, k_hi = bounds[:, at : at + together, None]
        # A shorter last block repeats its last token, which changes neither "any" nor "all".
        q_idx = np.minimum(q_lo + np.arange(q_size), q_hi)[:, :, None]
        k_idx = np.minimum(k_lo + np.arange(k_size), k_hi)[:, None, :]
        allowed = np.asarray(mask(q_idx, k_idx))
        found[at : at + together] = np.where(allowed.all((1, 2)), FULL, np.where(allowed.any((1, 2)), PARTIAL, EMPTY))
    verdict = verdict.copy()
    verdict[unknown] = found[copies.reshape(-1)]
    return verdict


def _lists(q_blocks: int, k_blocks: int, counts: np.ndarray, key_blocks: np.ndarray, is_full: np.ndarray) -> BlockLists:
    arrays = np.append(0, np.cumsum(counts)).astype(np.int32), key_blocks.astype(np.int32), is_full.astype(bool)
    for array in arrays:  # they are shared by all callers
        array.setflags(write=False)
    return BlockLists(q_blocks, k_blocks, *arrays)


def _block_intervals(block: np.ndarray, size: int, length: int) -> Interval:
    return Interval(block * size, np.minimum(block * size + size, length) - 1)
