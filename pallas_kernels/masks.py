"""Structural masks: which query may attend to which key, as a rule on their indices rather than an array.

A mask is a small frozen dataclass. It is hashable, so it can be a static argument of `jax.jit`; it is evaluated on
integer arrays of NumPy or JAX, inside a kernel too; and masks combine with `&`, `|` and `~`:

    prefix_lm = Causal() | Prefix(64)
    longformer = SlidingWindow(256, 256) | Prefix(4) | QueryPrefix(4)

`block_lists.lower` turns a mask into lists of blocks. Whole blocks are judged here by interval arithmetic, in
three-valued logic; elements are looked at only where that cannot decide, so that a mask of a million tokens is lowered
without ever being built. Masks by blocks of tokens are in `block_masks`, of tokens on grids in `grid_masks`; those that
look at arrays, beside indices, in `array_masks`.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Index = np.ndarray | jax.Array
"""Integer indices; those of queries and of keys broadcast against each other."""

EMPTY, PARTIAL, FULL, UNKNOWN = 0, 1, 2, 3
"""What a mask says about a block; UNKNOWN where interval arithmetic cannot tell."""


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

    @property
    def heads(self) -> int:
        """Heads that have rules of their own; 1 where all share one."""
        return 1

    def head(self, number: int) -> "Mask":
        """The rule of one head."""
        return self

    @property
    def static(self) -> bool:
        """Whether it looks at indices alone, not at arrays."""
        return True

    @property
    def period(self) -> int | None:
        """Some p such that queries and keys that both move by p see what they saw; None where none is known."""
        return None

    def dense(self, num_queries: int, num_keys: int | None = None) -> np.ndarray:
        """The mask as a boolean array (N, M); M = N when None."""
        num_keys = num_queries if num_keys is None else num_keys
        return np.asarray(self(np.arange(num_queries)[:, None], np.arange(num_keys)[None, :]))

    def picture(self, num_queries: int, num_keys: int | None = None, *, columns: int = 32) -> str:
        """A text picture of blocks with the sparsity; see `block_lists.BlockLists`.

        Args:
          num_queries: N.
          num_keys: M; N when None.
          columns: blocks of keys at most.
        """
        from pallas_kernels.block_lists import pictured

        return pictured(self, num_queries, num_queries if num_keys is None else num_keys, columns)

    def plot(self, num_queries: int, num_keys: int | None = None, *, ax: "Axes | None" = None) -> "Axes":
        """Draws who sees whom with matplotlib, which must be installed; one panel shows the first head.

        Args:
          num_queries: N.
          num_keys: M; N when None.
          ax: axes to draw into; new ones when None.
        """
        from pallas_kernels.block_lists import plotted

        return plotted(self.head(0), num_queries, num_queries if num_keys is None else num_keys, ax)

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> "Mask":
        return Not(self)


@dataclasses.dataclass(frozen=True)
class _Pair(Mask):
    """Two masks that are combined."""

    first: Mask
    second: Mask

    @property
    def heads(self) -> int:
        a, b = self.first.heads, self.second.heads
        if a != b and 1 not in (a, b):
            raise ValueError(f"masks that are combined must agree in heads, got {a} and {b}")
        return max(a, b)

    def head(self, number: int) -> Mask:
        return self if self.heads == 1 else type(self)(self.first.head(number), self.second.head(number))

    @property
    def static(self) -> bool:
        return self.first.static and self.second.static

    @property
    def period(self) -> int | None:
        return _common(self.first.period, self.second.period)


@dataclasses.dataclass(frozen=True)
class And(_Pair):
    """Pairs that both masks allow; written `first & second`."""

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return self.first(q_idx, k_idx) & self.second(q_idx, k_idx)

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        a, b = self.first.judge(q, k), self.second.judge(q, k)
        known = np.where(a == FULL, b, np.where(b == FULL, a, UNKNOWN))
        return np.where((a == EMPTY) | (b == EMPTY), EMPTY, known).astype(np.int8)


@dataclasses.dataclass(frozen=True)
class Or(_Pair):
    """Pairs that either mask allows; written `first | second`."""

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

    @property
    def heads(self) -> int:
        return self.mask.heads

    def head(self, number: int) -> Mask:
        return self if self.heads == 1 else Not(self.mask.head(number))

    @property
    def static(self) -> bool:
        return self.mask.static

    @property
    def period(self) -> int | None:
        return self.mask.period

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return self.mask(q_idx, k_idx) ^ True

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        return np.array([FULL, PARTIAL, EMPTY, UNKNOWN], np.int8)[self.mask.judge(q, k)]


@dataclasses.dataclass(frozen=True)
class Transposed(Mask):
    """Queries and keys swapped: who is seen by whom."""

    mask: Mask

    @property
    def heads(self) -> int:
        return self.mask.heads

    def head(self, number: int) -> Mask:
        return self if self.heads == 1 else Transposed(self.mask.head(number))

    @property
    def static(self) -> bool:
        return self.mask.static

    @property
    def period(self) -> int | None:
        return self.mask.period

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return self.mask(k_idx, q_idx)

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        return self.mask.judge(k, q)


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every pair; `~Full()` is none."""

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return (q_idx == q_idx) & (k_idx == k_idx)

    @property
    def period(self) -> int | None:
        return 1

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        return np.full(np.broadcast_shapes(q.lo.shape, k.lo.shape), FULL, np.int8)


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Keys up to the query: k ≤ q + offset. With M keys for the last N of M queries, `offset` is M - N."""

    offset: int = 0

    def __post_init__(self) -> None:
        require_int(self, "offset")

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return k_idx <= q_idx + self.offset

    @property
    def period(self) -> int | None:
        return 1

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        return three_valued(k.lo > q.hi + self.offset, k.hi <= q.lo + self.offset)


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
                require_int(self, side)
        if self.left is not None and self.right is not None and -self.left > self.right:
            raise ValueError(f"SlidingWindow holds no key: left={self.left}, right={self.right}; use ~Full()")

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        offset = k_idx - q_idx
        inside = offset == offset
        if self.left is not None:
            inside = inside & (offset >= -self.left)
        return inside if self.right is None else inside & (offset <= self.right)

    @property
    def period(self) -> int | None:
        return 1

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        lo, hi = k.lo - q.hi, k.hi - q.lo  # of k - q, every integer between them occurs
        low = -math.inf if self.left is None else -self.left
        high = math.inf if self.right is None else self.right
        return three_valued((hi < low) | (lo > high), (lo >= low) & (hi <= high))


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """The first `length` keys, for every query."""

    length: int

    def __post_init__(self) -> None:
        require_int(self, "length", least=0)

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return (k_idx < self.length) & (q_idx == q_idx)

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        return three_valued((k.lo >= self.length) & (q.lo == q.lo), k.hi < self.length)


@dataclasses.dataclass(frozen=True)
class QueryPrefix(Mask):
    """Every key, for the first `length` queries: with `Prefix`, global tokens."""

    length: int

    def __post_init__(self) -> None:
        require_int(self, "length", least=0)

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return (q_idx < self.length) & (k_idx == k_idx)

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        return three_valued((q.lo >= self.length) & (k.lo == k.lo), q.hi < self.length)


@dataclasses.dataclass(frozen=True)
class Strided(Mask):
    """Keys at a multiple of `stride` from the query, plus `phase`: (q - k) mod stride = phase."""

    stride: int
    phase: int = 0

    def __post_init__(self) -> None:
        require_int(self, "stride", least=1)
        require_int(self, "phase", least=0, below=self.stride)

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        # Of numbers that are not negative, for which kernels have a division.
        return (
            remainder(remainder(q_idx, self.stride) - remainder(k_idx, self.stride) + self.stride, self.stride)
            == self.phase
        )

    @property
    def period(self) -> int | None:
        return 1

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        return _every(Interval(q.lo - k.hi, q.hi - k.lo), self.stride, self.phase)


@dataclasses.dataclass(frozen=True)
class Columns(Mask):
    """Every `stride`-th key, from key `phase` on, for every query: k mod stride = phase."""

    stride: int
    phase: int = 0

    def __post_init__(self) -> None:
        require_int(self, "stride", least=1)
        require_int(self, "phase", least=0, below=self.stride)

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return (remainder(k_idx, self.stride) == self.phase) & (q_idx == q_idx)

    @property
    def period(self) -> int | None:
        return self.stride

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        zero = q.lo - q.lo
        return _every(Interval(k.lo + zero, k.hi + zero), self.stride, self.phase)


@dataclasses.dataclass(frozen=True)
class PerHead(Mask):
    """A rule of its own for each head; combines with other masks like any.

    Attributes:
      masks: one per query head.
    """

    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        if not self.masks or any(not isinstance(mask, Mask) or mask.heads != 1 for mask in self.masks):
            raise ValueError(f"PerHead needs one mask per head, got {self.masks}")

    @property
    def heads(self) -> int:
        return len(self.masks)

    def head(self, number: int) -> Mask:
        return self.masks[number]

    @property
    def static(self) -> bool:
        return all(mask.static for mask in self.masks)

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        raise ValueError("PerHead has a rule per head: ask one of them, as in mask.head(0)(q_idx, k_idx)")


@dataclasses.dataclass(frozen=True)
class Concatenated(Mask):
    """Keys of several sources behind each other, each with a rule on its own indices.

    Attributes:
      masks: one per source.
      lengths: keys of each source; further keys are seen by no query.
    """

    masks: tuple[Mask, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.masks) != len(self.lengths) or not self.masks or min(self.lengths) < 1:
            raise ValueError(f"Concatenated needs a length of at least 1 per mask, got {self.masks}, {self.lengths}")
        if any(mask.heads != 1 or not mask.static for mask in self.masks):
            raise ValueError("Concatenated takes masks of indices that all heads share; put it inside of PerHead")

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        allowed = (q_idx != q_idx) & (k_idx != k_idx)
        for mask, first, last in self._sources():
            allowed = allowed | ((k_idx >= first) & (k_idx <= last) & mask(q_idx, k_idx - first))
        return allowed

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        shape = np.broadcast_shapes(q.lo.shape, k.lo.shape)
        empty, full, inside = np.ones(shape, bool), np.ones(shape, bool), np.zeros(shape, int)
        alone = np.full(shape, EMPTY, np.int8)
        for mask, first, last in self._sources():
            touched = (k.hi >= first) & (k.lo <= last)
            part = Interval(np.clip(k.lo - first, 0, last - first), np.clip(k.hi - first, 0, last - first))
            its = mask.judge(q, part)
            empty, full = empty & (~touched | (its == EMPTY)), full & (~touched | (its == FULL))
            inside = inside + np.where(touched, part.hi - part.lo + 1, 0)
            alone = np.where((k.lo >= first) & (k.hi <= last), its, np.where(touched, UNKNOWN, alone))
        full = full & (inside == k.hi - k.lo + 1)
        return np.where(empty, EMPTY, np.where(full, FULL, np.where(alone == FULL, UNKNOWN, alone))).astype(np.int8)

    def _sources(self) -> Iterator[tuple[Mask, int, int]]:
        first = 0
        for mask, length in zip(self.masks, self.lengths, strict=True):
            yield mask, first, first + length - 1
            first += length


def _common(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else math.lcm(a, b)


def quotient(x: Index, size: int) -> Index:
    """x // size for x of at least 0."""
    return jax.lax.div(x, jnp.full_like(x, size)) if isinstance(x, jax.Array) else x // size


