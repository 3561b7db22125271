"""Bodies of the TPU kernels of delta rule attention, and the call that runs one.

A body gets a `Plan` and `Refs`: the blocks that a grid point holds, by the names in `plan.KINDS`. Per head and
chunk, with the state S before it, P the decays between tokens, p = exp(G), p' = exp(G_end - G) and β as columns:

    O = k kᵀ ∘ P     A = q kᵀ ∘ P     L = β O below the diagonal
    U = (I + L)⁻¹ β (v - p (k S))
    y = scale (A U + p (q S))
    S' = exp(G_end) S + kᵀ (p' U)

(I + L)⁻¹ is never built. The triangles of `BLOCK` tokens on its diagonal are inverted row by row, all of a chunk at
once; between them blocks are substituted. The identity part of an inverse multiplies nothing: it stays exact.

Backward, with dS' at hand, from the last chunk to the first. The states of a block's chunks, their U and their
inverses are first rebuilt on chip from the state kept before the block. With R the right-hand side, the inverse is
differentiated through its solution: dR = (I + L)⁻ᵀ dU and dL = -dR Uᵀ (that is -Tᵀ dT Tᵀ, with dT = dU Rᵀ).

    dU = (scale A)ᵀ dy + p' (k dS')           dR = (I + L)⁻ᵀ dU              m = p β dR
    dA = scale (dy Uᵀ)    dQ = dA ∘ P         dL = -dR Uᵀ                    dK = β dL ∘ P
    dq = dQ k + scale p (dy Sᵀ)               dv = β dR
    dk = dQᵀ q + dK k + dKᵀ k - m Sᵀ + p' (U dS'ᵀ)
    dβ = Σ_e dR ∘ (v - p (k S)) + Σ_j dL ∘ O
    dS = exp(G_end) dS' + qᵀ (scale p dy) - kᵀ m
    dg_t = Σ_{i≥t>j} (dA ∘ A + dL ∘ L)_ij + Σ_{i≥t} a_i + Σ_{j<t} b_j + exp(G_end) <S, dS'>
           a = Σ_e (scale dy ∘ p (q S) - β dR ∘ p (k S))        b = Σ_e p' (k dS') ∘ U

Every term of a decay's gradient carries that decay: none is a difference of sums without it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.delta_rule_attention.tpu.plan import BLOCK, Plan
from pallas_kernels.recurrence import decay_floor
from pallas_kernels.tpu.calls import WIDE, Refs, Steps, product, run_groups, run_plan
from pallas_kernels.tpu.chips import LANES
from pallas_kernels.tpu.lanes import rows_and_lanes

OPTIONAL = ("scale", "initial", "final", "kept", "dfinal", "dinitial")


def call(plan: Plan, kind: str, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Runs a kernel; see `run_plan`."""
    body = _backward if kind == "backward" else _forward
    return run_plan("delta_rule_attention", body, OPTIONAL, plan, kind, arrays)


def _precise(dtype: jnp.dtype, x: jax.Array, y: jax.Array, over: str) -> jax.Array:
    """`product` without rounding what is float32: it is cut into two parts of bfloat16, and takes a pass for each.

    What the next token writes depends on what this one wrote: with β up to 2 nothing forgets a rounded state, and
    errors of single passes grow above the bound.
    """
    if dtype == WIDE:
        return product(dtype, x, y, over)
    xs, ys = _parts(dtype, x), _parts(dtype, y)
    pairs = [(a, b) for i, a in enumerate(xs) for j, b in enumerate(ys) if i + j < 2]
    return sum(product(dtype, a, b, over) for a, b in reversed(pairs))


def _parts(dtype: jnp.dtype, x: jax.Array) -> list[jax.Array]:
    high = x.astype(dtype)
    return [high] if x.dtype == dtype else [high, (x - high.astype(WIDE)).astype(dtype)]


# ---- one chunk of one head


class _Chunk(NamedTuple):
    """What forward and backward know of a chunk before they look at a state.

    Attributes:
      rows: its tokens in a block.
      q: (c, D).
      k: (c, D).
      v: (c, E).
      valid: (c, 1), where there is a token; None where there surely is.
      beta: (c, 1).
      between: P, zero above the diagonal, (c, c).
      since_start: p, (c, 1), or 1.
      until_end: p', (c, 1), or 1.
      whole: exp(G_end), (1, 1), or 1.
    """

    rows: pl.Slice
    q: jax.Array
    k: jax.Array
    v: jax.Array
    valid: jax.Array | None
    beta: jax.Array
    between: jax.Array
    since_start: jax.Array | float = 1.0
    until_end: jax.Array | float = 1.0
    whole: jax.Array | float = 1.0


