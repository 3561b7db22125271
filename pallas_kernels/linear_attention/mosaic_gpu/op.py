"""Linear attention as a Pallas Mosaic GPU kernel for Hopper (sm_90a): causal, forward and backward.

One kernel does all of it, `sweep.sweep`; README.md derives the chunks, its docstring the tiles.

**Forward.** One sweep over the tokens, one launch with constant decay: y = sweep(q, k, v). A decay per token is first
cumulated inside chunks by XLA, in a (B, H, N) array.

**Backward.** One launch: dq is the same sweep over (dy, v, k), dk and dv are sweeps in reverse over (v, dy, q) and
(k, q, dy). Up to D = E = 128 the last two are one sweep, which reads q, k, v and dy once: of the two warpgroups of a
CTA one computes dk, the other dv. The tiles of larger heads leave no room for that, and with D ≠ E the two need
different numbers of CTAs; there CTAs of dk and of dv stand side by side and read the same chunks at the same time, so
that the second-level cache answers the second of them. Each sweep builds the states that it needs from the inputs;
nothing else is kept from the forward pass.

**Gradient of a decay per token.** With dL_ij the gradient of the log of the weight between tokens i and j,

    dg_t = Σ_{i≥t>j} dL_ij + Σ_{i≥t} a_i + Σ_{j<t} b_j + X        i, j in the chunk of t

where a_i belongs to the pairs of i and the tokens before the chunk, b_j to those of j and the tokens behind it, and
X = exp(G_end) ⟨S, dS'⟩ to the pairs on either side. The sweeps of dq and dk write row and column sums of dL over other
tokens, in float32: their difference is the first term exactly, and every number carries its decay. X needs the states
of both sweeps, which no CTA has at one time. The sweeps write them, in bf16, at every fourth border between chunks (at
D = E = 256 at every eighth: `chunks_between_kept`), where Y = ⟨S, dS⟩ is then known; in between Y' = Y - Σa + Σb leads
from border to border, from either side, and X is the mean of the two, weighted by distance. Where a chunk forgets
(exp(G_end) < 4e-4) X is 0. Only a call that differentiates the decay pays for any of this.

Y does not carry the decay of the chunk, and its rounding would show in the sum over all tokens that is the gradient of
a decay per head: that is refused, by `supports` where the call itself is differentiated, else by the derivative.

**Few heads.** If the tiles of all heads leave half of the multiprocessors idle, the sequence is cut into splits, which
join the batch: a light sweep gives each split's own state, a scan over splits in XLA the states before them, and the
main sweep starts from these. This is exact; k and v are read twice. It needs splits of whole chunks, and is done where
the sequence is long enough to gain by it (`gpu_splits`).

Arrays whose N is no multiple of 8 are padded to one, a copy of q, k, v and dy; every other N is read in place.
Grouped heads are read by index; dk and dv are written per query head in the dtype of the inputs and summed in float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, gpus, partition, symbolic_zeros
from pallas_kernels.linear_attention.gpu_splits import pays
from pallas_kernels.linear_attention.mosaic_gpu.calls import PROCESSORS, Common, Config
from pallas_kernels.linear_attention.mosaic_gpu.decay import FLOOR, LOG2_E
from pallas_kernels.linear_attention.mosaic_gpu.plan import (
    DV,
    FORWARD,
    SIZES,
    Plan,
    backward,
    chunks_between_kept,
    with_blocks,
)
from pallas_kernels.linear_attention.mosaic_gpu.tiles import TILE
from pallas_kernels.recurrence import Arguments, State, decay_of_segments

# Dtypes that the tensor cores take and this implementation does not, with the reason.
OTHER_DTYPES = {
    "float32": "of float32 the tensor cores read TF32, an error above 1e-6",
    "float16": "scores are operands too, and overflow above 65504",
}
CAPABILITY = 90  # of the GPUs that it is for, times ten
DECAY_PER_HEAD = (
    "it has no gradient of log_decay of shape (H,): what it adds up is rounded to bfloat16, "
    "which shows in the sum over all tokens"
)
FORGOTTEN = -8.0  # log decay of a chunk below which its two sides do not know each other
MAX_SPLITS = 64


def supports(args: Arguments) -> str | None:
    """Why this implementation cannot take `args`; None when it can."""
    kind = dispatch.current_device_kind()
    gpu = gpus.find(kind)
    if gpu is None or gpu.capability != CAPABILITY:
        names = ", ".join(name for name, gpu in gpus.KNOWN.items() if gpu.capability == CAPABILITY)
        return f"it needs a GPU of compute capability 9.0 ({names}): others have no wgmma; got {kind}"
    dtype = args.q.dtype.name
    if dtype != "bfloat16":
        reason = f": {OTHER_DTYPES[dtype]}" if dtype in OTHER_DTYPES else ""
        return f"it takes bfloat16, got {dtype}{reason}"
    if not args.causal:
        return "it takes causal=True alone: without an order there are no chunks, and two plain products do"
    if args.normalize:
        return "it takes normalize=False alone: the sums of weights would need registers that the state fills"
    if args.log_decay is not None and args.log_decay.ndim == 4:
        return "it takes log_decay of shape (H,) or (B, N, H); decay per channel leaves no single product of a chunk"
    for name, size in (("D", args.q.shape[3]), ("E", args.v.shape[3])):
        if size not in SIZES:
            return f"it takes head sizes {', '.join(map(str, SIZES))}, got {name}={size}"
    if args.chunk_size not in (None, TILE):
        return f"chunk_size must be None or {TILE}, got {args.chunk_size}"
    if _per_head(args) and symbolic_zeros.differentiated(args.log_decay):
        return DECAY_PER_HEAD
    return partition.refusal()


def run(
    args: Arguments,
    *,
    interpret: Any = None,
    splits: int | None = None,
    processors: int | None = None,
) -> tuple[jax.Array, State | None]:
    """y (B, N, H, E) and, if asked for, the state.

    Args:
      args: what `supports` takes.
      interpret: parameters of Pallas' GPU interpreter, to run on a CPU.
      splits: parts of the sequence; None to fill the GPU.
      processors: multiprocessors of the GPU; None for those of this machine, or of most GPUs of the generation.

    Raises:
      ValueError: for splits that do not cut N into whole chunks.
      UnsupportedError: when the result is differentiated in a decay of shape (H,), at that time.
    """
    decay = args.log_decay if args.query_ids is None else decay_of_segments(args, args.query_ids)
    if processors is None:
        gpu = gpus.find(dispatch.current_device_kind())
        processors = PROCESSORS if gpu is None else gpu.processors
    length = args.q.shape[1]
    if splits is None:
        splits = split_count(processors, *args.q.shape, args.v.shape[3])
    if splits > 1 and length % (TILE * splits):
        raise ValueError(f"splits must cut N into whole chunks of {TILE} tokens, got {splits=} and N={length}")
    config = Config(return_state=args.return_state, splits=splits, processors=processors, interpret=interpret)
    return _attend(config, *partition.same_manual_axes((args.q, args.k, args.v, decay, args.scale, args.initial_state)))


def split_count(processors: int, batch: int, length: int, heads: int, key_size: int, value_size: int) -> int:
    """Splits of the sequence: 1 while the CTAs fill half of the multiprocessors, else enough to fill all if that pays.

    Splits are equal and whole chunks, at least eight of them each, so the count divides the chunks of the sequence.
    """
    ctas = batch * heads * with_blocks(Plan((FORWARD,), key_size, value_size)).groups
    if 2 * ctas > processors or length % TILE:
        return 1
    chunks = length // TILE
    fitting = [s for s in range(1, min(MAX_SPLITS, processors // ctas, chunks // 8) + 1) if chunks % s == 0]
    most = max(fitting, default=1)
    return most if pays(chunks, most) else 1


def _per_head(args: Arguments) -> bool:
    """Whether the sweeps read a decay of shape (H,); segments make it one per token."""
    return args.log_decay is not None and args.log_decay.ndim == 1 and args.query_ids is None


# ---- the op and its derivative


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(config: Config, q, k, v, decay, scale, state):
    """y, and the last state or None."""
    return _partitioned_forward(config, q, k, v, decay, scale, state)[:2]


def _attend_forward(config: Config, *arrays):
    marks, arrays = symbolic_zeros.primals(arrays, decay=3, scale=4)
    if "decay" in marks and arrays[3].ndim == 1:
        refusal = f"implementation='mosaic_gpu' refuses: {DECAY_PER_HEAD}"
        raise dispatch.UnsupportedError(f"linear_attention: {refusal}; name another one")
    y, last, starts = _partitioned_forward(config, *arrays)
    return (y, last), (marks, *arrays, starts)


def _attend_backward(config: Config, residuals, cotangents):
    marks, *arrays = residuals
    q, v = arrays[0], arrays[2]
    dy, dlast = map(symbolic_zeros.cotangent, cotangents)
    dy = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype) if dy is None else dy
    config = dataclasses.replace(config, decay_gradient="decay" in marks, scale_gradient="scale" in marks)
    *gradients, ddecay, dscale, dstate = _partitioned_backward(config, *arrays, dy, dlast)
    return *gradients, ddecay, None if dscale is None else jnp.sum(dscale), dstate


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _axes(decay: jax.Array | None) -> tuple[str, ...]:
    """Axes of q, k, v, decay, scale and state, as `partition.batched_and_partitioned` wants them."""
    return "BNHD", "BNGD", "BNGE", "H" if decay is None or decay.ndim == 1 else "BNH", "", "BHDE"


def _starts(config: Config) -> str | None:
    """Axes of the states before splits."""
    return "BSHDE" if config.splits > 1 else None


def _partitioned_forward(config: Config, *arrays) -> tuple[jax.Array | None, ...]:
    outputs = "BNHE", "BHDE" if config.return_state else None, _starts(config)
    return _partitioned(_forward, config, _axes(arrays[3]), outputs)(*arrays)


def _partitioned_backward(config: Config, *arrays) -> tuple[jax.Array | None, ...]:
    decay, state = arrays[3], arrays[5]
    outputs = (
        *_axes(decay)[:3],
        "BNH" if config.decay_gradient else None,
        "BH" if config.scale_gradient else None,
        None if state is None else "BHDE",
    )
    return _partitioned(_backward, config, (*_axes(decay), _starts(config) or "", "BNHE", "BHDE"), outputs)(*arrays)


def _partitioned(fn, config: Config, inputs, outputs) -> Callable[..., tuple[jax.Array | None, ...]]:
    fn = functools.partial(fn, config)
    # The interpreter's callbacks are effects, which a partitioned call may not have.
    return fn if config.interpret is not None else partition.batched_and_partitioned(fn, inputs, outputs)


def _forward(config: Config, q, k, v, decay, scale, state) -> tuple[jax.Array | None, ...]:
    """The forward pass on arrays; None for what is absent.

    Args:
      config: what is static.
      q: BNHD. k: BNGD. v: BNGE.
      decay: log decay, H or BNH, float32. scale: scalar, float32.
      state: initial state, BHDE, float32.

    Returns:
      y BNHE in the dtype of q; last state BHDE with `return_state`; and the states before splits, BSHDE, float32.
    """
    common = Common(config, q.shape[2], decay, scale, q.shape[1])
    arrays = {"q": q, "k": k, "v": v}
    sizes, starts = (q.shape[3], v.shape[3]), None
    if config.splits > 1:
        own = common.launch(arrays, {}, Plan((FORWARD,), *sizes, outputs=False, final=True))["final y"]
        starts = common.states_before(own, state)
        state = starts
    outputs = common.launch(arrays, {"y": state}, Plan((FORWARD,), *sizes, final=config.return_state))
    last = outputs["final y"] if config.return_state else None
    if config.splits > 1 and last is not None:
        last = last[:, -1]
    return outputs["y"], last, starts


def _backward(config: Config, q, k, v, decay, scale, state, starts, dy, dlast) -> tuple[jax.Array | None, ...]:
    """The backward pass on arrays; None for what is absent.

    Args:
      config: what is static.
      q: BNHD. k: BNGD. v: BNGE.
      decay: H or BNH. scale: scalar. state: BHDE.
      starts: states before splits, BSHDE.
      dy: BNHE. dlast: BHDE.

    Returns:
      Gradients of q BNHD, k BNGD, v BNGE; of the decay BNH; of the scale BH, to be summed over both; of the initial
      state BHDE.
    """
    common = Common(config, q.shape[2], decay, scale, q.shape[1])
    arrays = {"q": q, "k": k, "v": v, "dy": dy}
    sizes, given, ends = (q.shape[3], v.shape[3]), state, dlast
    if config.splits > 1:
        own = common.launch(arrays, {}, Plan((DV,), *sizes, reverse=True, outputs=False, final=True))["final dv"]
        given, ends = starts, common.states_before(own, dlast, reverse=True)
    start = state is not None or (config.decay_gradient and given is not None)
    plans = backward(*sizes, decay=config.decay_gradient, scale=config.scale_gradient, start=start)
    found = common.launch(arrays, {"dq": _swap(given), "dk": _swap(ends), "dv": ends}, *plans)
    dk, dv = (_per_key_head(found[name], k.shape[2]) for name in ("dk", "dv"))
    starting = _swap(found["final dk"]) if start else None
    dstate = starting
    if config.splits > 1 and starting is not None:
        dstate = starting[:, 0]
    ddecay = dscale = None
    if config.scale_gradient:
        dscale = jnp.sum(common.of_batch(found["sums dq"]), axis=(2, 3, 4)) + _own_scores(q, k, v, dy)
    if config.decay_gradient:
        ddecay = _decay_gradient(common, found, starting if given is not None else None, given, ends)
    return found["dq"], dk, dv, ddecay, dscale, dstate if state is not None else None


# ---- the gradient of the decay


def _decay_gradient(common: Common, found: dict[str, jax.Array], start, given, ends) -> jax.Array:
    """Gradient of the log decays, (B, N, H); see the top of the file.

    Args:
      common: what the sweeps share.
      found: what they wrote.
      start: gradient of the state before the first chunk, (B, H, D, E) or with S after B; None if that state is 0.
      given: that state, likewise.
      ends: cotangents behind the last chunk, likewise; None for 0.
    """
    scale = 1 if common.scale is None else common.scale  # which reversed sweeps have in their states
    (a, row_sums), (b, column_sums) = _parts(common, found["sums dq"] * scale), _parts(common, found["sums dk"])
    # Row sums less column sums from t on: the pairs i ≥ t > j of the chunk, as all others cancel.
    behind = jnp.flip(jnp.cumsum(jnp.flip(row_sums + a - column_sums, 3), axis=3), 3)
    # b of a token itself, which need not carry its decay, is left out before the sum, not subtracted after it.
    ahead = jnp.cumsum(jnp.pad(b[..., :-1], ((0, 0), (0, 0), (0, 0), (1, 0))), axis=3)
    first = None if given is None else _inner(given, start)
    kept, kept_cotangents = (found[name].reshape(-1, *found[name].shape[-4:]) for name in ("kept dq", "kept dk"))
    gradient = behind + ahead + _crossing(common, a, b, kept, kept_cotangents, first, _swap(ends))[..., None]
    gradient = gradient.reshape(*gradient.shape[:2], -1)[:, :, : common.length // common.config.splits]
    return jnp.where(common.decay < FLOOR, 0, jnp.swapaxes(gradient, 1, 2).reshape(common.decay.shape))


def _parts(common: Common, sums: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums over tokens outside of the chunk and inside, (B·S, H, T, 64) each."""
    sums = jnp.sum(sums, axis=3)
    return tuple(sums[:, :, part].reshape(*sums.shape[:2], -1, TILE) for part in range(2))


