"""Bodies of the TPU kernels of linear attention, and the call that runs one.

A body gets a `Plan` and `Refs`: the blocks that a grid point holds, by the names in `tpu_plan.KINDS`.

Causal, per group of heads and chunk, with S the state before the chunk (kept transposed, float32), r the factor of a
row of y (the scale, or the reciprocal of its denominator) and P the decays between tokens:

    y  = r ((q kᵀ ∘ P) v + (exp(G) q) S)
    S' = exp(G_end) S + (exp(G_end - G) k)ᵀ v

Backward, with dS' at hand, from the last chunk to the first. States of a block's chunks are first rebuilt on chip from
the one kept before the block.

    A  = q kᵀ ∘ P         dA = r (dy vᵀ)                    dQ = dA ∘ P
    dq = dQ k  + exp(G) r (dy Sᵀ)                           dk = dQᵀ q + exp(G_end - G) (v dS'ᵀ)
    dv = (r A)ᵀ dy + (exp(G_end - G) k) dS'                 dS = exp(G_end) dS' + (r exp(G) q)ᵀ dy

A denominator is one more column of v, of ones, whose cotangent is dden = -r² (n·dy) per row, where y = r n. It needs
neither y nor a second pass: n·dy = Σ_j A_ij (dy_i·v_j) + (exp(G_i) q_i)·(dy_i Sᵀ), sums that are at hand. Its column of
the state, Σk, is one more row of the transposed state.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.tpu_decay import ChannelDecay, Decay, HeadDecay, NoDecay, Tile, TokenDecay
from pallas_kernels.linear_attention.tpu_parts import (
    WIDE,
    Refs,
    fold,
    product,
    reciprocals,
    run_plan,
    spread,
    stack,
    sums,
)
from pallas_kernels.linear_attention.tpu_plan import Plan

OPTIONAL = ("decay", "scale", "initial", "final", "kept", "dfinal", "ddecay", "sums", "dinitial")


def call(plan: Plan, kind: str, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Runs a kernel; see `run_plan`."""
    return run_plan("linear_attention", BODIES[kind], OPTIONAL, plan, kind, arrays)


class _Group(NamedTuple):
    """A group of heads in a block: its tile, the lanes of its queries and keys, values and outputs.

    `q`, `y`: lanes of queries and of outputs; `k`, `v`: lanes of the keys and values that they read.
    """

    first: int
    tile: Tile
    q: slice
    y: slice
    k: slice
    v: slice


def _groups(plan: Plan) -> list[_Group]:
    groups, d, e = [], plan.key_size, plan.value_size
    for first, pack in plan.groups:
        shared = first // plan.repeats  # heads that share keys are alone in their groups
        lanes = [slice(start * size, (start + pack) * size) for start, size in ((first, d), (first, e))]
        lanes += [slice(start * size, (start + pack) * size) for start, size in ((shared, d), (shared, e))]
        groups.append(_Group(first, Tile(pack, d, plan.chunk, plan.dtype), *lanes))
    return groups


# ---- causal


def _forward(plan: Plan, refs: Refs) -> None:
    n, groups = pl.program_id(2), _groups(plan)

    @pl.when(n == 0)
    def _():
        refs.state[...] = jnp.zeros_like(refs.state) if refs.initial is None else refs.initial[...]

    if refs.kept is not None:
        refs.kept[...] = refs.state[...].astype(plan.dtype)
    constant = _constant_decays(plan, refs, groups)

    def chunk(t, _):
        rows = _rows(plan, t)
        valid = _valid(plan, n, t)
        for group, decay in zip(groups, constant, strict=True):
            decay = decay or _decay(plan, refs, group, t, valid)
            q, k, v = (_load(refs, name, rows, group, valid) for name in "qkv")
            state = refs.state[:, group.q]
            y, state = _chunk_forward(plan, group.tile, decay, q, k, v, state, _scale(refs))
            refs.state[:, group.q] = state
            refs.y[rows, group.y] = y.astype(refs.y.dtype)

    lax.fori_loop(0, plan.chunks, chunk, None)
    if refs.final is not None:

        @pl.when(n == plan.blocks - 1)
        def _():
            refs.final[...] = refs.state[...]


