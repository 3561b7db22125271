"""What TPU kernels share: the call that runs a planned one, and steps on values of one group of heads.

A group has p heads side by side in lanes. Written (c, p·D) is one token a row, head a in lanes [a·D, (a + 1)·D); a
state is kept as (E, p·D), transposed, so that a row of decays per key channel multiplies it in place. Stacked, heads
stand below each other with the other heads' lanes at zero: products with a stacked operand are block-diagonal, and
work on all heads at once with unsliced lanes.
"""

import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from types import SimpleNamespace as Refs
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention.arguments import EPSILON
from pallas_kernels.linear_attention.tpu_plan import Plan

WIDE = jnp.float32


def run_plan(
    op: str,
    body: Callable[[Plan, Refs], None],
    optional: Sequence[str],
    plan: Plan,
    kind: str,
    arrays: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    """Runs a kernel.

    Args:
      op: the op's name, for profiles.
      body: gets the plan and the blocks that a grid point holds, by name.
      optional: names that are None in them where the plan has no such array.
      plan: its work.
      kind: a key of the plan's `KINDS`.
      arrays: what it reads, by name, in the shapes of `plan.inputs(kind)`; all vary over the same manual mesh axes.

    Returns:
      What it writes, by name, in the shapes of `plan.outputs(kind)`.
    """
    inputs, outputs, scratch = plan.inputs(kind), plan.outputs(kind), plan.scratch(kind)
    names = [operand.name for operand in inputs + outputs] + [name for name, _, _ in scratch]
    axes = jax.typeof(arrays[inputs[0].name]).manual_axis_type

    def kernel(*refs):
        body(plan, Refs(**dict.fromkeys(optional) | dict(zip(names, refs, strict=True))))

    def spec(operand):
        if operand.block is None:
            return pl.BlockSpec(memory_space=pltpu.SMEM)
        return pl.BlockSpec(operand.block, operand.index)

    result = pl.pallas_call(
        kernel,
        grid=plan.grid,
        in_specs=[spec(operand) for operand in inputs],
        out_specs=[spec(operand) for operand in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=axes) for x in outputs],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for _, shape, dtype in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=plan.config.chip.vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=plan.flops(kind),
            bytes_accessed=plan.bytes_moved(kind),
            transcendentals=plan.exponentials(kind),
        ),
        name=f"{op}_{kind}",
    )(*(arrays[operand.name] for operand in inputs))
    return {operand.name: x for operand, x in zip(outputs, result, strict=True)}


Steps = Generator[None, None, Any]  # work on one group of heads, which pauses where another's may come between


def run_groups(groups: Iterable[Steps], *, in_turns: bool = True) -> list[Any]:
    """Runs all groups of heads: in turns, each up to its next pause, or one after another.

    A matrix unit takes products in the order of the program. Where the next one waits for the last one's result, the
    products of other heads keep it busy, if they come in turns.

    Returns:
      What each group returned.
    """
    results = {}

    def run(number, steps):
        results[number] = yield from steps

    running = [run(number, steps) for number, steps in enumerate(groups)]
    for _ in itertools.zip_longest(*running) if in_turns else itertools.chain(*running):
        pass
    return [results[number] for number in range(len(running))]


def product(dtype: jnp.dtype, x: jax.Array, y: jax.Array, over: str) -> jax.Array:
    """x y ("nn"), x yᵀ ("nt") or xᵀ y ("tn") in float32, from operands in `dtype`.

    One pass of the matrix unit multiplies bfloat16 exactly; float32 needs all passes.
    """
    dimensions = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}[over]
    precision = lax.Precision.DEFAULT if dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    return lax.dot_general(
        x.astype(dtype), y.astype(dtype), (dimensions, ((), ())), precision=precision, preferred_element_type=WIDE
    )


def rows_and_lanes(shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Row and lane number of each element, int32."""
    return lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)


def head_of_lane(shape: tuple[int, int], size: int) -> jax.Array:
    """Head of each lane, where a head has `size` lanes, a power of two."""
    return lax.broadcasted_iota(jnp.int32, shape, 1) >> (size.bit_length() - 1)


def stack(x: jax.Array, pack: int, size: int) -> jax.Array:
    """(r, p·size) to (p·r, p·size): head a in rows [a·r, (a + 1)·r) and in its own lanes, zeros elsewhere."""
    if pack == 1:
        return x
    head = head_of_lane(x.shape, size)
    return jnp.concatenate([jnp.where(head == a, x, jnp.zeros_like(x)) for a in range(pack)], axis=0)


def fold(x: jax.Array, pack: int, size: int) -> jax.Array:
    """(p·r, p·size) to (r, p·size): the diagonal blocks side by side; the transpose of `stack`."""
    if pack == 1:
        return x
    rows = x.shape[0] // pack
    head = head_of_lane((rows, x.shape[1]), size)
    folded = jnp.zeros_like(x[:rows])
    for a in range(pack):
        folded = jnp.where(head == a, x[a * rows : (a + 1) * rows], folded)
    return folded


def spread(columns: list[jax.Array], size: int) -> jax.Array:
    """A number per row and head, p of (r, 1), over the lanes of the heads: (r, p·size), or (r, 1) where p is 1."""
    if len(columns) == 1:
        return columns[0]
    shape = (columns[0].shape[0], len(columns) * size)
    if size % 128 == 0:
        return jnp.concatenate([jnp.broadcast_to(x, (shape[0], size)) for x in columns], axis=1)
    head = head_of_lane(shape, size)
    result = jnp.broadcast_to(columns[0], shape)
    for a, column in enumerate(columns[1:], 1):
        result = jnp.where(head == a, column, result)
    return result


def spread_scalars(scalars: list[jax.Array], size: int) -> jax.Array:
    """A scalar per head over the lanes of the heads: (1, p·size), or the scalar itself where p is 1."""
    return scalars[0] if len(scalars) == 1 else spread([jnp.full((1, 1), x, WIDE) for x in scalars], size)


def sums(x: jax.Array, pack: int, size: int) -> list[jax.Array]:
    """Sums over the lanes of each head, (r, p·size) to p of (r, 1)."""
    if pack == 1:
        return [jnp.sum(x, axis=1, keepdims=True)]
    if size % 128 == 0:
        return [jnp.sum(x[:, a * size : (a + 1) * size], axis=1, keepdims=True) for a in range(pack)]
    head = head_of_lane(x.shape, size)
    return [jnp.sum(jnp.where(head == a, x, 0), axis=1, keepdims=True) for a in range(pack)]


def reciprocals(denominators: list[jax.Array], scale: jax.Array | None) -> list[jax.Array]:
    """scale / (scale·d + sign(scale·d) ε), 0 where scale·d is 0: `arguments.divide` as a factor of the numerator."""
    scale = jnp.float32(1) if scale is None else scale
    result = []
    for d in denominators:
        d = d * scale
        safe = jnp.where(d == 0, 1, d + jnp.where(d < 0, -EPSILON, EPSILON))
        result.append(jnp.where(d == 0, 0, scale / safe))
    return result
