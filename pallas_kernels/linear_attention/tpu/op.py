"""Linear attention in Pallas for TPU: one sweep over the tokens forward, one backward, the state on chip.

What runs where:
- `plan` cuts the work into blocks that fit the chip, and counts their bytes;
- `kernels` has the bodies, with the equations; `decay` the three forms of decay; `pallas_kernels.tpu` what ops share;
- this file brings arguments into their form, and holds forward and backward together (`jax.custom_vjp`).

Operands are read in place: (B, N, H, D) as (B, N, H·D), which undoes the reshape of the projection before it. No copy
of q, k or v is made, and none of y or of gradients, with these exceptions, each a pass over the array that it names:
- head sizes other than 16, 32, 64, 128, 256 are padded with zeros to the next of these;
- key heads that several query heads share (G < H) are read in place where D and E are 128 or 256, and repeated
  otherwise; the gradients of the repeated ones are summed in float32;
- the TPU has no float16: such inputs are computed as float32, and results rounded;
- fewer than 16 tokens are filled up to 16.

Decay per token, a number per token and head, is cumulated by XLA before the kernel. Segments become decays, see
`recurrence.decay_of_segments`; without causality they become a causal sweep, see `arguments.in_order_of_ids`; without
both there are two products, S = Σ k vᵀ and y = q S, of two kernels each, forward and backward.

Products have bfloat16 operands and float32 sums; states and gradients of states are rounded to bfloat16 as operands of
products alone. Float32 inputs are multiplied in float32, in six passes. A chip has one or two cores, which batch
elements and blocks of heads share out: there is no split of the sequence, as a single head keeps its core at work.

Sources: Lightning Attention-2 (arXiv:2401.04658) and TransNormerLLM (arXiv:2405.17381) for the tiling, gated linear
attention (arXiv:2312.06635) for decay per channel, Mamba-2 (arXiv:2405.21060) for the form of the chunks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import dispatch, partition, symbolic_zeros
from pallas_kernels.linear_attention.arguments import in_order_of_ids
from pallas_kernels.linear_attention.tpu import plan as tpu_plan
from pallas_kernels.linear_attention.tpu.kernels import call
from pallas_kernels.linear_attention.tpu.plan import SIZES, Config, Plan
from pallas_kernels.recurrence import Arguments, NormalizedState, State, decay_floor, decay_of_segments
from pallas_kernels.tpu.chips import LANES, chip_of

LEAST_TOKENS = 16  # rows of a tile: the compiler takes no shorter arrays, so these are filled up
DECAYS = {1: "head", 3: "token", 4: "channel"}
DECAY_AXES = {None: "", "head": "H", "token": "BNH", "channel": "BNHD"}


def supports(args: Arguments) -> str | None:
    """Why this implementation cannot take `args`; None when it can."""
    if args.q.dtype.name == "float64":
        return "q, k and v must be bfloat16, float16 or float32: the TPU has no float64"
    for name, x in (("q and k", args.q), ("v", args.v)):
        if x.shape[-1] > SIZES[-1]:
            return f"head sizes may be 1 to {SIZES[-1]}, got {x.shape[-1]} channels of {name}"
    config = _config(args)
    if config.chunk is not None:
        if not config.causal:
            return f"without causality and segments it has no chunks, so chunk_size must be None, got {config.chunk}"
        allowed = tpu_plan.chunk_sizes(config.decay)
        if config.chunk not in allowed:
            return f"chunk_size must be None or one of {', '.join(map(str, allowed))} here, got {config.chunk}"
    if plans(args) is None:
        heads, chip = args.q.shape[2], config.chip
        return (
            f"no block of q {args.q.shape}, v {args.v.shape} in {args.q.dtype.name} fits the {chip.vmem_limit} bytes "
            f"of on-chip memory of TPU {chip.name}: {heads} heads do not divide into narrower blocks of whole lanes"
        )
    return partition.refusal()


def run(args: Arguments) -> tuple[jax.Array, State | None]:
    """y (B, N, H, E) and, if asked for, the state."""
    config = _config(args)
    if args.causal:
        return _run_causal(config, args, args.q, args.k, args.v, args.query_ids)
    if args.query_ids is None:
        return _run_full(config, args)
    y = in_order_of_ids(lambda q, k, v, ids: _run_causal(config, args, q, k, v, ids)[0], args, args.v)
    return y, None


def plans(args: Arguments) -> tuple[Plan, ...] | None:
    """How the kernels cut the work of a call: one plan, or two without causality (of keys, of queries); None if none.

    A call with segments but without causality is planned as the causal sweep that it becomes.
    """
    config, (batch, n, heads, _), (m, groups) = _config(args), args.q.shape, args.k.shape[1:3]
    sizes = [tpu_plan.packed_size(x.shape[-1]) for x in (args.q, args.v)]
    dtype = _compute_dtype(args.q.dtype)
    if config.causal:
        n = max(n if args.causal else n + m, LEAST_TOKENS)
        found = (_plan(config, batch, n, heads, groups, *sizes, dtype),)
    else:
        found = tuple(
            tpu_plan.plan_for(config, batch, *x, *sizes, dtype) for x in ((m, groups, groups), (n, heads, heads))
        )
    return None if None in found else found


def traffic(args: Arguments) -> dict[str, float]:
    """Bytes per token and query head that the kernels move between device memory and chip, counted from their blocks.

    Returns:
      "forward" (of a call that will be differentiated) and "backward", with the least possible ones,
      "forward_minimum" (q, k, v, log_decay, y, once each, in their dtype) and "backward_minimum" (q, k, v, log_decay
      and their gradients, and dy). Tokens are those of q; what XLA does before and after the kernels is not counted.
    """
    found = plans(args)
    if found is None:
        raise dispatch.UnsupportedError(f"traffic: {supports(args)}")
    if len(found) == 1:
        forward, backward = found[0].bytes_moved("keep"), found[0].bytes_moved("backward")
    else:
        keys, queries = found
        forward = keys.bytes_moved("outer") + queries.bytes_moved("read")
        backward = keys.bytes_moved("outer_backward") + queries.bytes_moved("read_backward")
    y = args.q.size // args.q.shape[-1] * args.v.shape[-1]
    count, itemsize = args.q.size // args.q.shape[-1], args.q.dtype.itemsize
    decay = 0 if args.log_decay is None else 4 * args.log_decay.size
    once, again = (args.q.size + args.k.size + args.v.size) * itemsize, y * itemsize
    return {
        "forward": forward / count,
        "forward_minimum": (once + again + decay) / count,
        "backward": backward / count,
        "backward_minimum": (2 * once + again + 2 * decay) / count,
    }


# ---- arguments in the form of the kernels


def _config(args: Arguments) -> Config:
    ids = args.query_ids is not None
    decay = None if args.log_decay is None else DECAYS[args.log_decay.ndim]
    if decay == "head" and args.q.shape[1] < LEAST_TOKENS:
        decay = "token"  # tokens that fill up must not decay the state
    return Config(
        chip=chip_of(dispatch.current_device_kind()),
        causal=args.causal or ids,
        decay="token" if ids and decay != "channel" else decay,
        normalize=args.normalize,
        scaled=args.scale is not None,
        initial=args.initial_state is not None,
        final=args.return_state,
        chunk=args.chunk_size,
        block_tokens=tpu_plan.BLOCK_TOKENS,
    )


def _run_causal(config: Config, args: Arguments, q, k, v, ids: jax.Array | None) -> tuple[jax.Array, State | None]:
    n, missing = q.shape[1], max(0, LEAST_TOKENS - q.shape[1])
    decay = args.log_decay if ids is None else decay_of_segments(args, ids)
    if decay is not None:
        floor = decay_floor(jnp.float32)
        decay = jnp.where(decay < -floor, -floor, decay)  # exp is 0 there already
        decay = jnp.broadcast_to(decay, q.shape[:3]) if missing and decay.ndim == 1 else decay
        decay = _padded(decay) if decay.ndim == 4 else decay
    q, k, v = (_padded(x) for x in (q, k, v))
    if missing:
        q, k, v = (_filled_up(x, missing) for x in (q, k, v))
        decay = None if decay is None else _filled_up(decay, missing)
    arrays = partition.same_manual_axes((q, k, v, decay, args.scale, _packed_state(args)))
    y, final = _attend(config, *arrays)
    return _result(args, y[:, :n]), _unpacked_state(args, final)


def _run_full(config: Config, args: Arguments) -> tuple[jax.Array, State | None]:
    q, k, v = (_padded(x) for x in (args.q, args.k, args.v))
    q, k, v, scale, initial = partition.same_manual_axes((q, k, v, args.scale, _packed_state(args)))
    total = jnp.repeat(_sum(config, k, v), q.shape[2] // k.shape[2], axis=1)
    total = total if initial is None else total + initial
    state = _unpacked_state(args, total) if args.return_state else None
    return _result(args, _read(config, q, scale, total)), state


def _compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)


def _padded(x: jax.Array) -> jax.Array:
    """The last axis filled up with zeros to a size that packs, in the dtype of the kernels."""
    size = x.shape[-1]
    x = x.astype(_compute_dtype(x.dtype))
    missing = tpu_plan.packed_size(size) - size
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),)) if missing else x


def _filled_up(x: jax.Array, missing: int) -> jax.Array:
    """(B, N, ...) with so many empty tokens behind the last one."""
    return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))


def _result(args: Arguments, y: jax.Array) -> jax.Array:
    return y[..., : args.v.shape[-1]].astype(args.q.dtype)


def _packed_state(args: Arguments) -> jax.Array | None:
    """The initial state with padded sizes, (B, H, D, E), or (B, H, D, E + 1) with Σk in the last column."""
    state = args.initial_state
    if not isinstance(state, NormalizedState):
        return None if state is None else _padded(_padded(state).mT).mT
    kv = _padded(_padded(state.kv).mT).mT
    return jnp.concatenate([kv, _padded(state.k)[..., None]], axis=-1)


def _unpacked_state(args: Arguments, state: jax.Array | None) -> State | None:
    if state is None:
        return None
    d, e = args.q.shape[-1], args.v.shape[-1]
    kv = state[:, :, :d, :e]
    return NormalizedState(kv, state[:, :, :d, -1]) if args.normalize else kv


# ---- causal: forward and backward


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(config: Config, q, k, v, decay, scale, initial) -> tuple[jax.Array, jax.Array | None]:
    """y (B, N, H, E) and the last state or None; sizes pack, and all arrays vary over the same manual axes."""
    y, final, _ = _spread_out(_forward, config, keep=False)(q, k, v, decay, scale, initial)
    return y, final


def _attend_forward(config: Config, *arrays):
    marks, (q, k, v, decay, scale, initial) = symbolic_zeros.primals(arrays, decay=3, scale=4)
    y, final, kept = _spread_out(_forward, config, keep=True)(q, k, v, decay, scale, initial)
    return (y, final), (marks, q, k, v, decay, scale, kept)


def _attend_backward(config: Config, residuals, cotangents):
    marks, *arrays = residuals
    cotangents = [jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in cotangents]
    arrays = partition.same_manual_axes((*arrays, *cotangents))
    config = dataclasses.replace(config, decay_gradient="decay" in marks, scale_gradient="scale" in marks)
    dq, dk, dv, ddecay, dscale, dinitial = _spread_out(_backward, config)(*arrays)
    if ddecay is not None and config.decay == "head":
        ddecay = jnp.sum(ddecay, axis=0)
    return dq, dk, dv, ddecay, None if dscale is None else jnp.sum(dscale), dinitial


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _spread_out(fn, config: Config, **static):
    """`fn` cut over devices by batch and heads, and with vmapped axes in its batch."""
    decay, initial = DECAY_AXES[config.decay], "BHDE" if config.initial else None
    final = "BHDE" if config.final else None
    if fn is _forward:
        inputs = ("BNHD", "BNGD", "BNGE", decay, "", "BHDE")
        outputs = ("BNHE", final, "BTEHD" if static["keep"] else None)
    else:
        inputs = ("BNHD", "BNGD", "BNGE", decay, "", "BTEHD", "BNHE", "BHDE")
        summed = "BH" if config.decay == "head" else decay
        ddecay = summed if config.decay and config.decay_gradient else None
        dscale = "BH" if config.scaled and config.scale_gradient else None
        outputs = ("BNHD", "BNGD", "BNGE", ddecay, dscale, initial)
    return partition.batched_and_partitioned(functools.partial(fn, config, **static), inputs, outputs)


def _forward(config: Config, q, k, v, decay, scale, initial, *, keep: bool):
    """The forward kernel on whole arrays.

    Args:
      config: static; sizes come from the arrays.
      q: (B, N, H, D).
      k: (B, N, G, D).
      v: (B, N, G, E).
      decay: None, (H,), (B, N, H) or (B, N, H, D), float32.
      scale: None or a scalar, float32.
      initial: None or (B, H, D, E), with a column more when normalising, float32.
      keep: whether to keep states for the backward pass.

    Returns:
      y (B, N, H, E); the last state like `initial`, or None; the states before every block (B, blocks, rows, H, D), or
      None.
    """
    plan = _plan_of(config, q, k, v)
    kind = "keep" if keep else "forward"
    out = call(plan, kind, _tokens(plan, q=q, k=k, v=v) | _options(plan, decay, scale, initial=initial))
    y = out["y"].reshape(*q.shape[:3], -1)
    kept = out["kept"].reshape(*out["kept"].shape[:3], *q.shape[2:]) if keep else None
    return y, _from_rows(plan, out.get("final")), kept


def _backward(config: Config, q, k, v, decay, scale, kept, dy, dfinal):
    """The backward kernel on whole arrays: gradients of what `_forward` reads, None where none is asked for.

    Those of a decay per head and of the scale are (B, H) each, to be summed over what they were shared by.
    """
    # The blocks are those of the forward pass, which kept a state before each.
    plan = _plan_of(dataclasses.replace(config, decay_gradient=True, scale_gradient=True), q, k, v)
    plan = dataclasses.replace(plan, config=config)
    arrays = _tokens(plan, q=q, k=k, v=v, dy=dy) | _options(plan, decay, scale, dfinal=dfinal)
    out = call(plan, "backward", arrays | {"kept": kept.reshape(*kept.shape[:3], -1)})
    dq = out["dq"].reshape(q.shape)
    dk, dv = (_from_shared(plan, out[name], x) for name, x in (("dk", k), ("dv", v)))
    by_head = out["sums"].reshape(plan.batch, 8, plan.heads, -1).sum(-1) if config.sums else None
    ddecay = out.get("ddecay")
    match config.decay if config.decay_gradient else None:
        case "head":
            ddecay = by_head[:, 0]
        case "token":
            ddecay = jnp.transpose(ddecay, (0, 2, 4, 1, 3)).reshape(plan.batch, -1, plan.heads)[:, : plan.length]
        case "channel":
            ddecay = ddecay.reshape(q.shape)
    dscale = None
    if config.scaled and config.scale_gradient:  # a normalised output does not depend on it
        dscale = jnp.zeros_like(dq[:, 0, :, 0], jnp.float32) if config.normalize else by_head[:, 1]
    return dq, dk, dv, ddecay, dscale, _from_rows(plan, out.get("dinitial"))


def _plan(config: Config, batch: int, n: int, heads: int, kv_heads: int, d: int, e: int, dtype) -> Plan | None:
    """Shared keys are read in place where heads have whole lanes, and repeated otherwise."""
    in_place = tpu_plan.plan_for(config, batch, n, heads, kv_heads, d, e, dtype) if min(d, e) >= LANES else None
    return in_place or tpu_plan.plan_for(config, batch, n, heads, heads, d, e, dtype)


def _plan_of(config: Config, q: jax.Array, k: jax.Array, v: jax.Array) -> Plan:
    (batch, n, heads, d), (kv_heads, e) = q.shape, v.shape[2:]
    plan = _plan(config, batch, n, heads, kv_heads, d, e, q.dtype)
    if plan is None:
        raise dispatch.UnsupportedError(f"no block of q {q.shape}, v {v.shape} fits TPU {config.chip.name}")
    return plan


def _tokens(plan: Plan, **arrays: jax.Array) -> dict[str, jax.Array]:
    """(B, N, heads, size) as (B, N, heads·size); key heads repeated where the plan wants as many as of q."""
    result = {}
    for name, x in arrays.items():
        x = jnp.repeat(x, plan.heads // plan.repeats // x.shape[2], axis=2) if name in "kv" else x
        result[name] = x.reshape(*x.shape[:2], -1)
    return result


def _from_shared(plan: Plan, gradient: jax.Array, x: jax.Array) -> jax.Array:
    """The gradient of x (B, N, G, size) from that of its repeated heads."""
    if gradient.size == x.size:
        return gradient.reshape(x.shape)
    parts = gradient.reshape(*x.shape[:3], -1, x.shape[3])
    return jnp.sum(parts, axis=3, dtype=jnp.float32).astype(x.dtype)


def _options(plan: Plan, decay, scale, **states: jax.Array | None) -> dict[str, jax.Array]:
    arrays = {name: _to_rows(plan, x) for name, x in states.items() if x is not None}
    if scale is not None:
        arrays["scale"] = scale.reshape(1)
    if plan.config.decay == "channel":
        arrays["decay"] = decay.reshape(*decay.shape[:2], -1)
    elif decay is not None:
        arrays["decay"] = _cumulated(plan, decay) if plan.config.decay == "token" else decay
    return arrays


def _to_rows(plan: Plan, state: jax.Array) -> jax.Array:
    """(B, H, D, E or E + 1) as the kernels keep it: (B, rows, H·D)."""
    state = jnp.transpose(state, (0, 3, 1, 2))
    state = state.reshape(*state.shape[:2], -1)
    return jnp.pad(state, ((0, 0), (0, plan.state_rows - state.shape[1]), (0, 0)))


def _from_rows(plan: Plan, state: jax.Array | None) -> jax.Array | None:
    if state is None:
        return None
    columns = plan.value_size + plan.config.normalize
    state = state[:, :columns].reshape(plan.batch, columns, plan.heads, plan.key_size)
    return jnp.transpose(state, (0, 2, 3, 1))


def _cumulated(plan: Plan, g: jax.Array) -> jax.Array:
    """Log decays (B, N, H) cumulated in every chunk: (B, blocks of heads, chunks, heads or twice as many, c).

    In float32, the difference of two long sums loses the small decays that follow a large one. Wide inputs therefore
    get two parts: sums of multiples of a step so coarse that they are exact, and sums of the rests below it.
    """
    hb, c = plan.block_heads, plan.chunk
    g = jnp.pad(g, ((0, 0), (0, plan.blocks * plan.tokens - plan.length), (0, 0)))
    g = jnp.transpose(g.reshape(plan.batch, -1, c, plan.heads // hb, hb), (0, 3, 1, 4, 2))
    if plan.decay_rows > hb:
        bits = jnp.finfo(jnp.float32).nmant + 1
        step = 2.0 ** (np.ceil(np.log2(c * decay_floor(jnp.float32))) - bits)
        coarse = jnp.ceil(g / step) * step
        g = jnp.concatenate([coarse, g - coarse], axis=3)
    before = jnp.triu(jnp.ones((c, c), jnp.float32))
    return jnp.einsum("bhtrj,ji->bhtri", g, before, precision="highest")


# ---- not causal: S = Σ k vᵀ and y = q S, forward and backward


def _full_plan(config: Config, x: jax.Array, d: int, e: int) -> Plan:
    plan = tpu_plan.plan_for(config, *x.shape[:3], x.shape[2], d, e, x.dtype)
    if plan is None:
        raise dispatch.UnsupportedError(f"no block of heads {x.shape} fits TPU {config.chip.name}")
    return plan


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(config: Config, k: jax.Array, v: jax.Array) -> jax.Array:
    """Σ_j k_j v_jᵀ, (B, G, D, E), and Σ_j k_j in a column more when normalising."""

    def outer(k, v):
        plan = _full_plan(config, k, k.shape[3], v.shape[3])
        return (_from_rows(plan, call(plan, "outer", _tokens(plan, k=k, v=v))["total"]),)

    return partition.batched_and_partitioned(outer, ("BMHD", "BMHE"), ("BHDE",))(k, v)[0]


def _sum_backward(config: Config, residuals, dtotal):
    def outer_backward(k, v, dtotal):
        plan = _full_plan(config, k, k.shape[3], v.shape[3])
        out = call(plan, "outer_backward", _tokens(plan, k=k, v=v) | {"dtotal": _to_rows(plan, dtotal)})
        return out["dk"].reshape(k.shape), out["dv"].reshape(v.shape)

    axes = ("BMHD", "BMHE", "BHDE")
    return partition.batched_and_partitioned(outer_backward, axes, axes[:2])(*residuals, dtotal)


_sum.defvjp(lambda config, k, v: (_sum(config, k, v), (k, v)), _sum_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(config: Config, q: jax.Array, scale: jax.Array | None, total: jax.Array) -> jax.Array:
    """scale · q S, (B, N, H, E), divided by scale · q · Σk when normalising."""

    def read(q, scale, total):
        plan = _full_plan(config, q, q.shape[3], total.shape[3] - config.normalize)
        out = call(plan, "read", _tokens(plan, q=q) | _options(plan, None, scale, total=total))
        return (out["y"].reshape(*q.shape[:3], -1),)

    return partition.batched_and_partitioned(read, ("BNHD", "", "BHDE"), ("BNHE",))(q, scale, total)[0]


def _read_forward(config: Config, *arrays):
    marks, arrays = symbolic_zeros.primals(arrays, scale=1)
    return _read(config, *arrays), (marks, *arrays)


def _read_backward(config: Config, residuals, dy):
    marks, *arrays = residuals
    config = dataclasses.replace(config, scale_gradient="scale" in marks)
    scaled = config.scaled and config.scale_gradient

    def read_backward(q, scale, total, dy):
        plan = _full_plan(config, q, q.shape[3], dy.shape[3])
        out = call(plan, "read_backward", _tokens(plan, q=q, dy=dy) | _options(plan, None, scale, total=total))
        dscale = None
        if scaled:
            dscale = jnp.zeros_like(q[:, 0, :, 0], jnp.float32)
            if not config.normalize:
                dscale = out["sums"][:, 1].reshape(plan.batch, plan.heads, -1).sum(-1)
        return out["dq"].reshape(q.shape), dscale, _from_rows(plan, out["dtotal"])

    axes = ("BNHD", "", "BHDE", "BNHE"), ("BNHD", "BH" if scaled else None, "BHDE")
    dq, dscale, dtotal = partition.batched_and_partitioned(read_backward, *axes)(*arrays, dy)
    return dq, None if dscale is None else jnp.sum(dscale), dtotal


_read.defvjp(_read_forward, _read_backward, symbolic_zeros=True)