def _chunk_forward(plan: Plan, tile: Tile, decay: Decay, q, k, v, state, scale):
    """Outputs (c, p·E) and the state after the chunk, float32."""
    p, d, e = tile.pack, plan.key_size, plan.value_size
    s, z = _split(plan, state)
    scores = decay.scores(q, k)
    q_start = q * decay.since_start
    y = product(plan.dtype, scores, stack(v, p, e), "nn")
    y += product(plan.dtype, q_start, stack(s.astype(plan.dtype), p, d), "nt")
    if plan.config.normalize:
        inside, before = sums(scores, p, plan.chunk), sums(q_start * z, p, d)
        y *= spread(reciprocals([a + b for a, b in zip(inside, before, strict=True)], scale), e)
    elif scale is not None:
        y *= scale
    return y, _next_state(plan, tile, decay, k, v, state)


def _next_state(plan: Plan, tile: Tile, decay: Decay, k, v, state):
    k_end = k * decay.until_end
    added = fold(product(plan.dtype, v, k_end, "tn"), tile.pack, plan.key_size)
    return state * decay.whole + _joined(plan, added, k_end)


def _backward(plan: Plan, refs: Refs) -> None:
    n, groups = plan.blocks - 1 - pl.program_id(2), _groups(plan)

    @pl.when(n == plan.blocks - 1)
    def _():
        refs.dstate[...] = jnp.zeros_like(refs.dstate) if refs.dfinal is None else refs.dfinal[...]
        if refs.sums is not None:
            refs.sums[...] = jnp.zeros_like(refs.sums)

    constant = _constant_decays(plan, refs, groups)
    refs.state[...] = refs.kept[...].astype(WIDE)
    refs.states[0] = refs.kept[...]

    def rebuild(t, _):
        rows, valid = _rows(plan, t), _valid(plan, n, t)
        for group, decay in zip(groups, constant, strict=True):
            decay = decay or _decay(plan, refs, group, t, valid)
            k, v = (_load(refs, name, rows, group, valid) for name in "kv")
            state = _next_state(plan, group.tile, decay, k, v, refs.state[:, group.q])
            refs.state[:, group.q] = state
            refs.states[t + 1, :, group.q] = state.astype(plan.dtype)

    def reverse(step, _):
        t = plan.chunks - 1 - step
        rows, valid = _rows(plan, t), _valid(plan, n, t)
        shared = {}
        for group, decay in zip(groups, constant, strict=True):
            decay = decay or _decay(plan, refs, group, t, valid)
            q, k, v, dy = (_load(refs, name, rows, group, valid) for name in ("q", "k", "v", "dy"))
            before, after = refs.states[t, :, group.q], refs.dstate[:, group.q]
            dq, dk, dv, dstate, ddecay, dscale = _chunk_backward(
                plan, group.tile, decay, q, k, v, dy, before, after, _scale(refs)
            )
            refs.dq[rows, group.q] = dq.astype(refs.dq.dtype)
            refs.dstate[:, group.q] = dstate
            first = group.first % plan.repeats == 0
            shared = {"dk": dk, "dv": dv} if first else {"dk": shared["dk"] + dk, "dv": shared["dv"] + dv}
            if group.first % plan.repeats == plan.repeats - 1 or plan.repeats == 1:
                refs.dk[rows, group.k] = shared["dk"].astype(refs.dk.dtype)
                refs.dv[rows, group.v] = shared["dv"].astype(refs.dv.dtype)
            match plan.config.decay if plan.config.decay_gradient else None:
                case "channel":
                    refs.ddecay[rows, group.q] = ddecay
                case "token":
                    for a, row in enumerate(ddecay):
                        refs.ddecay[t, pl.ds(group.first + a, 1), :] = row
                case "head":
                    refs.sums[0:1, group.q] += ddecay
            if dscale is not None:
                refs.sums[1:2, group.q] += dscale

    lax.fori_loop(0, plan.chunks - 1, rebuild, None)
    lax.fori_loop(0, plan.chunks, reverse, None)
    if refs.dinitial is not None:

        @pl.when(n == 0)
        def _():
            refs.dinitial[...] = refs.dstate[...]


def _chunk_backward(plan: Plan, tile: Tile, decay: Decay, q, k, v, dy, state, dstate, scale):
    """Gradients of q, k, v (c, ·), of the state before the chunk, of the decay, and of the scale (1, p·D).

    The last two are None where they are not asked for.
    """
    dtype, p, d, e, c = plan.dtype, tile.pack, plan.key_size, plan.value_size, plan.chunk
    (s, z), (ds, dz) = _split(plan, state), _split(plan, dstate)
    scores = decay.scores(q, k)
    q_start, k_end = q * decay.since_start, k * decay.until_end
    dscores = product(dtype, dy, stack(v, p, e), "nt")
    dq_start = product(dtype, dy, stack(s, p, d), "nn")
    dscale, q_read, dz_read = None, q_start, None
    if plan.config.normalize:
        z = z.astype(WIDE)
        pairs = zip(sums(scores, p, c), sums(q_start * z, p, d), strict=True)
        r = reciprocals([a + b for a, b in pairs], scale)
        reads = zip(sums(scores * dscores, p, c), sums(q_start * dq_start, p, d), r, strict=True)
        dden = [-(a + b) * x * x for a, b, x in reads]
        dscores = dscores * spread(r, c) + spread(dden, c)
        dq_start = dq_start * spread(r, d) + spread(dden, d) * z
        dz_read = jnp.sum(q_start * spread(dden, d), axis=0, keepdims=True)
        q_read, read = q_start * spread(r, d), scores * spread(r, c)
    elif scale is not None:
        if plan.config.scale_gradient:
            inside = sums(jnp.sum(scores * dscores, axis=0, keepdims=True), p, c)
            dscale = tile.first_lanes(inside) + jnp.sum(q_start * dq_start, axis=0, keepdims=True)
        dscores, dq_start = dscores * scale, dq_start * scale
        q_read, read = q_start * scale, scores * scale
    else:
        read = scores
    dq, dk, earned = decay.scores_backward(q, k, scores, dscores)
    wide_ds = stack(ds.astype(dtype), p, d)
    dk_end = product(dtype, v, wide_ds, "nn")
    dk_end = dk_end if dz is None else dk_end + dz
    dv = fold(product(dtype, read, dy, "tn"), p, e) + product(dtype, k_end, wide_ds, "nt")
    ddecay = None
    if plan.config.decay is not None and plan.config.decay_gradient:
        whole = decay.whole * jnp.sum(state.astype(WIDE) * dstate, axis=0, keepdims=True)
        ddecay = decay.gradient(earned, q_start * dq_start, k_end * dk_end, whole)
    added = fold(product(dtype, dy, q_read, "tn"), p, d)
    dstate = dstate * decay.whole + _joined(plan, added, dz_read)
    return dq + dq_start * decay.since_start, dk + dk_end * decay.until_end, dv, dstate, ddecay, dscale


# ---- not causal


def _outer(plan: Plan, refs: Refs) -> None:
    """S = Σ k vᵀ over all tokens."""

    def add(group, valid):
        k, v = (_load(refs, name, slice(None), group, valid) for name in "kv")
        return _joined(plan, fold(product(plan.dtype, v, k, "tn"), group.tile.pack, plan.key_size), k.astype(WIDE))

    _accumulate(plan, refs.state, refs.total, add)


def _outer_backward(plan: Plan, refs: Refs) -> None:
    valid = _valid(plan, pl.program_id(2), None)
    for group in _groups(plan):
        k, v = (_load(refs, name, slice(None), group, valid) for name in "kv")
        ds, dz = _split(plan, refs.dtotal[:, group.q])
        wide = stack(ds.astype(plan.dtype), group.tile.pack, plan.key_size)
        dk = product(plan.dtype, v, wide, "nn")
        refs.dk[:, group.q] = (dk if dz is None else dk + dz).astype(refs.dk.dtype)
        refs.dv[:, group.y] = product(plan.dtype, k, wide, "nt").astype(refs.dv.dtype)


def _read(plan: Plan, refs: Refs) -> None:
    """y = r q S."""
    scale, valid = _scale(refs), _valid(plan, pl.program_id(2), None)
    for group in _groups(plan):
        p, q = group.tile.pack, _load(refs, "q", slice(None), group, valid)
        s, z = _split(plan, refs.total[:, group.q])
        y = product(plan.dtype, q, stack(s.astype(plan.dtype), p, plan.key_size), "nt")
        if plan.config.normalize:
            y *= spread(reciprocals(sums(q * z, p, plan.key_size), scale), plan.value_size)
        elif scale is not None:
            y *= scale
        refs.y[:, group.y] = y.astype(refs.y.dtype)


def _read_backward(plan: Plan, refs: Refs) -> None:
    """Gradients of q, and of S summed over all tokens, in one pass."""
    scale, d = _scale(refs), plan.key_size
    if refs.sums is not None:

        @pl.when(pl.program_id(2) == 0)
        def _():
            refs.sums[...] = jnp.zeros_like(refs.sums)

    def add(group, valid):
        p = group.tile.pack
        q, dy = (_load(refs, name, slice(None), group, valid) for name in ("q", "dy"))
        s, z = _split(plan, refs.total[:, group.q])
        dq, dz = product(plan.dtype, dy, stack(s.astype(plan.dtype), p, d), "nn"), None
        if plan.config.normalize:
            r = reciprocals(sums(q * z, p, d), scale)
            dden = [-a * x * x for a, x in zip(sums(q * dq, p, d), r, strict=True)]
            dz = q * spread(dden, d)
            dq, q = dq * spread(r, d) + spread(dden, d) * z, q * spread(r, d)
        elif scale is not None:
            if refs.sums is not None:
                refs.sums[1:2, group.q] += jnp.sum(q * dq, axis=0, keepdims=True)
            dq, q = dq * scale, q * scale
        refs.dq[:, group.q] = dq.astype(refs.dq.dtype)
        return _joined(plan, fold(product(plan.dtype, dy, q, "tn"), p, d), dz)

    _accumulate(plan, refs.state, refs.dtotal, add)


def _accumulate(plan: Plan, state, result, add: Callable[[_Group, jax.Array | None], jax.Array]) -> None:
    """Sums what `add` gives for each group over all blocks of tokens, and writes it behind the last one."""
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        state[...] = jnp.zeros_like(state)

    valid = _valid(plan, n, None)
    for group in _groups(plan):
        state[:, group.q] += add(group, valid)

    @pl.when(n == plan.blocks - 1)
    def _():
        result[...] = state[...]


BODIES = {
    "forward": _forward,
    "keep": _forward,
    "backward": _backward,
    "outer": _outer,
    "outer_backward": _outer_backward,
    "read": _read,
    "read_backward": _read_backward,
}

# ---- blocks and chunks


def _rows(plan: Plan, t: jax.Array):
    return pl.ds(pl.multiple_of(t * plan.chunk, plan.chunk), plan.chunk)


def _valid(plan: Plan, n: jax.Array, t: jax.Array | None) -> jax.Array | None:
    """How many tokens of chunk t of block n exist, or of block n where t is None; None for all."""
    if not plan.tail:
        return None
    size = plan.tokens if t is None else plan.chunk
    start = n * plan.tokens + (0 if t is None else t * plan.chunk)
    return jnp.clip(plan.length - start, 0, size)


def _load(refs: Refs, name: str, rows, group: _Group, valid: jax.Array | None) -> jax.Array:
    """Tokens of a group; those beyond N, of which memory holds anything, as zeros."""
    lanes = {"q": group.q, "k": group.k, "v": group.v, "dy": group.y, "decay": group.q}[name]
    x = getattr(refs, name)[rows, lanes]
    if valid is None:
        return x
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) < valid, x, jnp.zeros_like(x))


def _scale(refs: Refs) -> jax.Array | None:
    return None if refs.scale is None else refs.scale[0]


def _constant_decays(plan: Plan, refs: Refs, groups: Sequence[_Group]) -> list[Decay | None]:
    """Decays that are the same in every chunk, by group; None where they are not."""
    if plan.config.decay is None:
        return [NoDecay(group.tile) for group in groups]
    if plan.config.decay == "head" and not plan.tail:
        return [_decay(plan, refs, group, 0, None) for group in groups]
    return [None] * len(groups)


def _decay(plan: Plan, refs: Refs, group: _Group, t: jax.Array | int, valid: jax.Array | None) -> Decay:
    tile = group.tile
    if plan.config.decay == "channel":
        return ChannelDecay(tile, _load(refs, "decay", _rows(plan, t), group, valid))
    if plan.config.decay == "token":
        parts = range(group.first, plan.decay_rows, plan.block_heads)
        totals = [[refs.decay[t, pl.ds(part + a, 1), :] for a in range(tile.pack)] for part in parts]
        return TokenDecay(tile, totals)
    first = pl.program_id(1) * plan.block_heads + group.first
    decays = [refs.decay[first + a] for a in range(tile.pack)]
    return HeadDecay(tile, decays, plan.chunk if valid is None else valid)


# ---- states: (E, p·D), with a denominator 16 rows more, of which the first is Σk


def _split(plan: Plan, state: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Σ v kᵀ and Σk."""
    if not plan.config.normalize:
        return state, None
    return state[: plan.value_size], state[plan.value_size : plan.value_size + 1]


def _joined(plan: Plan, added: jax.Array, keys: jax.Array | None) -> jax.Array:
    """A state of Σ v kᵀ and of keys (r, p·D), summed over their rows."""
    if not plan.config.normalize:
        return added
    total = jnp.sum(keys, axis=0, keepdims=True)
    row = lax.broadcasted_iota(jnp.int32, (plan.state_rows - plan.value_size, total.shape[1]), 0)
    return jnp.concatenate([added, jnp.where(row == 0, total, 0)], axis=0)
