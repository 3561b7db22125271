"""The selective scan as Triton kernels, called through jax-triton: one forward, one backward.

Here: what is refused, and what the kernels are given. `kernels` has the plan, `derivative` the derivative around them.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, partition
from pallas_kernels.gpus import Gpu, find
from pallas_kernels.selective_scan import derivative
from pallas_kernels.selective_scan.arguments import Arguments
from pallas_kernels.selective_scan.triton import kernels
from pallas_kernels.triton_launch import launch as _launch

DTYPES = ("bfloat16", "float16", "float32")
LARGEST = 256  # of S
CHUNK = 64  # tokens that are scanned at once
CHANNELS = 16  # per program, at most: few, so that there are programs for all multiprocessors


@dataclasses.dataclass(frozen=True)
class Config:
    """What is static in a call, beside its shapes.

    Attributes:
      gpu: where it runs; None if it is not known.
      initial: whether there is an initial state.
      final: whether the last state is asked for.
      gated: whether there is a gate.
      skipped: whether there is a skip.
      biased: whether step sizes have a bias.
      softplus: whether step sizes go through softplus.
    """

    gpu: Gpu | None
    initial: bool
    final: bool
    gated: bool
    skipped: bool
    biased: bool
    softplus: bool


def supports(args: Arguments) -> str | None:
    """Why the kernels cannot take `args`; None when they can."""
    if args.x.dtype.name not in DTYPES:
        return f"it takes {', '.join(DTYPES)}, got {args.x.dtype.name}"
    if args.a.shape[1] > LARGEST:
        return f"S may be at most {LARGEST}, got {args.a.shape[1]}"
    if args.chunk_size is not None:
        return f"it has chunks of {CHUNK}, so chunk_size must be None, got {args.chunk_size}"
    return partition.refusal()


def run(args: Arguments) -> tuple[jax.Array, jax.Array | None]:
    """y (B, N, C) and, if asked for, the state."""
    config = Config(
        gpu=find(dispatch.current_device_kind()),
        initial=args.initial_state is not None,
        final=args.return_state,
        gated=args.gate is not None,
        skipped=args.skip is not None,
        biased=args.delta_bias is not None,
        softplus=args.softplus,
    )
    return derivative.run(derivative.Kernels(_forward, _backward, config), args)


def _forward(config: Config, keep: bool, x, delta, gate, a, b, c, skip, bias, mask, initial):
    """y (B, N, C); the last state (B, C, S); the states before the chunks (B, chunks, S, C)."""
    batch, n, channels = x.shape
    size, chunks, f32 = a.shape[1], math.ceil(n / CHUNK), jnp.float32
    initial = None if initial is None else jnp.swapaxes(initial, 1, 2)
    arrays = (x, delta, gate, a.T, b, c, skip, bias, mask, initial)
    outputs = (
        (x.shape, x.dtype),
        ((batch, size, channels), f32) if config.final else None,
        ((batch, chunks, size, channels), f32) if keep else None,
    )
    y, final, kept = _call(config, kernels.forward, arrays, b, outputs, {"KEEP": keep}, mask is not None)
    return y, None if final is None else jnp.swapaxes(final, 1, 2), kept


def _backward(config: Config, x, delta, gate, a, b, c, skip, bias, mask, kept, dy, dfinal):
    """Gradients of x, delta, gate, a (B, C, S), b, c, skip (B, C), bias (B, C) and the initial state."""
    batch, n, channels = x.shape
    size, groups, f32 = a.shape[1], b.shape[2], jnp.float32
    dfinal = None if dfinal is None else jnp.swapaxes(dfinal, 1, 2)
    arrays = (x, delta, gate, a.T, b, c, skip, bias, mask, kept, dy, dfinal)
    states, shared = ((batch, size, channels), f32), ((batch, groups * _blocks(channels // groups)[1], n, size), f32)
    vector, tokens = ((batch, channels), f32), (x.shape, x.dtype)
    outputs = (
        *(tokens, tokens, tokens if config.gated else None, states, shared, shared),
        *(vector if there else None for there in (config.skipped, config.biased)),
        states if config.initial else None,
    )
    found = _call(config, kernels.backward, arrays, b, outputs, {}, mask is not None)
    dx, ddelta, dgate, da, db, dc, dskip, dbias, dinitial = found
    db, dc = (jnp.sum(each.reshape(batch, groups, -1, n, size), axis=2) for each in (db, dc))
    db, dc = (jnp.swapaxes(each, 1, 2).astype(b.dtype) for each in (db, dc))
    dinitial = None if dinitial is None else jnp.swapaxes(dinitial, 1, 2)
    return dx, ddelta, dgate, jnp.swapaxes(da, 1, 2), db, dc, dskip, dbias, dinitial


def _blocks(share: int) -> tuple[int, int]:
    """Channels of a program, a power of two, and programs of a group of `share` channels."""
    block = min(CHANNELS, 1 << (share - 1).bit_length())
    return block, math.ceil(share / block)


def _call(config: Config, kernel: Any, arrays: Any, b: jax.Array, outputs: Any, more: Any, packed: bool) -> list[Any]:
    """Runs a kernel; outputs that are None have a pointer that nothing is written to."""
    x, (_, n, groups, size) = arrays[0], b.shape
    share = x.shape[2] // groups
    block, blocks = _blocks(share)
    constants = {
        "C": x.shape[2],
        "S": size,
        "GROUPS": groups,
        "SHARE": share,
        "BLOCKS": blocks,
        "BLOCK_C": block,
        "BLOCK_S": 1 << (size - 1).bit_length(),
        "CHUNK": CHUNK,
        "CHUNKS": math.ceil(n / CHUNK),
        "GATED": config.gated,
        "SKIPPED": config.skipped,
        "BIASED": config.biased,
        "SOFTPLUS": config.softplus,
        "PACKED": packed,
        "INITIAL": config.initial,
        "FINAL": config.final,
        **more,
    }
    stand_in = jnp.zeros(1, jnp.float32)
    inputs = [stand_in if each is None else each for each in arrays]
    shapes = [jax.ShapeDtypeStruct(*(((1,), jnp.float32) if each is None else each)) for each in outputs]
    capability = None if config.gpu is None else config.gpu.capability
    grid = x.shape[0] * groups * blocks
    results = _launch(kernel, inputs, n, shapes, capability, grid, 4, 1, constants)
    # A call that JAX knows nothing of gives arrays that are typed as equal on all shards of a `jax.shard_map`.
    results = partition.same_manual_axes((list(results), inputs))[0]
    return [None if each is None else found for found, each in zip(results, outputs, strict=True)]