def remainder(x: Index, size: int) -> Index:
    """x mod size for x of at least 0."""
    return jax.lax.rem(x, jnp.full_like(x, size)) if isinstance(x, jax.Array) else x % size


def three_valued(empty: np.ndarray, full: np.ndarray) -> np.ndarray:
    """`EMPTY`, `FULL` or `PARTIAL` for each block, of what is known of it."""
    return np.where(empty, EMPTY, np.where(full, FULL, PARTIAL)).astype(np.int8)


def _every(x: Interval, stride: int, phase: int) -> np.ndarray:
    """The verdict of `x mod stride = phase` on intervals."""
    count = (x.hi - phase) // stride - (x.lo - 1 - phase) // stride
    return three_valued(count == 0, count == x.hi - x.lo + 1)


def require_int(mask: Mask, name: str, *, least: int | None = None, below: int | None = None) -> None:
    """Raises for a field that is no integer (`TypeError`) or out of its range (`ValueError`)."""
    value = getattr(mask, name)
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{type(mask).__name__}: {name} must be an int, got {type(value).__name__}")
    if (least is not None and value < least) or (below is not None and value >= below):
        bounds = f"at least {least}" + ("" if below is None else f" and below {below}")
        raise ValueError(f"{type(mask).__name__}: {name} must be {bounds}, got {value}")
