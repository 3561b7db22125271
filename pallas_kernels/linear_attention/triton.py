"""Linear attention as Triton kernels, called through jax-triton: forward, and a backward pass written by hand.

The kernels are in `triton_kernels.py`, their blocks in `triton_plan.py`; README.md derives the recurrence, the chunks
and their weights.

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

**Few heads.** If there are fewer programs than half of the multiprocessors, the sequence is split: a sweep sums each
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
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import dispatch, partition
from pallas_kernels.linear_attention import triton_kernels as kernels
from pallas_kernels.linear_attention.arguments import (
    EPSILON,
    Arguments,
    NormalizedState,
    State,
    decay_of_segments,
    in_order_of_ids,
)
from pallas_kernels.linear_attention.triton_plan import (
    LEAST_ABLE,
    Blocks,
    Generation,
    backward_blocks,
    block_length,
    chunk_sizes,
    generation,
    padded,
    split_count,
    sweep_blocks,
    wide,
)

SIZES = (16, 256)  # least and greatest D and E
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is static in a call.

    Attributes:
      causal: as in `linear_attention`.
      normalize: as in `linear_attention`.
      return_state: whether the last state is asked for.
      residuals: whether the forward pass gives what the backward pass needs.
      decay_gradient: whether the backward pass computes the gradient of the decay.
      generation: of the GPU.
      chunk: tokens per chunk, None for the table's choice.
      splits: parts into which the sequence is split, at most; None to fill the GPU.
      block: tokens between kept states, a multiple of every chunk; None for `block_length`.
      sweep: blocks of `sweep` and `read`, None for the table's; for tuning.
      backward: blocks of `backward`, None for the table's; for tuning.
    """

    causal: bool = True
    normalize: bool = False
    return_state: bool = False
    residuals: bool = False
    decay_gradient: bool = True
    generation: Generation = LEAST_ABLE
    chunk: int | None = None
    splits: int | None = None
    block: int | None = None
    sweep: Blocks | None = None
    backward: Blocks | None = None


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
    gpu = generation(dispatch.current_device_kind())
    allowed = chunk_sizes(gpu, args.q.dtype, args.q.shape[3], args.v.shape[3])
    if args.chunk_size is not None and args.chunk_size not in allowed:
        return f"chunk_size must be one of {allowed} for these sizes and {dtype} on {gpu.name}, got {args.chunk_size}"
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
        **({"generation": generation(dispatch.current_device_kind()), "chunk": args.chunk_size} | choices),
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


def _lengths(config: Config, programs: int, tokens: int) -> tuple[int, int]:
    """Tokens of a block and of a split, which is whole blocks."""
    block = config.block or block_length(tokens)
    wanted = config.splits or split_count(config.generation, programs, tokens)
    return block, math.ceil(tokens / (block * wanted)) * block


# ---- the op and its derivative


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(config: Config, q, k, v, decay, scale, state, sums):
    """y, the last state and its sums (None where not asked for)."""
    return _spread_forward(config, q, k, v, decay, scale, state, sums)[:3]


def _attend_forward(config: Config, *arrays):
    perturbed = [x is not None and x.perturbed for x in arrays]
    arrays = [None if x is None else x.value for x in arrays]
    y, last, last_sums, *kept = _spread_forward(dataclasses.replace(config, residuals=True), *arrays)
    q, k, v, decay, scale, state, _ = arrays
    # What is static travels in the structure of the residuals.
    marks = {"decay": perturbed[3], "state": state is not None}
    marks = {name: () for name, mark in marks.items() if mark}
    return (y, last, last_sums), (marks, q, k, v, decay, scale, y if config.normalize else None, *kept)


