"""What the kernels of all platforms share: their arrays, the cut over devices, and the derivative around them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import partition
from pallas_kernels.selective_scan.arguments import Arguments

# Axes of arrays as `partition` names them: B and H, the channels, and G, groups of them, are cut over devices.
# x, delta, gate, a, b, c, skip, bias, where a state is kept (0 at starts), initial state
INPUTS = ("BNH", "BNH", "BNH", "HS", "BNGS", "BNGS", "H", "H", "BN", "BHS")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels of a platform, and what is static in a call; arrays that it lacks are None.

    Attributes:
      forward: (config, keep states, the arrays of `INPUTS`) -> y (B, N, C), the last state (B, C, S), and the states
        before the blocks (B, blocks, S, C).
      backward: (config, the arrays of `INPUTS` but the initial state, these states, dy, that of the last state) ->
        gradients of x, delta, gate, a (B, C, S), b, c, skip (B, C), bias (B, C) and the initial state.
      config: has `initial`, `final`, `gated`, `skipped` and `biased`: which arrays there are.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    config: Any


def run(kernels: Kernels, args: Arguments) -> tuple[jax.Array, jax.Array | None]:
    """y (B, N, C) and, if asked for, the state."""
    keep = None if args.starts is None else 1 - args.starts.astype(jnp.float32)
    arrays = (args.x, args.delta, args.gate, args.a, args.b, args.c, args.skip, args.delta_bias, keep)
    return _scan(kernels, *partition.same_manual_axes((*arrays, args.initial_state)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(kernels: Kernels, *arrays: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    y, final, _ = _forward(kernels, False, arrays)
    return y, final


def _scan_forward(kernels: Kernels, *arrays: Any) -> Any:
    y, final, kept = _forward(kernels, True, arrays)
    return (y, final), (*arrays[:-1], kept)


def _scan_backward(kernels: Kernels, residuals: Any, cotangents: Any) -> Any:
    config = kernels.config
    outputs = (
        *("BNH", "BNH", "BNH" if config.gated else None, "BHS", "BNGS", "BNGS"),
        *("BH" if there else None for there in (config.skipped, config.biased)),
        "BHS" if config.initial else None,
    )
    run = functools.partial(kernels.backward, config)
    local = partition.batched_and_partitioned(run, (*INPUTS[:-1], "BKSH", "BNH", "BHS"), outputs)
    dx, ddelta, dgate, da, db, dc, dskip, dbias, dinitial = local(*residuals, *cotangents)
    dskip, dbias = (None if each is None else jnp.sum(each, axis=0) for each in (dskip, dbias))
    return dx, ddelta, dgate, jnp.sum(da, axis=0), db, dc, dskip, dbias, None, dinitial


_scan.defvjp(_scan_forward, _scan_backward)


def _forward(kernels: Kernels, keep: bool, arrays: Any) -> Any:
    outputs = ("BNH", "BHS" if kernels.config.final else None, "BKSH" if keep else None)
    run = functools.partial(kernels.forward, kernels.config, keep)
    return partition.batched_and_partitioned(run, INPUTS, outputs)(*arrays)