def _crossing(common: Common, a, b, kept, kept_cotangents, first, ends) -> jax.Array:
    """X of each chunk, (B·S, H, T), from Y at every K-th border and the sums between.

    Args:
      common: what the sweeps share.
      a: of each token, (B·S, H, T, 64).
      b: likewise.
      kept: states before chunks 0, K, 2K, ... and before the last one, (B·S, H, borders + 1, E, D).
      kept_cotangents: likewise; the first and the last place have no meaning.
      first: Y at the first border, (B, H) or with S, None for 0.
      ends: cotangents behind the last chunk, (B, H, E, D) or with S; None for 0.
    """
    batch, heads, chunks = a.shape[:3]
    keep = chunks_between_kept(*kept.shape[-2:])
    blocks, missing = -(-chunks // keep), -chunks % keep
    nothing = jnp.zeros((batch, heads, 1))
    first = nothing if first is None else first.reshape(batch, heads, 1)
    borders = jnp.concatenate([first, _inner(kept, kept_cotangents)[:, :, 1:-1], nothing], axis=2)

    def in_blocks(x):
        return jnp.pad(x, ((0, 0), (0, 0), (0, missing))).reshape(batch, heads, blocks, keep)

    loss, gain = in_blocks(jnp.sum(a, axis=3)), in_blocks(jnp.sum(b, axis=3))
    # X is known where the chunk forgets, and of the last chunk: Y behind it may be large and carry no decay.
    weights = common.cumulated.reshape(batch, heads, chunks, TILE)[..., -1] / LOG2_E
    last = nothing
    if ends is not None:
        last = _inner(kept[:, :, -1:], ends.reshape(-1, *ends.shape[-3:])[:, :, None]) * jnp.exp(weights[..., -1:])
    known = in_blocks((weights < FORGOTTEN).at[..., -1].set(True))
    value = in_blocks(jnp.zeros_like(weights).at[..., -1:].set(last))
    ahead, back = [], []  # from the border in front, and from the border behind
    before, after = borders[..., :-1], borders[..., 1:]
    for c in range(keep):
        ahead.append(jnp.where(known[..., c], value[..., c], before - loss[..., c]))
        before = ahead[-1] + gain[..., c]
    for c in reversed(range(keep)):
        back.insert(0, jnp.where(known[..., c], value[..., c], after - gain[..., c]))
        after = back[0] + loss[..., c]
    # Errors add up chunk by chunk: the mean weighs them by the inverse of their variance.
    weight = (2 * jnp.arange(keep) + 1) / (2 * keep)
    crossing = jnp.stack(back, axis=-1) * weight + jnp.stack(ahead, axis=-1) * (1 - weight)
    return crossing.reshape(batch, heads, -1)[:, :, :chunks]


def _own_scores(q, k, v, dy) -> jax.Array:
    """Σ_i (q_i·k_i)(dy_i·v_i), (B, H): the share of each token's own key in the gradient of the scale."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = (jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=3) for a, b in ((q, k), (dy, v)))
    return jnp.sum(math.prod(scores), axis=1)


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """Inner products over the last two axes, float32."""
    return jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=(-1, -2))


def _per_key_head(x: jax.Array, groups: int) -> jax.Array:
    """(B, N, H, D) summed over the query heads of each key head, in float32."""
    if x.shape[2] == groups:
        return x
    x = x.reshape(*x.shape[:2], groups, -1, x.shape[3])
    return jnp.sum(x.astype(jnp.float32), axis=3).astype(x.dtype)


def _swap(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else jnp.swapaxes(x, -1, -2)
