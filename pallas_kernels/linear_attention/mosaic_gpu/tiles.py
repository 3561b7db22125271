"""Launches of `mosaic_gpu`, and the tiles of 64×64 in registers and shared memory of `sweep`.

On a GPU tiles have the register layout of wgmma. Pallas' GPU interpreter (JAX 0.10 to 0.12) knows no layouts, no
wgmma with operands in registers and no `run_state`; for it, `interpret` True, these functions are plain arithmetic.
Everything else of a kernel, copies and barriers included, is interpreted as it is.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64  # tokens of a chunk, and channels of a tile: one wgmma row block, one 128-byte swizzle of 16-bit numbers
BY_ROW = plgpu.Layout.WGMMA.reduce(1)  # a vector with one number per row of a tile
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)

# The index that says "everything": `plgpu.load` wants one up to JAX 0.11, and has no such argument from 0.12 on.
_EVERYTHING = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()


class Transposed(NamedTuple):
    """A tile in shared memory, read as its transpose."""

    tile: Any


def shared(*shape: int, dtype: jnp.dtype):
    """Shared memory for (*shape, 64, 64) numbers of 16 bits, swizzled as wgmma wants them."""
    transforms = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((*shape, TILE, TILE), dtype, transforms=transforms)


def launch(
    body: Callable[..., None],
    inputs: Sequence[jax.Array],
    out_types: dict[str, jax.ShapeDtypeStruct],
    scratch: dict[str, Any],
    ctas: int,
    warpgroups: int,
    interpret: Any,
) -> dict[str, jax.Array]:
    """Runs `body` of all inputs, outputs and scratch in every CTA, and returns the outputs by name.

    In it the axes are "cta" and "warpgroup"; `interpret` has the parameters of Pallas' interpreter, None on a GPU.
    """
    outputs = plgpu.kernel(
        body,
        out_type=list(out_types.values()),
        scratch_types=list(scratch.values()),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        # The layouts of registers are chosen by hand: "lane" semantics, which JAX 0.11 no longer has by default.
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=0,  # sums run along rows, and each is within one warp
        ),
        interpret=interpret,
    )(*inputs)
    return dict(zip(out_types, outputs, strict=True))


def products(interpret: bool, *sums) -> list[jax.Array]:
    """Sums of products of tiles, float32; all are in flight together.

    Args:
      interpret: whether the kernel is interpreted.
      *sums: (start or None, [(left, right), ...]) each. A left operand may be an array in registers, a right one stands
        in shared memory.
    """
    starts = [zeros(interpret) if start is None else start for start, _ in sums]
    if interpret:
        done = [
            start + sum(jnp.dot(_value(a), _value(b), preferred_element_type=jnp.float32) for a, b in terms)
            for start, (_, terms) in zip(starts, sums, strict=True)
        ]
        plgpu.commit_smem()  # wgmma reads as copies do: no fence is missing between the two
        return done

    def body(accumulators):
        for accumulator, (_, terms) in zip(accumulators, sums, strict=True):
            for left, right in terms:
                plgpu.wgmma(accumulator, _operand(left), _operand(right))

    return list(pl.run_state(body)(tuple(plgpu.ACC.init(start) for start in starts)))


def zeros(interpret: bool) -> jax.Array:
    """A tile of float32 zeros."""
    tile = jnp.zeros((TILE, TILE), jnp.float32)
    return tile if interpret else plgpu.layout_cast(tile, plgpu.Layout.WGMMA)


def load(interpret: bool, ref, layout=plgpu.Layout.WGMMA, optimized: bool = True) -> jax.Array:
    """A tile, or a vector `BY_ROW` or `BY_COLUMN`, from memory; `optimized` False from global memory."""
    if interpret:
        return ref[...]
    return plgpu.load(ref, *_EVERYTHING, layout=layout, optimized=optimized)


def iota(interpret: bool, axis: int | None) -> jax.Array:
    """Row (0) or column (1) numbers of a tile; None: row numbers as a vector."""
    shape = (TILE,) if axis is None else (TILE, TILE)
    if interpret:
        return lax.broadcasted_iota(jnp.int32, shape, axis or 0)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis or 0, layout=BY_ROW if axis is None else plgpu.Layout.WGMMA)


def by_row(vector: jax.Array) -> jax.Array:
    """A tile with one number per row."""
    return lax.broadcast_in_dim(vector, (TILE, TILE), [0])


def by_column(vector: jax.Array) -> jax.Array:
    """A tile with one number per column."""
    return lax.broadcast_in_dim(vector, (TILE, TILE), [1])


def tile_bytes() -> int:
    """Bytes of a tile in shared memory."""
    return TILE * TILE * 2


def tile_registers() -> int:
    """Registers that a float32 tile takes of each of the 128 threads of a warpgroup."""
    return math.ceil(TILE * TILE / 128)


def _operand(x):
    return x.tile.transpose((1, 0)) if isinstance(x, Transposed) else x


def _value(x):
    if isinstance(x, Transposed):
        return x.tile[...].T
    return x if isinstance(x, jax.Array) else x[...]
