"""How a TPU kernel over tokens cuts its work: blocks, on-chip memory, bytes moved.

Arrays stay as the caller's projections wrote them: (B, N, H, D) is read as (B, N, H·D), tokens in sublanes and heads
side by side in lanes. A block is `tokens` tokens of `block_heads` heads; the grid is (B, H / block_heads,
N / tokens), its last axis in order. Inside a block a loop runs over chunks.

Everything here is arithmetic on shapes: nothing is traced, and tests and benchmarks can ask for it.
"""

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import jax.numpy as jnp

from pallas_kernels.tpu.chips import LANES, UNKNOWN_CHIP, Chip

Kinds = Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is static in a call, whatever its shapes.

    Attributes:
      chip: where it runs.
      decay: None, "head", "token" or "channel".
      scaled: whether there is a scale.
      initial: whether there is an initial state.
      final: whether the last state is asked for.
      chunk: tokens per chunk; None for the op's own choice.
    """

    chip: Chip = UNKNOWN_CHIP
    decay: str | None = None
    scaled: bool = False
    initial: bool = False
    final: bool = False
    chunk: int | None = None


class Operand(NamedTuple):
    """An array of a kernel, and the block of it that a grid point (b, h, n) holds.

    `block` is None for scalars in SMEM; in it, None is an axis of one element that the kernel does not see.
    """

    name: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    block: tuple[int | None, ...] | None
    index: Callable[[int, int, int], tuple[int, ...]] | None

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, its last two axes filled up to whole tiles; 0 in SMEM."""
        if self.block is None:
            return 0
        *rest, rows, lanes = (1 if size is None else size for size in self.block)
        return math.prod(rest) * up(rows, 8) * up(lanes, LANES) * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Plan(abc.ABC):
    """The work of an op's kernels; an op says which arrays they have, what they keep on chip, and what they compute.

    Attributes:
      kinds: the kernels, with the names of their inputs and outputs.
      config: what is asked for.
      batch: B.
      length: N.
      heads: H.
      repeats: heads of q per head of k and v, H / G.
      key_size: D, as it is padded.
      value_size: E, as it is padded.
      dtype: of q, k, v, y and of the operands of products: bfloat16 or float32.
      block_heads: heads per block.
      chunk: tokens per chunk.
      tokens: tokens per block.
    """

    kinds: ClassVar[Kinds]

    config: Config
    batch: int
    length: int
    heads: int
    repeats: int
    key_size: int
    value_size: int
    dtype: jnp.dtype
    block_heads: int
    chunk: int
    tokens: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """(B, blocks of heads, blocks of tokens)."""
        return self.batch, self.heads // self.block_heads, self.blocks

    @property
    def blocks(self) -> int:
        """Blocks of tokens."""
        return math.ceil(self.length / self.tokens)

    @property
    def chunks(self) -> int:
        """Chunks of a block."""
        return self.tokens // self.chunk

    @property
    def tail(self) -> bool:
        """Whether the last block reaches beyond N."""
        return self.length % self.tokens != 0

    def inputs(self, kind: str) -> tuple[Operand, ...]:
        """Arrays that a kernel reads, in order; `kind` is a key of `kinds`."""
        return tuple(operand for name in self.kinds[kind][0] if (operand := self._operand(name, kind)))

    def outputs(self, kind: str) -> tuple[Operand, ...]:
        """Arrays that a kernel writes, in order."""
        return tuple(operand for name in self.kinds[kind][1] if (operand := self._operand(name, kind)))

    def vmem(self, kind: str) -> int:
        """Bytes of on-chip memory: blocks twice, since copies overlap with work, scratch, and values of the body."""
        blocks = 2 * sum(operand.block_bytes for operand in self.inputs(kind) + self.outputs(kind))
        kept = sum(
            math.prod(shape[:-1]) * up(shape[-1], LANES) * jnp.dtype(dtype).itemsize
            for _, shape, dtype in self.scratch(kind)
        )
        return blocks + kept + self._values(kind)

    def bytes_moved(self, kind: str) -> int:
        """Bytes between device memory and chip: those of each block whose index is not that of the step before."""
        total = 0
        for operand in self.inputs(kind) + self.outputs(kind):
            if operand.block is None:
                continue
            points = (operand.index(*point) for point in itertools.product(*map(range, self.grid)))
            total += operand.block_bytes * sum(1 for _ in itertools.groupby(points))
        return total

    @abc.abstractmethod
    def scratch(self, kind: str) -> tuple[tuple[str, tuple[int, ...], jnp.dtype], ...]:
        """Names, shapes and dtypes of what a kernel keeps on chip between grid points."""

    @abc.abstractmethod
    def flops(self, kind: str) -> int:
        """Operations of the products that a kernel needs."""

    @abc.abstractmethod
    def exponentials(self, kind: str) -> int:
        """How many exponentials a kernel takes."""

    @abc.abstractmethod
    def _values(self, kind: str) -> int:
        """Bytes of the intermediate values of a chunk."""

    @abc.abstractmethod
    def _operand(self, name: str, kind: str) -> Operand | None:
        """The array `name` of a kernel, or None where the configuration has none."""


def up(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple
