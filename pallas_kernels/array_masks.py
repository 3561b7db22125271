"""Masks that look at arrays beside indices: captured values of queries and keys, and choices per row.

They combine with the masks of `masks` by `&`, `|` and `~`, and their arrays may be traced. To be static in a compiled
function a mask must be a value that can be compared, which arrays are not: `split` takes the arrays out of a mask and
leaves numbered places. A tile is judged by the least and the largest value of its arrays, or by the choices of its
rows, without looking at its pairs; so tiles are skipped at run time.

    in_reach = ArrayMask(lambda i, j, reach: i - j <= reach, queries=(reach,))        reach (B, H, N)
    own_or_chosen = Causal() & (Block(c) | Chosen(table, c))                          table (B, H, N, M // c)
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.masks import (
    And,
    Causal,
    Full,
    Index,
    Mask,
    Not,
    Or,
    PerHead,
    Prefix,
    QueryPrefix,
    SlidingWindow,
)


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayMask(Mask):
    """A rule on indices and on values that queries and keys have.

    Attributes:
      rule: (q_idx, k_idx, *values of queries, *values of keys) -> booleans, written with `+ - < <= > >= == !=`,
        multiplication by numbers, and `& | ~` alone: it is evaluated on arrays, in kernels too, and on ranges, which
        gives the verdict on a whole tile. It is compared by identity: a function that is made anew compiles anew.
      queries: arrays (B|1, H|G|1, N), integer or float.
      keys: arrays (B|1, H|G|1, M).
    """

    rule: Callable[..., Any]
    queries: tuple[jax.Array, ...] = ()
    keys: tuple[jax.Array, ...] = ()

    @property
    def static(self) -> bool:
        return False

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        raise ValueError("ArrayMask looks at arrays: block_sparse_attention evaluates it")


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen(Mask):
    """Keys of the groups that each query chose.

    Attributes:
      table: booleans (B|1, H|G|1, N, S): which of the S groups a query sees.
      groups: keys per group, c, where key j is in group j // c; or the group of each key, integers (B|1, M), which may
        restart at segments; a group outside 0, …, S - 1 is seen by no query.
    """

    table: jax.Array
    groups: int | jax.Array

    @property
    def static(self) -> bool:
        return False

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        raise ValueError("Chosen looks at arrays: block_sparse_attention evaluates it")


RULES = "Full, Causal, SlidingWindow, Prefix, QueryPrefix, and &, |, ~ of these"


def at_positions(mask: Mask, queries: jax.Array, keys: jax.Array) -> ArrayMask:
    """A mask of indices asked of positions that tokens bring, in place of their indices.

    Args:
      mask: made of `Full`, `Causal`, `SlidingWindow`, `Prefix` and `QueryPrefix`.
      queries: positions of queries, integers (B|1, 1, N), at least 0.
      keys: those of keys, (B|1, 1, M).

    Raises:
      ValueError: for a mask of other parts.
    """
    return ArrayMask(_on_positions(mask), (queries,), (keys,))


@functools.lru_cache(maxsize=256)
def _on_positions(mask: Mask) -> Callable[[Any, Any, Any, Any], Any]:

    def build(mask: Mask) -> Callable[[Any, Any], Any]:
        match mask:
            case Full():
                return lambda q, k: (q >= 0) & (k >= 0)
            case Causal(offset):
                return lambda q, k: k - q <= offset
            case SlidingWindow(left, right):
                sides = [] if left is None else [lambda q, k: q - k <= left]
                sides += [] if right is None else [lambda q, k: k - q <= right]
                return functools.reduce(lambda a, b: lambda q, k: a(q, k) & b(q, k), [build(Full()), *sides])
            case Prefix(length):
                return lambda q, k: (k < length) & (q >= 0)
            case QueryPrefix(length):
                return lambda q, k: (q < length) & (k >= 0)
            case And(first, second):
                a, b = build(first), build(second)
                return lambda q, k: a(q, k) & b(q, k)
            case Or(first, second):
                a, b = build(first), build(second)
                return lambda q, k: a(q, k) | b(q, k)
            case Not(inner):
                a = build(inner)
                return lambda q, k: ~a(q, k)
        raise ValueError(f"mask must be made of {RULES}, to be asked of positions, got {type(mask).__name__}")

    rule = build(mask)
    return lambda i, j, q, k: rule(q, k)


@dataclasses.dataclass(frozen=True)
class Place(Mask):
    """Where a mask with arrays was in a mask that `split` took apart; of an `ArrayMask` the rule stays."""

    number: int
    rule: Callable[..., Any] | None = None

    @property
    def static(self) -> bool:
        return False


class Values(NamedTuple):
    """The arrays of one place: those of an `ArrayMask`, or the table and the groups (B|1, M) of a `Chosen`."""

    queries: tuple[jax.Array, ...] = ()
    keys: tuple[jax.Array, ...] = ()
    table: jax.Array | None = None
    groups: jax.Array | None = None


def split(mask: Mask, num_keys: int) -> tuple[Mask, tuple[Values, ...]]:
    """The mask with a `Place` for each mask that has arrays, and their arrays."""
    values: list[Values] = []

    def walk(mask: Mask) -> Mask:
        match mask:
            case ArrayMask():
                values.append(Values(tuple(map(jnp.asarray, mask.queries)), tuple(map(jnp.asarray, mask.keys))))
                return Place(len(values) - 1, mask.rule)
            case Chosen():
                groups = mask.groups
                is_size = not isinstance(groups, jax.Array | np.ndarray)
                groups = (jnp.arange(num_keys) // operator.index(groups))[None] if is_size else jnp.asarray(groups)
                values.append(Values(table=jnp.asarray(mask.table), groups=groups))
                return Place(len(values) - 1)
            case And() | Or():
                return type(mask)(walk(mask.first), walk(mask.second))
            case Not():
                return Not(walk(mask.mask))
            case PerHead():
                if not mask.static:
                    raise ValueError("PerHead takes masks of indices; arrays of an ArrayMask may differ by head")
        return mask

    return walk(mask), tuple(values)


def rule_of(mask: Mask, number: int) -> Callable[..., Any]:
    """The rule at a place of a mask that was split.

    Raises:
      KeyError: if there is no such place, or it is one of choices.
    """
    found: dict[int, Callable[..., Any] | None] = {}

    def walk(mask: Mask) -> None:
        match mask:
            case Place():
                found[mask.number] = mask.rule
            case And() | Or():
                walk(mask.first)
                walk(mask.second)
            case Not():
                walk(mask.mask)

    walk(mask)
    rule = found[number]
    if rule is None:
        raise KeyError(number)
    return rule


def allowed(mask: Mask, q_idx: Index, k_idx: Index, places: Sequence[Callable[[], Index]]) -> Index:
    """Booleans of pairs, of a mask that was split and has one rule for all heads.

    Args:
      mask: what `split` gave.
      q_idx: indices of queries.
      k_idx: indices of keys.
      places: for each place, what gives its booleans.
    """
    match mask:
        case Place():
            return places[mask.number]()
        case And() | Or() if not mask.static:
            both = (allowed(part, q_idx, k_idx, places) for part in (mask.first, mask.second))
            return next(both) & next(both) if isinstance(mask, And) else next(both) | next(both)
        case Not() if not mask.static:
            return ~allowed(mask.mask, q_idx, k_idx, places)
    return mask(q_idx, k_idx)


class Verdict(NamedTuple):
    """What is known of a tile: whether it may hold an allowed pair, and whether all are allowed for certain."""

    any: Any
    all: Any

    def __and__(self, other: "Verdict") -> "Verdict":
        return Verdict(self.any & other.any, self.all & other.all)

    def __or__(self, other: "Verdict") -> "Verdict":
        return Verdict(self.any | other.any, self.all | other.all)

    def __invert__(self) -> "Verdict":
        return Verdict(~self.all, ~self.any)


def judged(mask: Mask, static: Callable[[Mask], Verdict], places: Sequence[Callable[[], Verdict]]) -> Verdict:
    """The verdict on tiles of a mask that was split; the counterpart of `allowed`.

    Args:
      mask: what `split` gave.
      static: gives the verdict of a part that looks at indices alone.
      places: for each place, what gives its verdict.
    """
    match mask:
        case Place():
            return places[mask.number]()
        case And() | Or() if not mask.static:
            both = (judged(part, static, places) for part in (mask.first, mask.second))
            return next(both) & next(both) if isinstance(mask, And) else next(both) | next(both)
        case Not() if not mask.static:
            return ~judged(mask.mask, static, places)
    return static(mask)


class Range:
    """Numbers from `lo` to `hi`, of which nothing else is known; comparisons give a `Verdict`."""

    def __init__(self, lo: Any, hi: Any) -> None:
        self.lo, self.hi = lo, hi

    @classmethod
    def of(cls, value: Any) -> "Range":
        """A number as a range."""
        return value if isinstance(value, Range) else cls(value, value)

    def __add__(self, other: Any) -> "Range":
        other = Range.of(other)
        return Range(self.lo + other.lo, self.hi + other.hi)

    def __neg__(self) -> "Range":
        return Range(-self.hi, -self.lo)

    def __sub__(self, other: Any) -> "Range":
        return self + -Range.of(other)

    def __rsub__(self, other: Any) -> "Range":
        return Range.of(other) + -self

    def __mul__(self, factor: float) -> "Range":
        if isinstance(factor, Range):
            raise TypeError("the rule of an ArrayMask may multiply by numbers alone, that its ranges stay exact")
        return Range(self.lo * factor, self.hi * factor) if factor >= 0 else -self * -factor

    __radd__, __rmul__ = __add__, __mul__

    def __le__(self, other: Any) -> Verdict:
        other = Range.of(other)
        return Verdict(self.lo <= other.hi, self.hi <= other.lo)

    def __lt__(self, other: Any) -> Verdict:
        other = Range.of(other)
        return Verdict(self.lo < other.hi, self.hi < other.lo)

    def __ge__(self, other: Any) -> Verdict:
        return Range.of(other) <= self

    def __gt__(self, other: Any) -> Verdict:
        return Range.of(other) < self

    def __eq__(self, other: Any) -> Verdict:  # type: ignore[override]
        return (self <= other) & (self >= other)

    def __ne__(self, other: Any) -> Verdict:  # type: ignore[override]
        return ~(self == other)

    __hash__ = None  # type: ignore[assignment]
