"""Bodies of the TPU kernels of linear attention, and the call that runs one.

A body gets a `Plan` and `Refs`: the blocks that a grid point holds, by the names in `plan.KINDS`. What computes a
chunk is a generator: it pauses where products of other heads may come between, see `run_groups`.

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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.tpu.decay import ChannelDecay, Decay, HeadDecay, NoDecay, Tables, Tile, TokenDecay
from pallas_kernels.linear_attention.tpu.plan import Plan
from pallas_kernels.recurrence import EPSILON
from pallas_kernels.tpu.calls import WIDE, Refs, Steps, product, run_groups, run_plan
from pallas_kernels.tpu.lanes import fold, spread, stack, sums

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
    _fill_tables(plan, refs, groups)

    def chunk(t, _):
        rows, valid = _rows(plan, t), _valid(plan, n, t)

        def heads(group):
            decay = _decay(plan, refs, group, t, valid)
            q, k, v = (_load(refs, name, rows, group, valid) for name in "qkv")
            y, state = yield from _chunk_forward(plan, group, decay, q, k, v, refs.state[:, group.q], _scale(refs))
            refs.state[:, group.q] = state
            refs.y[rows, group.y] = y.astype(refs.y.dtype)

        run_groups(map(heads, groups), in_turns=plan.in_turns)

    lax.fori_loop(0, plan.chunks, chunk, None, unroll=plan.unroll)
    if refs.final is not None:

        @pl.when(n == plan.blocks - 1)
        def _():
            refs.final[...] = refs.state[...]


def _chunk_forward(plan: Plan, group: _Group, decay: Decay, q, k, v, state, scale) -> Steps:
    """Outputs (c, p·E) and the state after the chunk, float32."""
    p, d, e = group.tile.pack, plan.key_size, plan.value_size
    scores = decay.scores(q, k)
    yield
    s, z = _split(plan, state)
    q_start = q * decay.since_start
    before = product(plan.dtype, q_start, stack(s.astype(plan.dtype), p, d), "nt")
    after = _next_state(plan, group.tile, decay, k, v, state)
    yield
    y = product(plan.dtype, scores, stack(v, p, e), "nn") + before
    if plan.config.normalize:
        inside, earlier = sums(scores, p, plan.chunk), sums(q_start * z, p, d)
        y *= spread(_reciprocals([a + b for a, b in zip(inside, earlier, strict=True)], scale), e)
    elif scale is not None:
        y *= scale
    return y, after


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

    _fill_tables(plan, refs, groups)
    refs.state[...] = refs.kept[...].astype(WIDE)
    refs.states[0] = refs.kept[...]

    def rebuild(t, _):
        rows, valid = _rows(plan, t), _valid(plan, n, t)
        for group in groups:
            decay = _decay(plan, refs, group, t, valid)
            k, v = (_load(refs, name, rows, group, valid) for name in "kv")
            state = _next_state(plan, group.tile, decay, k, v, refs.state[:, group.q])
            refs.state[:, group.q] = state
            refs.states[t + 1, :, group.q] = state.astype(plan.dtype)

    def reverse(step, _):
        t = plan.chunks - 1 - step
        rows, valid, shared = _rows(plan, t), _valid(plan, n, t), {}

        def heads(group):
            decay = _decay(plan, refs, group, t, valid)
            q, k, v, dy = (_load(refs, name, rows, group, valid) for name in ("q", "k", "v", "dy"))
            states = refs.states[t, :, group.q], refs.dstate[:, group.q]
            gradients = yield from _chunk_backward(plan, group, decay, q, k, v, dy, *states, _scale(refs))
            refs.dq[rows, group.q] = gradients.q.astype(refs.dq.dtype)
            refs.dstate[:, group.q] = gradients.state
            for name, lanes in (("k", group.k), ("v", group.v)):
                gradient = getattr(gradients, name)
                shared[name] = gradient if group.first % plan.repeats == 0 else shared[name] + gradient
                if group.first % plan.repeats == plan.repeats - 1 or plan.repeats == 1:
                    ref = getattr(refs, f"d{name}")
                    ref[rows, lanes] = shared[name].astype(ref.dtype)
            match plan.config.decay if plan.config.decay_gradient else None:
                case "channel":
                    refs.ddecay[rows, group.q] = gradients.decay
                case "token":
                    for a, row in enumerate(gradients.decay):
                        refs.ddecay[t, pl.ds(group.first + a, 1), :] = row
                case "head":
                    refs.sums[0:1, group.q] += gradients.decay
            if gradients.scale is not None:
                refs.sums[1:2, group.q] += gradients.scale

        run_groups(map(heads, groups), in_turns=plan.in_turns)

    lax.fori_loop(0, plan.chunks - 1, rebuild, None, unroll=plan.unroll > 1)
    lax.fori_loop(0, plan.chunks, reverse, None, unroll=plan.unroll)
    if refs.dinitial is not None:

        @pl.when(n == 0)
        def _():
            refs.dinitial[...] = refs.dstate[...]


class _Gradients(NamedTuple):
    """Gradients of q, k, v (c, ·), of the state before the chunk, of the decay, and of the scale (1, p·D).

    The last two are None where they are not asked for.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    state: jax.Array
    decay: Any
    scale: jax.Array | None


