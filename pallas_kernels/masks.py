"""Structural masks: which query may attend to which key, as a rule on their indices rather than an array.

A mask is a small frozen dataclass. It is hashable, so it can be a static argument of `jax.jit`; it is evaluated on
integer arrays of NumPy or JAX, inside a kernel too; and masks combine with `&`, `|` and `~`:

    prefix_lm = Causal() | Prefix(64)
    longformer = SlidingWindow(256, 256) | Prefix(4) | QueryPrefix(4)

`lower` turns a mask into lists of blocks, once: for each block of queries the blocks of keys that hold an allowed pair,
and which of them are allowed throughout, so that a kernel skips the empty ones and masks only the partial ones. Whole
blocks are judged by interval arithmetic, in three-valued logic; elements are looked at only where that cannot decide,
so that a mask of a million tokens is lowered without ever being built.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

Index = np.ndarray | jax.Array
"""Integer indices; those of queries and of keys broadcast against each other."""

EMPTY, PARTIAL, FULL, UNKNOWN = 0, 1, 2, 3
"""What a mask says about a block; UNKNOWN where interval arithmetic cannot tell."""

_CHUNK = 1 << 22  # elements, or blocks, looked at together: tens of megabytes


class Interval(NamedTuple):
    """Integers lo, lo + 1, …, hi (included), elementwise over arrays of blocks."""

    lo: np.ndarray
    hi: np.ndarray


class Mask:
    """Base of masks: `mask(q_idx, k_idx)` is True where query `q_idx` may attend to key `k_idx`."""

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        """Booleans of the shape that the indices broadcast to."""
        raise NotImplementedError

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        """EMPTY, PARTIAL, FULL or UNKNOWN for blocks of all queries in `q` by all keys in `k`; intervals broadcast.

        EMPTY and FULL must also be right for any subset of such a block.
        """
        return np.full(np.broadcast_shapes(q.lo.shape, k.lo.shape), UNKNOWN, np.int8)

    def dense(self, num_queries: int, num_keys: int | None = None) -> np.ndarray:
        """The mask as a boolean array (N, M); M = N when None."""
        num_keys = num_queries if num_keys is None else num_keys
        return np.asarray(self(np.arange(num_queries)[:, None], np.arange(num_keys)[None, :]))

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> "Mask":
        return Not(self)


@dataclasses.dataclass(frozen=True)
class And(Mask):
    """Pairs that both masks allow; written `first & second`."""

    first: Mask
    second: Mask

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return self.first(q_idx, k_idx) & self.second(q_idx, k_idx)

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        a, b = self.first.judge(q, k), self.second.judge(q, k)
        known = np.where(a == FULL, b, np.where(b == FULL, a, UNKNOWN))
        return np.where((a == EMPTY) | (b == EMPTY), EMPTY, known).astype(np.int8)


@dataclasses.dataclass(frozen=True)
class Or(Mask):
    """Pairs that either mask allows; written `first | second`."""

    first: Mask
    second: Mask

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return self.first(q_idx, k_idx) | self.second(q_idx, k_idx)

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        a, b = self.first.judge(q, k), self.second.judge(q, k)
        known = np.where(a == EMPTY, b, np.where(b == EMPTY, a, UNKNOWN))
        return np.where((a == FULL) | (b == FULL), FULL, known).astype(np.int8)


@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """Pairs that the mask does not allow; written `~mask`."""

    mask: Mask

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return self.mask(q_idx, k_idx) ^ True

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        return np.array([FULL, PARTIAL, EMPTY, UNKNOWN], np.int8)[self.mask.judge(q, k)]


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every pair; `~Full()` is none."""

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return (q_idx == q_idx) & (k_idx == k_idx)

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        return np.full(np.broadcast_shapes(q.lo.shape, k.lo.shape), FULL, np.int8)


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Keys up to the query: k ≤ q + offset. With M keys for the last N of M queries, `offset` is M - N."""

    offset: int = 0

    def __post_init__(self) -> None:
        _require_int(self, "offset")

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return k_idx <= q_idx + self.offset

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        return _three(k.lo > q.hi + self.offset, k.hi <= q.lo + self.offset)


@dataclasses.dataclass(frozen=True)
class SlidingWindow(Mask):
    """Keys around the query: -left ≤ k - q ≤ right, without a bound on the side that is None.

    `SlidingWindow(w - 1, 0)` is the causal window of w keys.
    """

    left: int | None
    right: int | None

    def __post_init__(self) -> None:
        for side in ("left", "right"):
            if getattr(self, side) is not None:
                _require_int(self, side)
        if self.left is not None and self.right is not None and -self.left > self.right:
            raise ValueError(f"SlidingWindow holds no key: left={self.left}, right={self.right}; use ~Full()")

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        offset = k_idx - q_idx
        inside = offset == offset
        if self.left is not None:
            inside = inside & (offset >= -self.left)
        return inside if self.right is None else inside & (offset <= self.right)

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        lo, hi = k.lo - q.hi, k.hi - q.lo  # of k - q, every integer between them occurs
        low = -math.inf if self.left is None else -self.left
        high = math.inf if self.right is None else self.right
        return _three((hi < low) | (lo > high), (lo >= low) & (hi <= high))


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """The first `length` keys, for every query."""

    length: int

    def __post_init__(self) -> None:
        _require_int(self, "length", least=0)

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return (k_idx < self.length) & (q_idx == q_idx)

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        return _three((k.lo >= self.length) & (q.lo == q.lo), k.hi < self.length)


@dataclasses.dataclass(frozen=True)
class QueryPrefix(Mask):
    """Every key, for the first `length` queries: with `Prefix`, global tokens."""

    length: int

    def __post_init__(self) -> None:
        _require_int(self, "length", least=0)

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return (q_idx < self.length) & (k_idx == k_idx)

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        return _three((q.lo >= self.length) & (k.lo == k.lo), q.hi < self.length)


@dataclasses.dataclass(frozen=True)
class Strided(Mask):
    """Keys at a multiple of `stride` from the query, plus `phase`: (q - k) mod stride = phase."""

    stride: int
    phase: int = 0

    def __post_init__(self) -> None:
        _require_int(self, "stride", least=1)
        _require_int(self, "phase", least=0, below=self.stride)

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return (q_idx - k_idx) % self.stride == self.phase

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        return _every(Interval(q.lo - k.hi, q.hi - k.lo), self.stride, self.phase)


@dataclasses.dataclass(frozen=True)
class Columns(Mask):
    """Every `stride`-th key, from key `phase` on, for every query: k mod stride = phase."""

    stride: int
    phase: int = 0

    def __post_init__(self) -> None:
        _require_int(self, "stride", least=1)
        _require_int(self, "phase", least=0, below=self.stride)

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return (k_idx % self.stride == self.phase) & (q_idx == q_idx)

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        zero = q.lo - q.lo
        return _every(Interval(k.lo + zero, k.hi + zero), self.stride, self.phase)


@dataclasses.dataclass(frozen=True)
class Block(Mask):
    """Keys in the query's own block of `size` tokens: q // size = k // size."""

    size: int

    def __post_init__(self) -> None:
        _require_int(self, "size", least=1)

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return q_idx // self.size == k_idx // self.size

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        q, k = (Interval(x.lo // self.size, x.hi // self.size) for x in (q, k))
        return _three((k.lo > q.hi) | (k.hi < q.lo), (q.lo == k.hi) & (k.lo == q.hi))


@dataclasses.dataclass(frozen=True)
class BlockCausal(Mask):
    """Keys in the query's own and in earlier blocks of `size` tokens: k // size ≤ q // size."""

    size: int

    def __post_init__(self) -> None:
        _require_int(self, "size", least=1)

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return k_idx // self.size <= q_idx // self.size

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        q, k = (Interval(x.lo // self.size, x.hi // self.size) for x in (q, k))
        return _three(k.lo > q.hi, k.hi <= q.lo)


@dataclasses.dataclass(frozen=True)
class Grid(Mask):
    """Tokens of a grid in row-major order: a pair is allowed where the mask of every axis allows its coordinates.

    Attributes:
      shape: lengths of the axes, of queries and keys alike, outermost first.
      masks: one per axis, on coordinates along that axis.
    """

    shape: tuple[int, ...]
    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.masks) or not self.masks:
            raise ValueError(f"Grid needs one mask per axis, got shape {self.shape} and {len(self.masks)} masks")

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        allowed = Full()(q_idx, k_idx)
        for mask, length, stride in self._axes():
            allowed = allowed & mask(q_idx // stride % length, k_idx // stride % length)
        return allowed

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        verdict = Full().judge(q, k)
        for mask, length, stride in self._axes():
            axis = mask.judge(*(_coordinates(x, length, stride) for x in (q, k)))
            axis = np.where(axis == PARTIAL, UNKNOWN, axis)  # coordinates of a block are a subset of their product
            verdict = np.where((verdict == EMPTY) | (axis == EMPTY), EMPTY, np.maximum(verdict, axis))
        return verdict.astype(np.int8)

    def _axes(self) -> Iterator[tuple[Mask, int, int]]:
        for axis, (mask, length) in enumerate(zip(self.masks, self.shape, strict=True)):
            yield mask, length, math.prod(self.shape[axis + 1 :])


@dataclasses.dataclass(frozen=True, eq=False)
class BlockLists:
    """A mask lowered to blocks: those that are not empty, sorted by query block, then key block.

    The last block of an axis is shorter where the block size does not divide the length; it is judged by the tokens
    that exist.

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

    def transpose(self) -> "BlockLists":
        """The same blocks listed per key block, for the gradients of keys and values."""
        q_blocks = np.repeat(np.arange(self.num_q_blocks, dtype=np.int32), self.counts)
        order = np.argsort(self.key_blocks, kind="stable")
        counts = np.bincount(self.key_blocks, minlength=self.num_k_blocks)
        return _lists(self.num_k_blocks, self.num_q_blocks, counts, q_blocks[order], self.is_full[order])


@functools.lru_cache(maxsize=256)
def lower(mask: Mask, num_queries: int, num_keys: int, block_q: int, block_k: int) -> BlockLists:
    """Lowers `mask` for N queries and M keys to lists of blocks; exact, and remembered for equal arguments.

    Args:
      mask: which pairs are allowed.
      num_queries: N.
      num_keys: M.
      block_q: queries of a block.
      block_k: keys of a block.

    Raises:
      TypeError: if `mask` is not a `Mask`.
      ValueError: for a length or block size below 1.
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"mask must be a Mask, got {type(mask).__name__}")
    sizes = {"num_queries": num_queries, "num_keys": num_keys, "block_q": block_q, "block_k": block_k}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    q_blocks, k_blocks = -(-num_queries // block_q), -(-num_keys // block_k)
    k = _block_intervals(np.arange(k_blocks), block_k, num_keys)
    counts, found, full = [], [], []
    rows = max(1, _CHUNK // k_blocks)
    for first in range(0, q_blocks, rows):
        q = _block_intervals(np.arange(first, min(first + rows, q_blocks))[:, None], block_q, num_queries)
        verdict = np.array(mask.judge(q, k))
        _look(mask, verdict, q, k)
        counts.append((verdict != EMPTY).sum(1))
        found.append(np.nonzero(verdict)[1])
        full.append(verdict[verdict != EMPTY] == FULL)
    return _lists(q_blocks, k_blocks, *(np.concatenate(x) for x in (counts, found, full)))


def _look(mask: Mask, verdict: np.ndarray, q: Interval, k: Interval) -> None:
    """Settles the UNKNOWN blocks of `verdict` by their elements."""
    row, column = np.nonzero(verdict == UNKNOWN)
    if not row.size:
        return
    q_size, k_size = int((q.hi - q.lo).max()) + 1, int((k.hi - k.lo).max()) + 1
    together = max(1, _CHUNK // (q_size * k_size))
    for at in range(0, row.size, together):
        i, j = row[at : at + together], column[at : at + together]
        # A shorter last block repeats its last token, which changes neither "any" nor "all".
        q_idx = np.minimum(q.lo[i] + np.arange(q_size), q.hi[i])[:, :, None]
        k_idx = np.minimum(k.lo[j][:, None] + np.arange(k_size), k.hi[j][:, None])[:, None, :]
        allowed = np.asarray(mask(q_idx, k_idx))
        verdict[i, j] = np.where(allowed.all((1, 2)), FULL, np.where(allowed.any((1, 2)), PARTIAL, EMPTY))


def _lists(q_blocks: int, k_blocks: int, counts: np.ndarray, key_blocks: np.ndarray, is_full: np.ndarray) -> BlockLists:
    arrays = np.append(0, np.cumsum(counts)).astype(np.int32), key_blocks.astype(np.int32), is_full.astype(bool)
    for array in arrays:  # they are shared by all callers
        array.setflags(write=False)
    return BlockLists(q_blocks, k_blocks, *arrays)


def _block_intervals(block: np.ndarray, size: int, length: int) -> Interval:
    return Interval(block * size, np.minimum(block * size + size, length) - 1)


def _coordinates(x: Interval, length: int, stride: int) -> Interval:
    """An interval that holds the coordinates, along one axis, of the flat indices of `x`."""
    lo, hi = x.lo // stride, x.hi // stride
    wraps = lo // length != hi // length
    return Interval(np.where(wraps, 0, lo % length), np.where(wraps, length - 1, hi % length))


def _three(empty: np.ndarray, full: np.ndarray) -> np.ndarray:
    return np.where(empty, EMPTY, np.where(full, FULL, PARTIAL)).astype(np.int8)


def _every(x: Interval, stride: int, phase: int) -> np.ndarray:
    """The verdict of `x mod stride = phase` on intervals."""
    count = (x.hi - phase) // stride - (x.lo - 1 - phase) // stride
    return _three(count == 0, count == x.hi - x.lo + 1)


def _require_int(mask: Mask, name: str, *, least: int | None = None, below: int | None = None) -> None:
    value = getattr(mask, name)
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{type(mask).__name__}: {name} must be an int, got {type(value).__name__}")
    if (least is not None and value < least) or (below is not None and value >= below):
        bounds = f"at least {least}" + ("" if below is None else f" and below {below}")
        raise ValueError(f"{type(mask).__name__}: {name} must be {bounds}, got {value}")
