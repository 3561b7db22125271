"""Linear attention as Triton kernels, called through jax-triton: forward, and a backward pass written by hand.

The kernels are in `kernels.py`, their blocks in `plan.py`, their calls in `calls.py`; README.md
derives the recurrence, the chunks and their weights.

**Forward** (`sweep`). A program owns one head of one sequence and a tile of the value channels. It walks over chunks
of c tokens with its part of the state S (D × tile, float32) in registers: one launch, which writes y alone. Programs
of one head read the same q and k at the same time, so memory gives them once. For the backward pass it keeps S before
every block of `every` chunks, in bfloat16 for half-precision inputs.

**Backward** (`backward`). A program owns a tile of the key channels and all value channels, so that dq and dk need no
sums over programs; q, k, v and dy are read once. It goes through the blocks from last to first. In each it rebuilds
the states before the chunks from the kept one, into a scratch of a few chunks that stays in the second-level cache,
then takes the chunks in reverse with dS in registers. Both states of a chunk are at hand, so the gradient of a decay
is a sum of terms that carry that decay. Where D is tiled, the products q·k of a program are a part: the gradient of a
decay is a sum over tiles, kept as (tiles, B, N, H) float32, and dv is a sweep of its own, in reverse, with k, q, dy
for q, k, v.

**Few heads.** If there are fewer programs than half of the multiprocessors, a long sequence is split: a sweep sums each
split's own state, a small product in XLA turns these into the states before the splits, and the main kernel starts
from them. It is exact; k and v are read twice. Likewise backward, with q, dy and the cotangent of the state.

**Non-causal.** The same state sweep without decay, summed over splits, then `read`: y = q S. Backward: dS by a state
sweep over q and dy, then dq = dy Sᵀ, dk = v dSᵀ, dv = k dS.

Memory beside inputs, outputs and gradients: D·E numbers per block and head for the kept states, and as many per chunk
of one block and head for scratch. With grouped heads (H > G) dk and dv are written per query head in float32 and
summed.

Half precision: operands of products are bfloat16, for float16 inputs too, as a state or a score may exceed 65504;
sums are float32. Float32 inputs use products in full precision, without tensor cores.

Ideas: Lightning Attention-2 (arXiv:2401.04658), gated linear attention (arXiv:2312.06635), Mamba-2
(arXiv:2405.21060).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, partition, symbolic_zeros
from pallas_kernels.linear_attention.arguments import in_order_of_ids
from pallas_kernels.linear_attention.triton.calls import Common, before_splits, run_backward, run_read, run_sweep
from pallas_kernels.linear_attention.triton.plan import (
    Config,
    backward_blocks,
    chunk_sizes,
    gpu_of,
    lengths,
    sweep_blocks,
)
from pallas_kernels.recurrence import EPSILON, Arguments, NormalizedState, State, decay_of_segments

SIZES = (16, 256)  # least and greatest D and E
DTYPES = ("bfloat16", "float16", "float32")


def supports(args: Arguments) -> str | None:
    """Why this implementation cannot take `args`; None when it can."""
    dtype, (low, high) = args.q.dtype.name, SIZES
    if dtype not in DTYPES:
        return f"it takes {', '.join(DTYPES)}, got {dtype}"
    for name, size in (("D", args.q.shape[3]), ("E", args.v.shape[3])):
        if not low <= size <= high:
            return f"it takes head sizes of {low} to {high}, got {name}={size}"
    if args.log_decay is not None and args.log_decay.ndim == 4:
        return (
            "it takes log_decay of shape (H,) or (B, N, H), got one per channel: exp(G_i - G_j) then stays inside the"
            " sum over channels, and q·k is no single product of tensor cores"
        )
    gpu = gpu_of(dispatch.current_device_kind())
    allowed = chunk_sizes(gpu, args.q.dtype, args.q.shape[3], args.v.shape[3])
    if args.chunk_size is not None and args.chunk_size not in allowed:
        call = f"these sizes and {dtype} on {gpu.architecture}"
        return f"chunk_size must be one of {allowed} for {call}, got {args.chunk_size}"
    if args.chunk_size is not None and not args.causal and args.query_ids is None:
        return f"without causality and segments it has no chunks, so chunk_size must be None, got {args.chunk_size}"
    return None


def run(args: Arguments, **choices: Any) -> tuple[jax.Array, State | None]:
    """y (B, N, H, E) and, if asked for, the state.

    Args:
      args: the arguments.
      **choices: fields of `Config` that are otherwise left to the tables, for tuning and tests.
    """
    config = Config(
        causal=args.causal,
        normalize=args.normalize,
        return_state=args.return_state,
        **({"gpu": gpu_of(dispatch.current_device_kind()), "chunk": args.chunk_size} | choices),
    )
    if not args.causal and args.query_ids is not None:
        causal = dataclasses.replace(config, causal=True, return_state=False)

        def in_order(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
            decay = decay_of_segments(dataclasses.replace(args, q=q, k=k, v=v, log_decay=None), ids)
            arrays = partition.same_manual_axes((q, k, v, decay, args.scale))
            return _attend(causal, *arrays, None, None)[0]

        return in_order_of_ids(in_order, args, args.v), None
    decay = args.log_decay if args.query_ids is None else decay_of_segments(args, args.query_ids)
    state, sums = args.initial_state, None
    if isinstance(state, NormalizedState):
        state, sums = state
    arrays = partition.same_manual_axes((args.q, args.k, args.v, decay, args.scale, state, sums))
    y, last, last_sums = _attend(config, *arrays)
    if not args.return_state:
        return y, None
    return y, NormalizedState(last, last_sums) if args.normalize else last


# ---- the op and its derivative


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(config: Config, q, k, v, decay, scale, state, sums):
    """y, the last state and its sums (None where not asked for)."""
    return _spread_forward(config, q, k, v, decay, scale, state, sums)[:3]


def _attend_forward(config: Config, *arrays):
    marks, arrays = symbolic_zeros.primals(arrays, decay=3)
    y, last, last_sums, *kept = _spread_forward(dataclasses.replace(config, residuals=True), *arrays)
    q, k, v, decay, scale, state, _ = arrays
    if state is not None:
        marks["state"] = ()
    return (y, last, last_sums), (marks, q, k, v, decay, scale, y if config.normalize else None, *kept)


def _attend_backward(config: Config, residuals, cotangents):
    marks, q, k, v, *rest = residuals
    dy, dlast, dlast_sums = map(symbolic_zeros.cotangent, cotangents)
    dy = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype) if dy is None else dy
    config = dataclasses.replace(config, decay_gradient="decay" in marks)
    dq, dk, dv, ddecay, dscale, dstate, dsums = _spread_backward(config, q, k, v, *rest, dy, dlast, dlast_sums)
    if ddecay is not None and ddecay.ndim == 2:
        ddecay = jnp.sum(ddecay, axis=0)
    if dscale is not None:
        dscale = jnp.sum(dscale)
    return (dq, dk, dv, ddecay, dscale, *((dstate, dsums) if "state" in marks else (None, None)))


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _axes(decay: jax.Array | None) -> tuple[str, ...]:
    """Axes of q, k, v, decay and scale, as `partition.batched_and_partitioned` wants them."""
    return "BNHD", "BMGD", "BMGE", "H" if decay is None or decay.ndim == 1 else "BNH", ""


def _spread_forward(config: Config, *arrays: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """`_forward` cut over devices by batch and heads, and with vmapped axes in its batch."""
    norm, last, kept = config.normalize, config.return_state, config.residuals
    outputs = (
        "BNHE",
        "BHDE" if last else None,
        "BHD" if last and norm else None,
        "BNH" if kept and norm else None,
        "BHXDE" if kept else None,
        "BHXD" if kept and norm else None,
    )
    forward = functools.partial(_forward, config)
    return partition.batched_and_partitioned(forward, (*_axes(arrays[3]), "BHDE", "BHD"), outputs)(*arrays)


def _spread_backward(config: Config, *arrays: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """`_backward` likewise."""
    decay, scale = arrays[3:5]
    inputs = (*_axes(decay), "BNHE", "BNH", "BHXDE", "BHXD", "BNHE", "BHDE", "BHD")
    outputs = (
        *_axes(decay)[:3],
        None if decay is None or not config.decay_gradient else "BH" if decay.ndim == 1 else "BNH",
        None if scale is None else "BH",
        "BHDE",
        "BHD" if config.normalize else None,
    )
    return partition.batched_and_partitioned(functools.partial(_backward, config), inputs, outputs)(*arrays)


def _forward(config: Config, q, k, v, decay, scale, state, sums) -> tuple[jax.Array | None, ...]:
    """The forward pass on arrays; None for what is absent.

    Args:
      config: what is static.
      q: BNHD. k: BMGD. v: BMGE.
      decay: log decay, H or BNH, float32. scale: scalar, float32.
      state: initial state, BHDE, float32. sums: its Σk, BHD.

    Returns:
      y BNHE in the dtype of q; last state BHDE, with `return_state`, and its sums BHD; and with `residuals` the
      denominators BNH, kept states BHXDE (X blocks) and kept sums BHXD.
    """
    (b, _, h, d), m, e = q.shape, k.shape[1], v.shape[3]
    blocks = config.sweep or sweep_blocks(config.gpu, q.dtype, d, e, config.chunk)
    block, split = lengths(config, b * h * math.ceil(e / blocks.tile), m)
    common, norm = Common(config, blocks, h, block, split, decay, scale), config.normalize
    if not config.causal:
        *_, parts, part_sums = run_sweep(common, None, k, v, None, None, last=True)
        total, total_sums = jnp.sum(parts, axis=2), jnp.sum(part_sums, axis=2) if norm else None
        if state is not None:
            total, total_sums = total + state, total_sums + sums if norm else None
        y, den = run_read(common, q, total, total_sums, scale=scale, divide=norm, dtype=q.dtype)
        last = (total, total_sums) if config.return_state else (None, None)
        kept = (den, total[:, :, None], total_sums[:, :, None] if norm else None) if config.residuals else (None,) * 3
        return (y, *last, *kept)
    first, first_sums = before_splits(common, k, v, state, sums)
    y, den, kept, kept_sums, last, last_sums = run_sweep(
        common, q, k, v, first, first_sums, keep=config.residuals, last=config.return_state
    )
    last, last_sums = (None if x is None else x[:, :, -1] for x in (last, last_sums))
    return y, last, last_sums, den, kept, kept_sums


def _backward(
    config: Config, q, k, v, decay, scale, y, den, kept, kept_sums, dy, dlast, dlast_sums
) -> tuple[jax.Array | None, ...]:
    """The backward pass on arrays; None for what is absent.

    Args:
      config: what is static.
      q: BNHD. k: BMGD. v: BMGE.
      decay: H or BNH. scale: scalar.
      y: BNHE, if `normalize`. den: BNH, if `normalize`.
      kept: BHXDE. kept_sums: BHXD, if `normalize`.
      dy: BNHE. dlast: BHDE or None. dlast_sums: BHD or None.

    Returns:
      Gradients of q BNHD, k BMGD, v BMGE; of the decay BNH or, to be summed over B, BH; of scale BH, to be summed over
      both; of the initial state BHDE and its sums BHD.
    """
    b, n, h, d = q.shape
    groups, e = k.shape[2], v.shape[3]
    norm, inverse, dden = config.normalize, None, None
    if norm:
        safe = jnp.where(den == 0, 1, den + jnp.where(den < 0, -EPSILON, EPSILON))
        inverse = jnp.where(den == 0, 0, 1 / safe)
        dden = -inverse * jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)
        zeros = jnp.zeros((b, h, d), jnp.float32)
        if (dlast is None) != (dlast_sums is None):
            dlast = jnp.zeros((b, h, d, e), jnp.float32) if dlast is None else dlast
            dlast_sums = zeros if dlast_sums is None else dlast_sums
    blocks = config.sweep or sweep_blocks(config.gpu, q.dtype, d, e, config.chunk)
    own = config.backward or backward_blocks(config.gpu, q.dtype, d, e, config.chunk)
    block, split = lengths(config, b * h * math.ceil(d / own.tile), n)
    common = Common(config, blocks, h, block, split, decay, scale)
    cotangents = {"inverse": inverse, "dden": dden, "reverse": True}
    if not config.causal:
        bare = dataclasses.replace(common, scale=None)
        *_, parts, part_sums = run_sweep(bare, None, q, dy, None, None, last=True, **cotangents)
        dstate, dsums = jnp.sum(parts, axis=2), jnp.sum(part_sums, axis=2) if norm else None
        total, total_sums = kept[:, :, 0], kept_sums[:, :, 0] if norm else None
        dscale = None
        if scale is not None:
            dscale = jnp.sum(dstate * total, axis=(2, 3)) + (jnp.sum(dsums * total_sums, axis=2) if norm else 0)
            dstate, dsums = dstate * scale, dsums * scale if norm else None
        if dlast is not None:
            dstate, dsums = dstate + dlast, dsums + dlast_sums if norm else None
        dq, _ = run_read(common, dy, _swap(total), total_sums, scale=scale, weight=inverse, extra=dden, dtype=q.dtype)
        shared, shared_sums = _per_key_head(dstate, groups, 1), _per_key_head(dsums, groups, 1) if norm else None
        of_keys = dataclasses.replace(common, heads=groups)
        dk, _ = run_read(of_keys, v, _swap(shared), shared_sums, dtype=k.dtype)
        dv, _ = run_read(of_keys, k, shared, None, dtype=v.dtype)
        return dq, dk, dv, None, dscale, dstate, dsums
    after, after_sums = before_splits(common, q, dy, dlast, dlast_sums, **cotangents)
    dq, dk, dv, ddecay, dscale, dstate, dsums = run_backward(
        dataclasses.replace(common, blocks=own), q, k, v, dy, inverse, dden, kept, kept_sums, after, after_sums
    )
    if dv is None:
        dv, *_ = run_sweep(common, k, q, dy, after, after_sums, dtype=dk.dtype, **cotangents)
    dk, dv = (_per_key_head(x, groups, 2).astype(q.dtype) for x in (dk, dv))
    return dq, dk, dv, ddecay, dscale, dstate, dsums


def _swap(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _per_key_head(x: jax.Array, groups: int, axis: int) -> jax.Array:
    """Sums what query heads, at `axis`, found for the key head that they share."""
    if x.shape[axis] == groups:
        return x
    return jnp.sum(x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :]), axis=axis + 1)