def _chunk_backward(plan: Plan, group: _Group, decay: Decay, q, k, v, dy, state, dstate, scale) -> Steps:
    """`_Gradients` of a chunk."""
    dtype, tile, p, d, e, c = plan.dtype, group.tile, group.tile.pack, plan.key_size, plan.value_size, plan.chunk
    scores = decay.scores(q, k)
    dscores = product(dtype, dy, stack(v, p, e), "nt")
    yield
    (s, z), (ds, dz) = _split(plan, state), _split(plan, dstate)
    q_start, k_end = q * decay.since_start, k * decay.until_end
    wide_ds = stack(ds.astype(dtype), p, d)
    dq_start = product(dtype, dy, stack(s, p, d), "nn")
    dk_end = product(dtype, v, wide_ds, "nn")
    dk_end = dk_end if dz is None else dk_end + dz
    dv_end = product(dtype, k_end, wide_ds, "nt")
    yield
    dscale, q_read, dz_read = None, q_start, None
    if plan.config.normalize:
        z = z.astype(WIDE)
        pairs = zip(sums(scores, p, c), sums(q_start * z, p, d), strict=True)
        r = _reciprocals([a + b for a, b in pairs], scale)
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
    yield
    dv = fold(product(dtype, read, dy, "tn"), p, e) + dv_end
    yield
    ddecay = None
    if plan.config.decay is not None and plan.config.decay_gradient:
        whole = decay.whole * jnp.sum(state.astype(WIDE) * dstate, axis=0, keepdims=True)
        ddecay = decay.gradient(earned, q_start * dq_start, k_end * dk_end, whole)
    added = fold(product(dtype, dy, q_read, "tn"), p, d)
    dstate = dstate * decay.whole + _joined(plan, added, dz_read)
    dq, dk = dq + dq_start * decay.since_start, dk + dk_end * decay.until_end
    return _Gradients(dq, dk, dv, dstate, ddecay, dscale)


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
            y *= spread(_reciprocals(sums(q * z, p, plan.key_size), scale), plan.value_size)
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
            r = _reciprocals(sums(q * z, p, d), scale)
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


def _fill_tables(plan: Plan, refs: Refs, groups: Sequence[_Group]) -> None:
    """Computes in the first block of a sequence what decays per head are in every chunk."""
    if plan.config.decay != "head":
        return

    @pl.when(pl.program_id(2) == 0)
    def _():
        for number, group in enumerate(groups):
            between, since_start, until_end = HeadDecay.tables(group.tile, _head_decays(plan, refs, group))
            refs.between[number, :, : between.shape[1]] = between
            refs.since_start[:, group.q], refs.until_end[:, group.q] = since_start, until_end


def _head_decays(plan: Plan, refs: Refs, group: _Group) -> list[jax.Array]:
    first = pl.program_id(1) * plan.block_heads + group.first
    return [refs.decay[first + a] for a in range(group.tile.pack)]


def _decay(plan: Plan, refs: Refs, group: _Group, t: jax.Array, valid: jax.Array | None) -> Decay:
    tile = group.tile
    match plan.config.decay:
        case None:
            return NoDecay(tile)
        case "head":
            between = refs.between[group.first // plan.pack, :, : tile.pack * tile.chunk]
            tables = Tables(between, refs.since_start[:, group.q], refs.until_end[:, group.q])
            return HeadDecay(tile, _head_decays(plan, refs, group), plan.chunk if valid is None else valid, tables)
        case "token":
            parts = range(group.first, plan.decay_rows, plan.block_heads)
            totals = [[refs.decay[t, pl.ds(part + a, 1), :] for a in range(tile.pack)] for part in parts]
            return TokenDecay(tile, totals)
        case "channel":
            return ChannelDecay(tile, _load(refs, "decay", _rows(plan, t), group, valid))


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


def _reciprocals(denominators: list[jax.Array], scale: jax.Array | None) -> list[jax.Array]:
    """scale / (scale·d + sign(scale·d) ε), 0 where scale·d is 0: `recurrence.divide` as a factor of the numerator."""
    scale = jnp.float32(1) if scale is None else scale
    result = []
    for d in denominators:
        d = d * scale
        safe = jnp.where(d == 0, 1, d + jnp.where(d < 0, -EPSILON, EPSILON))
        result.append(jnp.where(d == 0, 0, scale / safe))
    return result