def _load(plan: Plan, refs: Refs, n: jax.Array, t: jax.Array, head: int) -> _Chunk:
    c, d, e = plan.chunk, plan.key_size, plan.value_size
    rows = pl.ds(pl.multiple_of(t * c, c), c)
    shared = 0 if plan.repeats > 1 else head
    valid = None
    if plan.tail:  # what stands beyond the last token may be anything
        valid = lax.broadcasted_iota(jnp.int32, (c, 1), 0) < plan.length - (n * plan.tokens + t * c)
    q, k, v = (
        _existing(valid, ref[rows, number * size : (number + 1) * size])
        for ref, number, size in ((refs.q, head, d), (refs.k, shared, d), (refs.v, shared, e))
    )
    line = head * plan.lines
    beta = _column(refs.rows[t, line : line + 1, :])
    i, j = rows_and_lanes((c, c))
    if plan.config.decay is None:
        return _Chunk(rows, q, k, v, valid, beta, jnp.where(i >= j, 1.0, 0.0))
    return _Chunk(rows, q, k, v, valid, beta, *_decays(refs.rows[t, line + 1 : line + 2, :]))


def _existing(valid: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if valid is None else jnp.where(valid, x, jnp.zeros_like(x))


def _decays(g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """P, p, p' and exp(G_end) of log decays (1, c), cumulated in two parts as `xla.scalar_decay` does."""
    c = g.shape[1]
    i, j = rows_and_lanes((c, c))
    g = jnp.maximum(g, -decay_floor(WIDE))
    step = decay_floor(WIDE) * c * 2.0**-24  # sums of its multiples, down to -floor for every token, are exact
    coarse = jnp.ceil(g / step) * step
    exponent = since_start = until_end = 0.0
    for part in (coarse, g - coarse):
        by_row = jnp.sum(jnp.where(j <= i, part, 0), axis=1, keepdims=True)
        by_lane = jnp.sum(jnp.where(i <= j, _column(part), 0), axis=0, keepdims=True)
        exponent += by_row - by_lane
        since_start += by_row
        until_end += by_row[c - 1 :] - by_row
    decayed = jnp.exp(jnp.minimum(exponent, 0))  # rounding may leave +1e-9
    between = jnp.where(i > j, decayed, jnp.where(i == j, 1.0, 0.0))
    since_start = jnp.exp(jnp.minimum(since_start, 0))
    return between, since_start, jnp.exp(jnp.minimum(until_end, 0)), since_start[c - 1 :]


def _write(plan: Plan, xs: list[_Chunk], overlaps: list, reads: list, states: list):
    """U (c, E) of each head, the states after the chunk, and the inverses; `reads` are k S."""
    lowers = [_below(x.beta * overlap) for x, overlap in zip(xs, overlaps, strict=True)]
    inverses = _inverses(lowers)
    rights = [x.beta * (x.v.astype(WIDE) - x.since_start * read) for x, read in zip(xs, reads, strict=True)]
    writes = run_groups(map(functools.partial(_solve, plan), lowers, inverses, rights))
    states = [
        x.whole * state + _precise(plan.dtype, x.k, x.until_end * u, "tn")
        for x, state, u in zip(xs, states, writes, strict=True)
    ]
    return writes, states, inverses


def _below(x: jax.Array) -> jax.Array:
    i, j = rows_and_lanes(x.shape)
    return jnp.where(i > j, x, 0)


def _column(row: jax.Array) -> jax.Array:
    """(1, c) to (c, 1)."""
    i, j = rows_and_lanes((row.shape[1], row.shape[1]))
    return jnp.sum(jnp.where(i == j, row, 0), axis=1, keepdims=True)


def _row(column: jax.Array) -> jax.Array:
    """(c, 1) to (1, c)."""
    i, j = rows_and_lanes((column.shape[0], column.shape[0]))
    return jnp.sum(jnp.where(i == j, column, 0), axis=0, keepdims=True)


# ---- the triangle


def _inverses(lowers: list[jax.Array]) -> list[jax.Array]:
    """(I + L)⁻¹ - I of the triangles of `BLOCK` tokens on the diagonal of each L (c, c), side by side: (BLOCK, c).

    Row by row: as soon as row r of an inverse is known, the rows below it subtract their part of it. All triangles go
    together, those of the other heads too, with L's column r spread over the lanes of its triangle.
    """
    c = lowers[0].shape[0]
    i, j = rows_and_lanes((c, c))
    inside = (i | (BLOCK - 1)) == (j | (BLOCK - 1))
    triangles = [jnp.sum(jnp.where(inside, x, 0).reshape(c // BLOCK, BLOCK, c), axis=0) for x in lowers]
    together = max(1, LANES // c)  # lanes are gathered within tiles
    tiles = [jnp.concatenate(triangles[i : i + together], axis=1) for i in range(0, len(triangles), together)]
    row, lane = rows_and_lanes((BLOCK, max(c, LANES)))
    place = lane & (BLOCK - 1)
    identity = jnp.where(row == place, 1.0, 0.0)
    identities = [identity[:, : tile.shape[1]] for tile in tiles]
    sources = [(lane - place)[:, : tile.shape[1]] for tile in tiles]
    inverses = identities
    for r in range(BLOCK - 1):
        columns = [jnp.take_along_axis(x, source + r, axis=1) for x, source in zip(tiles, sources, strict=True)]
        inverses = [x - column * x[r : r + 1, :] for x, column in zip(inverses, columns, strict=True)]
    inverses = [x - identity for x, identity in zip(inverses, identities, strict=True)]
    return [x[:, start : start + c] for x in inverses for start in range(0, x.shape[1], c)]


def _solve(plan: Plan, lower: jax.Array, inverse: jax.Array, right: jax.Array, *, transposed: bool = False) -> Steps:
    """(I + L)⁻¹ R of one head, from the first triangle to the last; (I + L)⁻ᵀ R, from the last to the first."""
    done, over = {}, "tn" if transposed else "nn"
    starts = range(0, plan.chunk, BLOCK)
    for start in reversed(starts) if transposed else starts:
        rows = slice(start, start + BLOCK)
        rest = right[rows]
        if done:
            known = jnp.concatenate([done[i] for i in sorted(done)], axis=0)
            rest -= _precise(plan.dtype, lower[rows.stop :, rows] if transposed else lower[rows, :start], known, over)
            yield
        done[start] = rest + _precise(plan.dtype, inverse[:, rows], rest, over)
        yield
    return jnp.concatenate([done[start] for start in starts], axis=0)


# ---- bodies


def _forward(plan: Plan, refs: Refs) -> None:
    n, e, heads = pl.program_id(2), plan.value_size, range(plan.block_heads)
    halves = slice(0, plan.chunk), slice(plan.chunk, None)

    @pl.when(n == 0)
    def _():
        refs.state[...] = jnp.zeros_like(refs.state) if refs.initial is None else refs.initial[...]

    if refs.kept is not None:
        refs.kept[...] = refs.state[...].astype(plan.dtype)

    def chunk(t, _):
        xs = [_load(plan, refs, n, t, head) for head in heads]
        states = [refs.state[head] for head in heads]
        both = [jnp.concatenate([x.q, x.k], axis=0) for x in xs]
        pairs = [product(plan.dtype, qk, x.k, "nt") for qk, x in zip(both, xs, strict=True)]
        scores, overlaps = ([pair[half] * x.between for pair, x in zip(pairs, xs, strict=True)] for half in halves)
        reads = [_precise(plan.dtype, qk, state, "nn") for qk, state in zip(both, states, strict=True)]
        writes, states, _ = _write(plan, xs, overlaps, [read[halves[1]] for read in reads], states)
        for head, x in enumerate(xs):
            y = _precise(plan.dtype, scores[head], writes[head], "nn") + x.since_start * reads[head][halves[0]]
            y = y if refs.scale is None else refs.scale[0] * y
            refs.y[x.rows, head * e : (head + 1) * e] = y.astype(refs.y.dtype)
            refs.state[head] = states[head]

    lax.fori_loop(0, plan.chunks, chunk, None, unroll=plan.unroll)
    if refs.final is not None:

        @pl.when(n == plan.blocks - 1)
        def _():
            refs.final[...] = refs.state[...]


def _backward(plan: Plan, refs: Refs) -> None:
    n, heads = plan.blocks - 1 - pl.program_id(2), range(plan.block_heads)

    @pl.when(n == plan.blocks - 1)
    def _():
        refs.dstate[...] = jnp.zeros_like(refs.dstate) if refs.dfinal is None else refs.dfinal[...]

    refs.state[...] = refs.kept[...].astype(WIDE)

    def rebuild(t, _):
        xs = [_load(plan, refs, n, t, head) for head in heads]
        states = [refs.state[head] for head in heads]
        overlaps = [product(plan.dtype, x.k, x.k, "nt") * x.between for x in xs]
        reads = [_precise(plan.dtype, x.k, state, "nn") for x, state in zip(xs, states, strict=True)]
        writes, after, inverses = _write(plan, xs, overlaps, reads, states)
        for head, x in enumerate(xs):
            refs.states[t, head] = states[head].astype(plan.dtype)
            refs.writes[head, x.rows, :] = writes[head]
            refs.inverses[t, head] = inverses[head]
            refs.state[head] = after[head]

    def backward(step, _):
        t = plan.chunks - 1 - step
        run_groups(_backward_chunk(plan, refs, n, t, head) for head in heads)

    lax.fori_loop(0, plan.chunks, rebuild, None, unroll=plan.unroll)
    lax.fori_loop(0, plan.chunks, backward, None, unroll=plan.unroll)
    if refs.dinitial is not None:

        @pl.when(n == 0)
        def _():
            refs.dinitial[...] = refs.dstate[...]


def _backward_chunk(plan: Plan, refs: Refs, n: jax.Array, t: jax.Array, head: int) -> Steps:
    """Writes the gradients of a chunk, and dS before it in place of dS after it; see the module's docstring."""
    c, d, e, dtype = plan.chunk, plan.key_size, plan.value_size, plan.dtype
    x, state, inverse = _load(plan, refs, n, t, head), refs.states[t, head], refs.inverses[t, head]
    dy = _existing(x.valid, refs.dy[x.rows, head * e : (head + 1) * e])
    dstate, writes, between = refs.dstate[head], refs.writes[head, x.rows, :], x.between
    scale = 1.0 if refs.scale is None else refs.scale[0]
    wide_dy = dy.astype(WIDE)

    both = jnp.concatenate([x.q, x.k], axis=0)
    pairs = product(dtype, both, x.k, "nt")
    scores, overlap = pairs[:c] * between, pairs[c:] * between
    lower = _below(x.beta * overlap)
    reads = product(dtype, both, state, "nn")
    q_read, k_read = x.since_start * reads[:c], x.since_start * reads[c:]
    k_dstate = x.until_end * _precise(dtype, x.k, dstate, "nn")
    yield

    dwrites = _precise(dtype, scale * scores, dy, "tn") + k_dstate
    yield
    dright = yield from _solve(plan, lower, inverse, dwrites, transposed=True)
    dscores, dlower = _precise(dtype, dy, writes, "nt"), _below(-_precise(dtype, dright, writes, "nt"))
    yield
    dbetween = jnp.concatenate([scale * dscores * between, x.beta * dlower * between], axis=0)
    dreads = jnp.concatenate([scale * x.since_start * wide_dy, -x.since_start * x.beta * dright], axis=0)

    inner, outer = product(dtype, dbetween, x.k, "nn"), product(dtype, dreads, state, "nt")
    yield
    dk = inner[c:] + outer[c:] + product(dtype, dbetween, both, "tn")
    dk = dk + x.until_end * product(dtype, writes, dstate, "nt")
    refs.dq[x.rows, head * d : (head + 1) * d] = (inner[:c] + outer[:c]).astype(refs.dq.dtype)
    refs.dk[x.rows, head * d : (head + 1) * d] = dk.astype(refs.dk.dtype)
    refs.dv[x.rows, head * e : (head + 1) * e] = (x.beta * dright).astype(refs.dv.dtype)
    refs.dstate[head] = x.whole * dstate + _precise(dtype, both, dreads, "tn")

    line = head * plan.gradient_lines
    dbeta = _total(dright * (x.v.astype(WIDE) - k_read)) + _total(dlower * overlap)
    refs.drows[t, line : line + 1, :] = _row(dbeta)
    if plan.config.decay is not None:
        i, j = rows_and_lanes((c, c))
        earned = _below(scale * dscores * scores + dlower * lower)
        earned = _precise(dtype, earned, jnp.where(i < j, 1.0, 0.0).astype(dtype), "nn")  # row i, lane t: of all j < t
        since = earned + _total(scale * wide_dy * q_read - x.beta * dright * k_read)
        until = _total(k_dstate * writes)
        whole = x.whole * _total(jnp.sum(state.astype(WIDE) * dstate, axis=0, keepdims=True))
        ddecay = jnp.sum(jnp.where(i >= j, since, until), axis=0, keepdims=True) + whole
        refs.drows[t, line + 1 : line + 2, :] = ddecay
    if plan.config.scaled:  # of y before it is scaled: right for a scale of 0, too
        dscale = jnp.sum(dscores * scores, axis=0, keepdims=True) + _row(_total(wide_dy * q_read))
        refs.drows[t, line + plan.lines : line + plan.lines + 1, :] = dscale


def _total(x: jax.Array) -> jax.Array:
    """Sums over lanes, (r, l) to (r, 1)."""
    return jnp.sum(x, axis=1, keepdims=True)
