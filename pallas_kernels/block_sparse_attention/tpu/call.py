"""The call of a kernel over a list of tiles, and the tile that a grid point works on.

What a kernel reads, keeps and writes is named with the axes that its blocks have, so that a piece of a tile can be cut
out of all of it alike, and kernels are written once for tiles and for pieces of them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention.tpu.lists import LANE, MASKED, WHOLE, WORK, Piece, Walk
from pallas_kernels.block_sparse_attention.tpu.plan import Extra, Plan
from pallas_kernels.tpu.calls import WIDE

BlockShape = tuple[int | str | None, ...]
"""Of an array: "i" is an axis of the queries of a tile, "j" of its keys, None one that the kernel does not see."""


class Call:
    """One kernel: its grid, its operands in order, and where a grid point is."""

    def __init__(self, plan: Plan, kind: str, walk: Walk, numbers: tuple[jax.Array, jax.Array]) -> None:
        self.plan, self.kind, self.walk, self.numbers = plan, kind, walk, numbers
        self.arrays: list[Any] = []
        self.specs: list[Any] = []
        self.blocks: dict[str, BlockShape] = {}
        self.outputs: dict[str, tuple[jax.ShapeDtypeStruct, Any]] = {}

    @property
    def grid(self) -> tuple[Any, ...]:
        """Batch elements, heads (of keys in `dkv`, of the output in `full`), tiles, and heads in turn."""
        batch, groups, repeats = self.plan.layout.inner
        total = self.walk.total
        if self.kind == "dkv":
            return batch, groups, total, repeats
        heads = groups * repeats
        if self.kind == "full":
            outer = self.plan.full_heads
            return batch, outer, total, heads // outer
        return batch, heads, total

    def at(self, ids: tuple[Any, ...], row: Any, column: Any, flags: Any) -> SimpleNamespace:
        """Where a grid point is, from its number and the prefetched lists."""
        layout, t = self.plan.layout, ids[2]
        lane = flags[t] >> LANE
        lane_b, lane_h = divided(lane, layout.lanes_h)
        _, groups, repeats = layout.inner
        b = ids[0] if layout.lanes_b == 1 else lane_b
        if self.kind == "dkv":
            inner = ids[1] * repeats + ids[3]
        elif self.kind == "full":
            inner = ids[1] * self.grid[3] + ids[3]
        else:
            inner = ids[1]
        h = inner if layout.lanes_h == 1 else lane_h * (groups * repeats) + inner
        g, r = divided(h, layout.repeats)
        return SimpleNamespace(b=b, h=h, g=g, r=r, i=row[t], j=column[t])

    def spec(self, block: BlockShape, index: Callable[[SimpleNamespace], tuple[Any, ...]]) -> Any:
        """Of an operand whose block follows from where a grid point is."""

        def map_(*args: Any) -> tuple[Any, ...]:
            ids, (row, column, flags, mask, *_) = args[: len(self.grid)], args[len(self.grid) :]
            at = self.at(ids, row, column, flags)
            at.mask = mask[ids[2]]
            return index(at)

        return pl.BlockSpec(_sized(self.plan, block), map_)

    def read(self, name: str, array: jax.Array, block: BlockShape, index: Any) -> None:
        """Adds an input."""
        self.blocks[name] = block
        self.arrays.append(array)
        self.specs.append(self.spec(block, index))

    def write(
        self, name: str, shape: tuple[int, ...], dtype: Any, block: BlockShape, index: Any, fill: float = 0.0
    ) -> None:
        """Adds an output; blocks that no tile writes hold `fill`."""
        self.outputs[name] = (jax.ShapeDtypeStruct(shape, dtype), self.spec(block, index), fill)

    def tokens(self, name: str, array: jax.Array, axis: str, *, writes: bool = False) -> None:
        """Adds (B, N, H, D) or (B, M, G, D), or an output of such a shape and dtype."""
        batch, length, heads, size = array.shape
        head = "h" if axis == "i" else "g"
        cut: BlockShape
        if size % 128 == 0:
            shape, cut = (batch, length, heads * size), (None, axis, size)
            index = lambda at: (at.b, getattr(at, axis), getattr(at, head))  # noqa: E731
        else:
            shape, cut = (batch, heads, length, size), (None, None, axis, size)
            index = lambda at: (at.b, getattr(at, head), getattr(at, axis), 0)  # noqa: E731
        if writes:
            self.write(name, shape, array.dtype, cut, index)
        else:
            self.read(name, array.reshape(shape) if size % 128 == 0 else jnp.swapaxes(array, 1, 2), cut, index)

    def rows(self, name: str, array: jax.Array) -> None:
        """Adds (B, H, 1, N)."""
        self.read(name, array, (None, None, 1, "i"), lambda at: (at.b, at.h, 0, at.i))

    def extra(self, extra: Extra, array: jax.Array) -> None:
        """Adds an array of `plan.extras`, (B|1, H|G|1, …)."""
        b, h = (
            array.shape[0] > 1,
            {1: ""}.get(array.shape[1], "g" if array.shape[1] == self.plan.layout.groups else "h"),
        )

        def lead(at: SimpleNamespace) -> tuple[Any, Any]:
            return at.b if b else 0, getattr(at, h) if h else 0

        block, tail = {
            "scalar": ((1, 1), lambda at: (0, 0)),
            "row": ((1, "i"), lambda at: (0, at.i)),
            "column": ((1, "j"), lambda at: (0, at.j)),
            "full": (("i", "j"), lambda at: (at.i, at.j)),
            "table": (("i", array.shape[3]), lambda at: (at.i, 0)),
        }[extra.kind]
        self.read(extra.name, array, (None, None, *block), lambda at: (*lead(at), *tail(at)))

    def run(self, body: Callable[..., None], scratch: list[BlockShape]) -> dict[str, jax.Array]:
        """Runs `body(tile, outputs by name)`, with float32 scratch of these blocks."""
        if self.plan.masks is not None:
            self.read("mask", jnp.asarray(self.plan.masks), (None, "j", "i"), lambda at: (at.mask, 0, 0))
        names, count = list(self.blocks), len(self.blocks)
        outputs = list(self.outputs)
        # What no tile writes keeps what it had: the outputs begin as these arrays.
        fills = [jnp.full(struct.shape, fill, struct.dtype) for struct, _, fill in self.outputs.values()]
        lists = self.walk[:4] + self.numbers

        def kernel(row, column, flags, mask, bs, hs, *refs):
            ids = tuple(pl.program_id(axis) for axis in range(len(self.grid)))
            inputs = dict(zip(names, refs[:count], strict=True))
            rest = refs[count + len(fills) :]
            where = self.at(ids, row, column, flags)
            where.flags, where.b_index, where.h_index = flags[ids[2]], bs[where.b], hs[where.h]
            where.turn, where.turns = (ids[3], self.grid[3]) if len(ids) > 3 else (None, None)
            first = where.i * self.plan.layout.block_q, where.j * self.plan.layout.block_k
            tile = Tile(self.plan, inputs, rest[len(outputs) :], where, self.blocks, scratch, first)
            body(tile, dict(zip(outputs, rest[: len(outputs)], strict=True)))

        parallel = ("parallel", "parallel") + ("arbitrary",) * (len(self.grid) - 2)
        results = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(lists),
                grid=self.grid,
                in_specs=[*self.specs, *(pl.BlockSpec(memory_space=pl.ANY) for _ in fills)],
                out_specs=[spec for _, spec, _ in self.outputs.values()],
                scratch_shapes=[pltpu.VMEM(_sized(self.plan, block), WIDE) for block in scratch],
            ),
            out_shape=[struct for struct, _, _ in self.outputs.values()],
            input_output_aliases={len(lists) + count + n: n for n in range(len(fills))},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=parallel, vmem_limit_bytes=self.plan.chip.vmem_limit
            ),
            name=f"block_sparse_attention_{self.kind}",
        )(*(jnp.asarray(x, jnp.int32) for x in lists), *self.arrays, *fills)
        return dict(zip(outputs, results, strict=True))


def _sized(plan: Plan, block: BlockShape) -> tuple[Any, ...]:
    """The shape of a block."""
    sizes = {"i": plan.layout.block_q, "j": plan.layout.block_k}
    return tuple(sizes[size] if isinstance(size, str) else size for size in block)


def divided(x: Any, size: int) -> tuple[Any, Any]:
    """Quotient and rest of a number that is not negative."""
    return (x, 0) if size == 1 else (lax.div(x, jnp.int32(size)), lax.rem(x, jnp.int32(size)))


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile, or a piece of one, which is a smaller one.

    Attributes:
      plan: whose layout has its size.
      refs: the inputs, by name.
      scratch: the sums.
      where: it is.
      blocks: of the inputs.
      sums: blocks of the scratch.
      first: query and key.
    """

    plan: Plan
    refs: dict[str, Any]
    scratch: Sequence[Any]
    where: SimpleNamespace
    blocks: dict[str, BlockShape]
    sums: list[BlockShape]
    first: tuple[Any, Any]

    def cut(self, piece: Piece) -> "Tile":
        """A piece, as a tile whose indices count from the first query and key of the whole one."""
        layout = self.plan.layout
        slices = {"i": pl.ds(piece.i, piece.queries), "j": pl.ds(piece.j, piece.keys)}

        def of(ref: Any, block: BlockShape) -> Any:
            return ref.at[tuple(slices.get(size, slice(None)) for size in block if size is not None)]

        layout = dataclasses.replace(layout, block_q=piece.queries, block_k=piece.keys)
        return dataclasses.replace(
            self,
            plan=dataclasses.replace(self.plan, layout=layout),
            refs={name: of(ref, self.blocks[name]) for name, ref in self.refs.items()},
            scratch=[of(ref, block) for ref, block in zip(self.scratch, self.sums, strict=True)],
            first=(self.first[0] + piece.i, self.first[1] + piece.j),
        )

    def each(self, work: Callable[["Tile", bool], None]) -> None:
        """`work(tile, masked)`: of a tile that needs no mask at once, of another piece by piece."""
        kind = lax.shift_right_logical(self.where.flags, jnp.int32(WORK)) & ((1 << LANE - WORK) - 1)
        pl.when(kind == WHOLE)(lambda: work(self, False))
        for number, pieces in enumerate(self.plan.patterns):

            @pl.when(kind == MASKED + number)
            def _(pieces: tuple[Piece, ...] = pieces) -> None:
                for piece in pieces:
                    work(self.cut(piece), True)
