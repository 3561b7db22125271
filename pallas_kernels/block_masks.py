"""Masks by blocks of tokens: the same block, blocks before, windows of blocks, staircases, a table of blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.masks import Index, Interval, Mask, SlidingWindow, quotient, require_int, three_valued


@dataclasses.dataclass(frozen=True)
class Block(Mask):
    """Keys in the query's own block of `size` tokens: q // size = k // size."""

    size: int

    def __post_init__(self) -> None:
        require_int(self, "size", least=1)

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return quotient(q_idx, self.size) == quotient(k_idx, self.size)

    @property
    def period(self) -> int | None:
        return self.size

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        q, k = (Interval(x.lo // self.size, x.hi // self.size) for x in (q, k))
        return three_valued((k.lo > q.hi) | (k.hi < q.lo), (q.lo == k.hi) & (k.lo == q.hi))


@dataclasses.dataclass(frozen=True)
class BlockCausal(Mask):
    """Keys in the query's own and in earlier blocks of `size` tokens: k // size ≤ q // size."""

    size: int

    def __post_init__(self) -> None:
        require_int(self, "size", least=1)

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return quotient(k_idx, self.size) <= quotient(q_idx, self.size)

    @property
    def period(self) -> int | None:
        return self.size

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        q, k = (Interval(x.lo // self.size, x.hi // self.size) for x in (q, k))
        return three_valued(k.lo > q.hi, k.hi <= q.lo)


@dataclasses.dataclass(frozen=True)
class BlockWindow(Mask):
    """Keys in blocks around the query's own block of `size` tokens: -before ≤ k // size - q // size ≤ after."""

    size: int
    before: int
    after: int

    def __post_init__(self) -> None:
        require_int(self, "size", least=1)
        require_int(self, "before", least=0)
        require_int(self, "after", least=0)

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        offset = quotient(k_idx, self.size) - quotient(q_idx, self.size)
        return (offset >= -self.before) & (offset <= self.after)

    @property
    def period(self) -> int | None:
        return self.size

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        q, k = (Interval(x.lo // self.size, x.hi // self.size) for x in (q, k))
        return SlidingWindow(self.before, self.after).judge(q, k)


@dataclasses.dataclass(frozen=True)
class Staircase(Mask):
    """Keys from a stair on: k ≥ step · ⌊(q - width) / step⌋; `~Staircase(...)` are the keys before it.

    `Causal() & Staircase(step, width)` sees the last keys, `width` at least; what lies before them falls into whole
    runs of `step` keys, of which summaries can be made once.
    """

    step: int
    width: int

    def __post_init__(self) -> None:
        require_int(self, "step", least=1)
        require_int(self, "width")

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        stairs = -(-self.width // self.step) if self.width > 0 else 0  # so that nothing negative is divided
        return k_idx >= (quotient(q_idx - self.width + stairs * self.step, self.step) - stairs) * self.step

    @property
    def period(self) -> int | None:
        return self.step

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        first, last = ((x - self.width) // self.step * self.step for x in (q.lo, q.hi))
        return three_valued(k.hi < first, k.lo >= last)


@dataclasses.dataclass(frozen=True)
class BlockArray(Mask):
    """Pairs of blocks that a boolean array allows; made by `block_array`.

    Attributes:
      data: the array in row-major order, a byte for each block.
      shape: blocks of queries and of keys; pairs beyond them are not allowed.
      block_q: queries of a block.
      block_k: keys of a block.
    """

    data: bytes = dataclasses.field(repr=False)
    shape: tuple[int, int]
    block_q: int
    block_k: int

    def __post_init__(self) -> None:
        require_int(self, "block_q", least=1)
        require_int(self, "block_k", least=1)

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        i, j = q_idx // self.block_q, k_idx // self.block_k
        lib = (
            np if isinstance(i, np.ndarray | np.generic | int) and isinstance(j, np.ndarray | np.generic | int) else jnp
        )
        inside = (i < self.shape[0]) & (j < self.shape[1])
        blocks = lib.asarray(self._blocks())
        return blocks[lib.minimum(i, self.shape[0] - 1), lib.minimum(j, self.shape[1] - 1)] & inside

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        total = np.pad(self._blocks().astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        top, bottom = q.lo // self.block_q, q.hi // self.block_q + 1
        left, right = k.lo // self.block_k, k.hi // self.block_k + 1
        size = (bottom - top) * (right - left)
        (top, bottom), (left, right) = (
            (np.minimum(a, most), np.minimum(b, most))
            for a, b, most in ((top, bottom, self.shape[0]), (left, right, self.shape[1]))
        )
        allowed = total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
        return three_valued(allowed == 0, allowed == size)

    def _blocks(self) -> np.ndarray:
        return np.frombuffer(self.data, bool).reshape(self.shape)


def block_array(blocks: np.ndarray, block_q: int, block_k: int) -> BlockArray:
    """The mask that allows the blocks where a boolean array (blocks of queries, blocks of keys) is True.

    Args:
      blocks: known when tracing; what is routed at run time are `block_sparse_attention.Blocks`.
      block_q: queries of a block.
      block_k: keys of a block.

    Raises:
      TypeError: if the array is traced, or not boolean.
      ValueError: if it has not two axes.
    """
    if isinstance(blocks, jax.core.Tracer):
        raise TypeError("blocks must be known when tracing; for traced ones there is block_sparse_attention.Blocks")
    blocks = np.asarray(blocks)
    if blocks.dtype != bool:
        raise TypeError(f"blocks must be boolean, got {blocks.dtype}")
    if blocks.ndim != 2 or 0 in blocks.shape:
        raise ValueError(f"blocks must be (blocks of queries, blocks of keys), got shape {blocks.shape}")
    return BlockArray(blocks.tobytes(), (int(blocks.shape[0]), int(blocks.shape[1])), block_q, block_k)
