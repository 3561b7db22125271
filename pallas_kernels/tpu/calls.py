"""What TPU kernels share: the call that runs a planned one, groups of heads in turns, and products."""

import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from types import SimpleNamespace as Refs
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.plans import Plan

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
      kind: a key of the plan's `kinds`.
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