def _attend_backward(config: Config, residuals, cotangents):
    marks, q, k, v, *rest = residuals
    dy, dlast, dlast_sums = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
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
    blocks = config.sweep or sweep_blocks(config.generation, q.dtype, d, e, config.chunk)
    block, split = _lengths(config, b * h * math.ceil(e / blocks.tile), m)
    common, norm = _Common(config, blocks, h, block, split, decay, scale), config.normalize
    if not config.causal:
        *_, parts, part_sums = _sweep(common, None, k, v, None, None, last=True)
        total, total_sums = jnp.sum(parts, axis=2), jnp.sum(part_sums, axis=2) if norm else None
        if state is not None:
            total, total_sums = total + state, total_sums + sums if norm else None
        y, den = _read(common, q, total, total_sums, scale=scale, divide=norm, dtype=q.dtype)
        last = (total, total_sums) if config.return_state else (None, None)
        kept = (den, total[:, :, None], total_sums[:, :, None] if norm else None) if config.residuals else (None,) * 3
        return (y, *last, *kept)
    first, first_sums = _before_splits(common, k, v, state, sums)
    y, den, kept, kept_sums, last, last_sums = _sweep(
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
    blocks = config.sweep or sweep_blocks(config.generation, q.dtype, d, e, config.chunk)
    own = config.backward or backward_blocks(config.generation, q.dtype, d, e, config.chunk)
    block, split = _lengths(config, b * h * math.ceil(d / own.tile), n)
    common = _Common(config, blocks, h, block, split, decay, scale)
    cotangents = {"inverse": inverse, "dden": dden, "reverse": True}
    if not config.causal:
        bare = dataclasses.replace(common, scale=None)
        *_, parts, part_sums = _sweep(bare, None, q, dy, None, None, last=True, **cotangents)
        dstate, dsums = jnp.sum(parts, axis=2), jnp.sum(part_sums, axis=2) if norm else None
        total, total_sums = kept[:, :, 0], kept_sums[:, :, 0] if norm else None
        dscale = None
        if scale is not None:
            dscale = jnp.sum(dstate * total, axis=(2, 3)) + (jnp.sum(dsums * total_sums, axis=2) if norm else 0)
            dstate, dsums = dstate * scale, dsums * scale if norm else None
        if dlast is not None:
            dstate, dsums = dstate + dlast, dsums + dlast_sums if norm else None
        dq, _ = _read(common, dy, _swap(total), total_sums, scale=scale, weight=inverse, extra=dden, dtype=q.dtype)
        shared, shared_sums = _per_key_head(dstate, groups, 1), _per_key_head(dsums, groups, 1) if norm else None
        of_keys = dataclasses.replace(common, heads=groups)
        dk, _ = _read(of_keys, v, _swap(shared), shared_sums, dtype=k.dtype)
        dv, _ = _read(of_keys, k, shared, None, dtype=v.dtype)
        return dq, dk, dv, None, dscale, dstate, dsums
    after, after_sums = _before_splits(common, q, dy, dlast, dlast_sums, **cotangents)
    dq, dk, dv, ddecay, dscale, dstate, dsums = _main_backward(
        dataclasses.replace(common, blocks=own), q, k, v, dy, inverse, dden, kept, kept_sums, after, after_sums
    )
    if dv is None:
        dv, *_ = _sweep(common, k, q, dy, after, after_sums, dtype=dk.dtype, **cotangents)
    dk, dv = (_per_key_head(x, groups, 2).astype(q.dtype) for x in (dk, dv))
    return dq, dk, dv, ddecay, dscale, dstate, dsums


# ---- calls of the kernels


@dataclasses.dataclass(frozen=True)
class _Common:
    """What the calls of one pass share.

    Attributes:
      config: what is static in the op.
      blocks: of the kernel.
      heads: H.
      block: tokens between kept states.
      split: tokens of a split.
      decay: (H,), (B, N, H) or None.
      scale: scalar or None.
    """

    config: Config
    blocks: Blocks
    heads: int
    block: int
    split: int
    decay: jax.Array | None
    scale: jax.Array | None

    @property
    def decay_kind(self) -> int:
        return 0 if self.decay is None else 1 if self.decay.ndim == 1 else 2

    def statics(self, dtype: jnp.dtype) -> dict[str, Any]:
        """Constants of every kernel: chunk, and precision of products."""
        return {"CHUNK": self.blocks.chunk, **_precision(dtype)}

    def decay_statics(self, dtype: jnp.dtype) -> dict[str, Any]:
        """Constants of the weights; the step is that of xla.py, for float32."""
        two_parts = self.decay_kind == 2 and wide(dtype)
        step = 2.0 ** (math.ceil(math.log2(self.blocks.chunk * -kernels.LEAST)) - 24) if two_parts else 0.0
        return {"DECAY": self.decay_kind, "STEP": step}


def _sweep(
    common: _Common,
    a: jax.Array | None,
    b: jax.Array,
    c: jax.Array,
    first: jax.Array | None,
    first_sums: jax.Array | None,
    *,
    keep: bool = False,
    last: bool = False,
    inverse: jax.Array | None = None,
    dden: jax.Array | None = None,
    reverse: bool = False,
    dtype: jnp.dtype | None = None,
) -> tuple[jax.Array | None, ...]:
    """The kernel `sweep`: y, den, kept, kept_z, last, last_z, None for those not asked for; no y without `a`."""
    batch, tokens, _, inner = b.shape
    heads, outer, blocks, norm = common.heads, c.shape[3], common.blocks, common.config.normalize
    tiles, splits, kept = (
        math.ceil(x / y) for x, y in ((outer, blocks.tile), (tokens, common.split), (tokens, common.block))
    )
    f32 = jnp.float32
    outputs = [
        None if a is None else _Out((batch, tokens, heads, outer), dtype or b.dtype),
        _Out((batch, tokens, heads), f32) if keep and norm else None,
        _Out((batch, heads, kept, inner, outer), _operand(b.dtype)) if keep else None,
        _Out((batch, heads, kept, inner), f32) if keep and norm else None,
        _Out((batch, heads, splits, inner, outer), f32) if last else None,
        _Out((batch, heads, splits, inner), f32) if last and norm else None,
    ]
    return _call(
        kernels.sweep,
        [a, b, c, common.decay, common.scale, inverse, dden, first, first_sums if norm else None],
        tokens,
        outputs,
        gpu=common.config.generation,
        grid=batch * heads * splits * tiles,
        blocks=blocks,
        HEADS=heads,
        A_HEADS=(b if a is None else a).shape[2],
        B_HEADS=b.shape[2],
        C_HEADS=c.shape[2],
        IN=inner,
        OUT=outer,
        BLOCK_IN=padded(inner),
        TILE=blocks.tile,
        SPLIT=common.split // blocks.chunk,
        EVERY=common.block // blocks.chunk,
        REVERSE=reverse,
        SCALE=common.scale is not None,
        NORMALIZE=norm,
        FIRST=first is not None,
        OUTPUT=a is not None,
        KEEP=keep,
        LAST=last,
        **common.decay_statics(b.dtype),
        **common.statics(b.dtype),
    )


def _main_backward(common: _Common, q, k, v, dy, inverse, dden, kept, kept_sums, after, after_sums):
    """The kernel `backward`: dq, dk, dv (None for a sweep of its own), ddecay, dscale, dstate, dsums."""
    (batch, tokens, heads, key), groups, value = q.shape, k.shape[2], v.shape[3]
    blocks, norm, kind = common.blocks, common.config.normalize, common.decay_kind
    chunks, tiles = math.ceil(tokens / blocks.chunk), math.ceil(key / blocks.tile)
    splits, span = math.ceil(tokens / common.split), common.block // blocks.chunk
    programs = batch * heads * splits * tiles
    f32 = jnp.float32
    whole = tiles == 1 and padded(value) <= 128  # a wider dv does not fit into registers beside the rest
    dtype = q.dtype if groups == heads else f32
    gradient = common.config.decay_gradient and kind > 0
    shape = (tiles, batch, heads, chunks) if kind == 1 else (tiles, batch, tokens, heads)
    outputs = [
        _Out(q.shape, q.dtype),
        _Out(q.shape, dtype),
        _Out((*q.shape[:3], value), dtype) if whole else None,
        _Out(shape, f32) if gradient else None,
        _Out((programs,), f32) if common.scale is not None else None,
        _Out((batch, heads, splits, key, value), f32),
        _Out((batch, heads, splits, key), f32) if norm else None,
        _Out((programs, span, blocks.tile, padded(value)), _operand(q.dtype)),
        _Out((programs, span, blocks.tile), f32) if norm else None,
    ]
    dq, dk, dv, ddecay, dscale, dstate, dsums, *_ = _call(
        kernels.backward,
        [q, k, v, dy, common.decay, common.scale, inverse, dden, kept, kept_sums, after, after_sums if norm else None],
        tokens,
        outputs,
        gpu=common.config.generation,
        grid=programs,
        blocks=blocks,
        HEADS=heads,
        KV_HEADS=groups,
        D=key,
        E=value,
        TILE=blocks.tile,
        BLOCK_E=padded(value),
        SPLIT=common.split // blocks.chunk,
        EVERY=common.block // blocks.chunk,
        SCALE=common.scale is not None,
        NORMALIZE=norm,
        FIRST=after is not None,
        LAST=True,
        VALUES=whole,
        DECAY_GRADIENT=gradient,
        **common.decay_statics(q.dtype),
        **common.statics(q.dtype),
    )
    if ddecay is not None:
        ddecay = jnp.sum(ddecay, axis=(0, 3) if kind == 1 else 0)
    if dscale is not None:
        dscale = jnp.sum(dscale.reshape(batch, heads, -1), axis=2)
    return dq, dk, dv, ddecay, dscale, *(None if x is None else x[:, :, 0] for x in (dstate, dsums))


def _read(
    common: _Common,
    a: jax.Array,
    state: jax.Array,
    z: jax.Array | None,
    *,
    dtype: jnp.dtype,
    scale: jax.Array | None = None,
    divide: bool = False,
    weight: jax.Array | None = None,
    extra: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """The kernel `read`: y, and den when `divide`. A `z` that is not the divisor's is added to each row."""
    (batch, tokens, a_heads, inner), outer, heads = a.shape, state.shape[3], common.heads
    config = common.config
    blocks = config.sweep or sweep_blocks(config.generation, a.dtype, inner, outer, config.chunk)
    chunks, tiles = math.ceil(tokens / blocks.chunk), math.ceil(outer / blocks.tile)
    return _call(
        kernels.read,
        [a, state, z, scale, weight, extra],
        tokens,
        [
            _Out((batch, tokens, heads, outer), dtype),
            _Out((batch, tokens, heads), jnp.float32) if divide else None,
        ],
        gpu=config.generation,
        grid=batch * heads * chunks * tiles,
        blocks=blocks,
        HEADS=heads,
        A_HEADS=a_heads,
        STATE_HEADS=state.shape[1],
        IN=inner,
        OUT=outer,
        BLOCK_IN=padded(inner),
        TILE=blocks.tile,
        CHUNK=blocks.chunk,
        SCALE=scale is not None,
        DIVIDE=divide,
        WEIGHT=weight is not None,
        EXTRA=0 if z is None or divide else 1 if extra is None else 2,
        **_precision(a.dtype),
    )


def _before_splits(
    common: _Common,
    b: jax.Array,
    c: jax.Array,
    state: jax.Array | None,
    sums: jax.Array | None,
    *,
    reverse: bool = False,
    **cotangents: jax.Array | None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The state with which each split begins, (B, H, splits, D, E) and its sums, walking forward or in reverse.

    It is the sum over the splits before it of their own states and the initial one, each times the decay of the whole
    splits that lie between: the exponents are plain sums of log decays.
    """
    splits = math.ceil(b.shape[1] / common.split)
    if splits == 1:
        return tuple(None if x is None else x[:, :, None] for x in (state, sums))
    *_, own, own_sums = _sweep(common, None, b, c, None, None, last=True, reverse=reverse, **cotangents)
    place = np.arange(splits)
    origin = place if state is None else np.append(place, splits if reverse else -1)
    here, there, between = place[:, None, None], origin[None, :, None], place[None, None, :]
    if reverse:
        comes, lies = there > here, (here < between) & (between < there)
    else:
        comes, lies = there < here, (there < between) & (between < here)
    exponents = jnp.sum(_split_decays(common, b.shape[1], splits)[:, :, None, None] * lies, axis=-1)
    weights = jnp.where(comes[..., 0], jnp.exp(exponents), 0)  # (B or 1, H or 1, splits, origins)
    weights = jnp.broadcast_to(weights, (*own.shape[:2], *weights.shape[2:]))

    def arrive(own: jax.Array | None, initial: jax.Array | None) -> jax.Array | None:
        if own is None:
            return None
        own = own if initial is None else jnp.concatenate([own, initial[:, :, None]], axis=2)
        return jnp.einsum("bhsu,bhu...->bhs...", weights, own, precision="highest")

    return arrive(own, state), arrive(own_sums, sums)


def _split_decays(common: _Common, tokens: int, splits: int) -> jax.Array:
    """Log decay over each whole split, (B or 1, H or 1, splits)."""
    if common.decay is None:
        return jnp.zeros((1, 1, splits), jnp.float32)
    size = common.split
    decay = jnp.maximum(common.decay, kernels.LEAST)
    if decay.ndim == 1:
        lengths = np.minimum(size, tokens - size * np.arange(splits))
        return (decay[:, None] * lengths)[None]
    decay = jnp.pad(decay, ((0, 0), (0, splits * size - tokens), (0, 0)))
    return jnp.swapaxes(jnp.sum(decay.reshape(decay.shape[0], splits, size, -1), axis=2), 1, 2)


# ---- small things


class _Out(NamedTuple):
    """Shape and dtype of an output of a kernel."""

    shape: tuple[int, ...]
    dtype: jnp.dtype


def _precision(dtype: jnp.dtype) -> dict[str, Any]:
    """How products are computed, as constants of a kernel."""
    if wide(dtype):
        return {"DOT": kernels.tl.float32, "PRECISION": "ieee"}
    return {"DOT": kernels.tl.bfloat16, "PRECISION": "tf32"}  # the second concerns float32 operands alone


def _operand(dtype: jnp.dtype) -> jnp.dtype:
    """Dtype of operands of products, of kept states and of scratch."""
    return jnp.float32 if wide(dtype) else jnp.bfloat16


def _swap(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _per_key_head(x: jax.Array, groups: int, axis: int) -> jax.Array:
    """Sums what query heads, at `axis`, found for the key head that they share."""
    if x.shape[axis] == groups:
        return x
    return jnp.sum(x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :]), axis=axis + 1)


def _call(
    kernel: Any,
    inputs: Sequence[jax.Array | None],
    tokens: int,
    outputs: Sequence[_Out | None],
    *,
    gpu: Generation,
    grid: int,
    blocks: Blocks,
    **constants: Any,
) -> list[jax.Array | None]:
    """A kernel with absent inputs and outputs: the first input stands in for those, one number for these."""
    stand_in = next(x for x in inputs if x is not None)
    arrays = [stand_in if x is None else x.reshape(1) if x.ndim == 0 else x for x in inputs]
    shapes = [jax.ShapeDtypeStruct(*(out or ((1,), jnp.float32))) for out in outputs]
    capability = None if gpu == LEAST_ABLE else gpu.capability
    results = _launch(kernel, arrays, tokens, shapes, capability, grid, blocks.warps, blocks.stages, constants)
    # A call that JAX knows nothing of gives arrays that are typed as equal on all shards of a `jax.shard_map`.
    results, _ = partition.same_manual_axes((list(results), arrays))
    return [x if out is not None else None for x, out in zip(results, outputs, strict=True)]


def _launch(
    kernel: Any,
    arrays: Sequence[jax.Array],
    tokens: int,
    shapes: Sequence[jax.ShapeDtypeStruct],
    capability: int | None,
    grid: int,
    warps: int,
    stages: int,
    constants: dict[str, Any],
) -> Sequence[jax.Array]:
    """Runs `kernel(*arrays, tokens, *outputs, **constants)`; without a `capability` it is that of the first GPU."""
    import jax_triton  # raises where jaxlib has no CUDA

    return jax_triton.triton_call(
        *arrays,
        tokens,
        kernel=kernel,
        out_shape=list(shapes),
        grid=(grid,),
        num_warps=warps,
        num_stages=stages,
        compute_capability=capability,
        **constants,
    )
