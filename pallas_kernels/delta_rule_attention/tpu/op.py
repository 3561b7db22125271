"""Pallas for TPU: one sweep over the tokens forward and one backward, the state held on chip.

The derivation stands in `kernels`, the sizes in `plan`. Here: what is refused, the normal form of the operands,
and the derivative.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, partition
from pallas_kernels.delta_rule_attention.arguments import Arguments, per_head
from pallas_kernels.delta_rule_attention.tpu.kernels import call
from pallas_kernels.delta_rule_attention.tpu.plan import CHUNKS, LARGEST, Plan, plan_for
from pallas_kernels.recurrence import decay_of_segments
from pallas_kernels.tpu.chips import MIB, chip_of
from pallas_kernels.tpu.plans import Config

DTYPES = ("bfloat16", "float32")

# Axes of arrays as `partition` names them: B and H, and G of key heads, are cut over devices.
TOKENS = ("BNHD", "BMGD", "BMGE", "BNH", "BNH", "", "BHDE")  # q, k, v, β, log decay, scale, initial state


def supports(args: Arguments) -> str | None:
    """Why the kernels cannot take `args`; None when they can."""
    if args.q.dtype.name not in DTYPES:
        return f"it takes {' and '.join(DTYPES)}, got {args.q.dtype.name}"
    if max(args.q.shape[3], args.v.shape[3]) > LARGEST:
        return f"D and E may be at most {LARGEST}, got {args.q.shape[3]} and {args.v.shape[3]}"
    if args.chunk_size is not None and args.chunk_size not in CHUNKS:
        return f"chunk_size must be None or one of {', '.join(map(str, CHUNKS))}, got {args.chunk_size}"
    config = _config(args)
    if _plan(config, args.q, args.k, args.v) is None:
        return f"no block fits {config.chip.vmem_limit // MIB} MiB of on-chip memory"
    return partition.refusal()


def run(args: Arguments) -> tuple[jax.Array, jax.Array | None]:
    """y (B, N, H, E) and, if asked for, the state."""
    decay = args.log_decay if args.query_ids is None else decay_of_segments(args, args.query_ids)
    if decay is not None:
        decay = jnp.broadcast_to(decay, args.beta.shape)
    arrays = (args.q, args.k, args.v, args.beta, decay, args.scale, args.initial_state)
    return _attention(_config(args), *partition.same_manual_axes(arrays))


def _config(args: Arguments) -> Config:
    return Config(
        chip=chip_of(dispatch.current_device_kind()),
        decay=None if args.log_decay is None and args.query_ids is None else "token",
        scaled=args.scale is not None,
        initial=args.initial_state is not None,
        final=args.return_state,
        chunk=args.chunk_size,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config: Config, q, k, v, beta, decay, scale, initial):
    y, final, _ = _partitioned(config, "forward")(q, k, v, beta, decay, scale, initial)
    return y, final


def _attention_forward(config: Config, *arrays):
    y, final, kept = _partitioned(config, "keep")(*arrays)
    return (y, final), (*arrays[:-1], kept)


def _attention_backward(config: Config, residuals, cotangents):
    dy, dfinal = cotangents
    *gradients, dscale, dinitial = _partitioned(config, "backward")(*residuals, dy, dfinal)
    return *gradients, None if dscale is None else jnp.sum(dscale), dinitial


_attention.defvjp(_attention_forward, _attention_backward)


def _partitioned(config: Config, kind: str):
    """`_run` of one kernel, cut over devices and vmapped by batch and heads."""
    decay, scale, initial, final = (
        axes if present else None
        for axes, present in (
            ("BNH", config.decay is not None),
            ("BH", config.scaled),
            ("BHDE", config.initial),
            ("BHDE", config.final),
        )
    )
    if kind == "backward":
        inputs = (*TOKENS[:-1], "BKHDE", "BNHE", "BHDE")
        outputs = ("BNHD", "BMGD", "BMGE", "BNH", decay, scale, initial)
        return partition.batched_and_partitioned(functools.partial(_run_backward, config), inputs, outputs)
    kept = "BKHDE" if kind == "keep" else None
    run = functools.partial(_run_forward, config, kind)
    return partition.batched_and_partitioned(run, TOKENS, ("BNHE", final, kept))


def _run_forward(config: Config, kind: str, q, k, v, beta, decay, scale, initial):
    """y (B, N, H, E); the last state (B, H, D, E); the states before the blocks (B, blocks, H, D, E)."""
    plan = _plan(config, q, k, v)
    d, e = q.shape[3], v.shape[3]
    arrays = _operands(plan, q, k, v, beta, decay, scale)
    if initial is not None:
        arrays["initial"] = _padded(initial, plan.key_size, plan.value_size)
    results = call(plan, kind, arrays)
    y = _heads(plan, results["y"], plan.heads)[..., :e]
    final, kept = (None if (x := results.get(name)) is None else x[..., :d, :e] for name in ("final", "kept"))
    return y, final, kept


def _run_backward(config: Config, q, k, v, beta, decay, scale, kept, dy, dfinal):
    """Gradients of q, k, v, β, the log decay, the scale (B, H), and the initial state."""
    plan = _plan(config, q, k, v)
    d, e, groups = q.shape[3], v.shape[3], k.shape[2]
    arrays = _operands(plan, q, k, v, beta, decay, scale)
    arrays["dy"] = _lanes(dy, plan.value_size)
    arrays["kept"] = _padded(kept, plan.key_size, plan.value_size)
    if dfinal is not None:
        arrays["dfinal"] = _padded(dfinal, plan.key_size, plan.value_size)
    results = call(plan, "backward", arrays)
    dq = _heads(plan, results["dq"], plan.heads)[..., :d]
    dk, dv = (_heads(plan, results[name], plan.heads)[..., :size] for name, size in (("dk", d), ("dv", e)))
    if groups != plan.heads:
        dk, dv = (
            jnp.sum(x.reshape(*x.shape[:2], groups, -1, x.shape[3]), axis=3, dtype=jnp.float32).astype(q.dtype)
            for x in (dk, dv)
        )
    rows = results["drows"].reshape(*results["drows"].shape[:3], plan.block_heads, plan.gradient_lines, plan.chunk)
    rows = jnp.transpose(rows, (4, 0, 2, 5, 1, 3)).reshape(plan.gradient_lines, plan.batch, -1, plan.heads)
    dbeta, *others = rows[:, :, : plan.length]
    ddecay = others.pop(0) if decay is not None else None
    dscale = jnp.sum(others.pop(), axis=1) if scale is not None else None
    dinitial = results["dinitial"][..., :d, :e] if config.initial else None
    return dq, dk, dv, dbeta, ddecay, dscale, dinitial


# ---- layouts


def _plan(config: Config, q, k, v) -> Plan | None:
    return plan_for(config, *q.shape[:3], k.shape[2], q.shape[3], v.shape[3], q.dtype)


def _operands(plan: Plan, q, k, v, beta, decay, scale) -> dict[str, jax.Array]:
    """Operands of a kernel: q, k, v in place if their sizes are whole, β and the log decay a chunk a row."""
    if plan.repeats == 1:
        k, v = per_head(k, plan.heads), per_head(v, plan.heads)
    arrays = {"q": _lanes(q, plan.key_size), "k": _lanes(k, plan.key_size), "v": _lanes(v, plan.value_size)}
    rows = beta[..., None] if decay is None else jnp.stack([beta, decay], axis=-1)
    chunks = plan.blocks * plan.chunks
    rows = jnp.pad(rows, ((0, 0), (0, chunks * plan.chunk - plan.length), (0, 0), (0, 0)))
    rows = rows.reshape(plan.batch, chunks, plan.chunk, plan.heads // plan.block_heads, -1)
    arrays["rows"] = jnp.transpose(rows, (0, 3, 1, 4, 2))
    if scale is not None:
        arrays["scale"] = scale.reshape(1)
    return arrays


def _lanes(x: jax.Array, size: int) -> jax.Array:
    """(B, N, H, D) as (B, N, H·size): a view where D is that size, else filled up with zeros."""
    x = _padded(x, x.shape[2], size)
    return x.reshape(*x.shape[:2], -1)


def _heads(plan: Plan, x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(plan.batch, plan.length, heads, -1)


def _padded(x: jax.Array, rows: int, lanes: int) -> jax.Array:
    """Zeros behind the last two axes, up to these sizes."""
    fill = rows - x.shape[-2], lanes - x.shape[-1]
    return x if fill == (0, 0) else jnp.pad(x, (*((0, 0),) * (x.ndim - 2), (0, fill[0]), (0, fill[1])))
