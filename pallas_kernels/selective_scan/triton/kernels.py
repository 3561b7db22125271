"""Triton kernels of the selective scan; `op.py` calls them.

A program owns `BLOCK_C` channels of one group and batch element, and walks over chunks of `CHUNK` tokens. A tile of the
state, (S, channels), stays in registers; for each of its numbers the tokens of a chunk are scanned at once,
(α, w) ∘ (α', w') = (α' α, α' w + w'). The scan is over the tokens before: from the state before each token follows that
after it, and α h_{t-1} is a product, never a difference. Arrays are contiguous; a is (S, C), states are (S, C), and
everything is computed in float32. A pointer that a call does not use points at some other array.

Backward, from the last chunk to the first, with the same scan for the states from those kept before the chunk, and one
from its end for the adjoint, λ_t = dp_t c_t + α_{t+1} λ_{t+1}; `tpu/kernels.py` has the equations.
"""

import triton
import triton.language as tl


@triton.jit
def _join(a, w, a_after, w_after):
    """What two stretches of tokens do to a state, one after the other."""
    return a * a_after, w * a_after + w_after


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), of full precision where it is small: log(u) / (u - 1) corrects the rounding of u = 1 + exp."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    exact = u == 1.0
    return tl.maximum(x, 0.0) + tl.where(exact, e, e * tl.log(u) / tl.where(exact, 1.0, u - 1.0))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _decay(exponent):
    return tl.exp(tl.minimum(exponent, 0.0))


@triton.jit
def _rows(base, rows, columns, there, C: tl.constexpr):
    """(tokens, channels) of an array (N, C) in float32; zeros where there is no token or channel."""
    return tl.load(base + rows[:, None] * C + columns[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def _steps(delta, bias, rows, columns, there, C: tl.constexpr, BIASED: tl.constexpr, SOFTPLUS: tl.constexpr):
    """What goes into softplus, and the step sizes; zeros where there is no token."""
    raw = _rows(delta, rows, columns, there, C)
    if BIASED:
        raw += tl.load(bias + columns, mask=columns < C, other=0.0)[None, :]
    step = raw
    if SOFTPLUS:
        step = _softplus(raw)
    return raw, tl.where(there, step, 0.0)


@triton.jit
def _kept(keep, rows, count, PACKED: tl.constexpr, CHUNK: tl.constexpr):
    """(tokens, 1): 0 where a segment starts, else 1."""
    if PACKED:
        return tl.load(keep + rows, mask=(rows >= 0) & (rows < count), other=1.0)[:, None]
    return tl.full((CHUNK, 1), 1.0, tl.float32)


@triton.jit
def _shared(base, rows, count, group, s, S: tl.constexpr, GROUPS: tl.constexpr):
    """(tokens,) of entry s of b or c, (N, G, S)."""
    there = (rows >= 0) & (rows < count)
    return tl.load(base + (rows * GROUPS + group) * S + s, mask=there, other=0.0).to(tl.float32)


@triton.jit
def forward(
    x,
    delta,
    gate,
    a,
    b,
    c,
    skip,
    bias,
    keep,
    initial,
    tokens,
    y,
    final,
    kept,
    C: tl.constexpr,
    S: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    GATED: tl.constexpr,
    SKIPPED: tl.constexpr,
    BIASED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    KEEP: tl.constexpr,
):
    """y, the last state, and the states before the chunks."""
    program = tl.program_id(0)
    batch, group, block = (program // (GROUPS * BLOCKS)).to(tl.int64), program // BLOCKS % GROUPS, program % BLOCKS
    own = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, columns = own < SHARE, group * SHARE + own
    place, entry = tl.arange(0, CHUNK), tl.arange(0, BLOCK_S)
    tile = entry[:, None] * C + columns[None, :]
    in_tile = (entry < S)[:, None] & inside[None, :]
    offset = batch * tokens * C
    x, delta, gate, y = x + offset, delta + offset, gate + offset, y + offset
    b, c, keep = b + batch * tokens * GROUPS * S, c + batch * tokens * GROUPS * S, keep + batch * tokens
    state = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    if INITIAL:
        state = tl.load(initial + batch * S * C + tile, mask=in_tile, other=0.0)
    for chunk in range(CHUNKS):
        rows = chunk * CHUNK + place
        there = (rows < tokens)[:, None] & inside[None, :]
        if KEEP:
            tl.store(kept + (batch * CHUNKS + chunk) * S * C + tile, state, mask=in_tile)
        values = _rows(x, rows, columns, there, C)
        _, step = _steps(delta, bias, rows, columns, there, C, BIASED, SOFTPLUS)
        passed = _kept(keep, rows, tokens, PACKED, CHUNK)
        total = tl.zeros((CHUNK, BLOCK_C), tl.float32)
        for s in range(S):
            rate = tl.load(a + s * C + columns, mask=inside, other=0.0)
            alpha = _decay(step * rate[None, :]) * passed
            written = step * values * _shared(b, rows, tokens, group, s, S, GROUPS)[:, None]
            whole, states = tl.associative_scan((alpha, written), 0, _join)
            before = tl.sum(tl.where(entry[:, None] == s, state, 0.0), 0)
            states += whole * before[None, :]
            total += _shared(c, rows, tokens, group, s, S, GROUPS)[:, None] * states
            last = tl.sum(tl.where(place[:, None] == CHUNK - 1, states, 0.0), 0)
            state = tl.where(entry[:, None] == s, last[None, :], state)
        if SKIPPED:
            total += tl.load(skip + columns, mask=inside, other=0.0)[None, :] * values
        if GATED:
            opened = _rows(gate, rows, columns, there, C)
            total *= opened * _sigmoid(opened)
        tl.store(y + rows[:, None] * C + columns[None, :], total.to(y.dtype.element_ty), mask=there)
    if FINAL:
        tl.store(final + batch * S * C + tile, state, mask=in_tile)


@triton.jit
def backward(
    x,
    delta,
    gate,
    a,
    b,
    c,
    skip,
    bias,
    keep,
    kept,
    dy,
    dfinal,
    tokens,
    dx,
    ddelta,
    dgate,
    da,
    db,
    dc,
    dskip,
    dbias,
    dinitial,
    C: tl.constexpr,
    S: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    GATED: tl.constexpr,
    SKIPPED: tl.constexpr,
    BIASED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
):
    """Gradients; those of b and c are (B, G · BLOCKS, N, S), of a block of channels each."""
    program = tl.program_id(0)
    batch, group, block = (program // (GROUPS * BLOCKS)).to(tl.int64), program // BLOCKS % GROUPS, program % BLOCKS
    own = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, columns = own < SHARE, group * SHARE + own
    place, entry = tl.arange(0, CHUNK), tl.arange(0, BLOCK_S)
    tile = entry[:, None] * C + columns[None, :]
    in_tile = (entry < S)[:, None] & inside[None, :]
    offset = batch * tokens * C
    x, delta, gate, dy, dx, ddelta, dgate = (
        x + offset, delta + offset, gate + offset, dy + offset, dx + offset, ddelta + offset, dgate + offset
    )  # fmt: skip
    b, c, keep = b + batch * tokens * GROUPS * S, c + batch * tokens * GROUPS * S, keep + batch * tokens
    part = program.to(tl.int64) * tokens * S
    db, dc = db + part, dc + part
    adjoint = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    if FINAL:
        adjoint = tl.load(dfinal + batch * S * C + tile, mask=in_tile, other=0.0)
    rates = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    skips = tl.zeros((BLOCK_C,), tl.float32)
    biases = tl.zeros((BLOCK_C,), tl.float32)
    for back in range(CHUNKS):
        chunk = CHUNKS - 1 - back
        rows = chunk * CHUNK + place
        there = (rows < tokens)[:, None] & inside[None, :]
        values = _rows(x, rows, columns, there, C)
        raw, step = _steps(delta, bias, rows, columns, there, C, BIASED, SOFTPLUS)
        passed = _kept(keep, rows, tokens, PACKED, CHUNK)
        # Of the token before, none in front of the chunk's first, and of the one after it.
        earlier = ((place > 0) & (rows - 1 < tokens))[:, None] & inside[None, :]
        values_1 = _rows(x, rows - 1, columns, earlier, C)
        _, step_1 = _steps(delta, bias, rows - 1, columns, earlier, C, BIASED, SOFTPLUS)
        passed_1 = tl.where((place > 0)[:, None], _kept(keep, rows - 1, tokens, PACKED, CHUNK), 1.0)
        later = ((place < CHUNK - 1) & (rows + 1 < tokens))[:, None] & inside[None, :]
        _, step_2 = _steps(delta, bias, rows + 1, columns, later, C, BIASED, SOFTPLUS)
        passed_2 = tl.where((place < CHUNK - 1)[:, None], _kept(keep, rows + 1, tokens, PACKED, CHUNK), 1.0)
        dmixed = _rows(dy, rows, columns, there, C)
        opened = dmixed
        slope = dmixed
        if GATED:
            opened = _rows(gate, rows, columns, there, C)
            share = _sigmoid(opened)
            slope = dmixed * share * (1.0 + opened * (1.0 - share))
            dmixed *= opened * share
        mixed = tl.zeros((CHUNK, BLOCK_C), tl.float32)
        dwrite = tl.zeros((CHUNK, BLOCK_C), tl.float32)
        dstep = tl.zeros((CHUNK, BLOCK_C), tl.float32)
        for s in range(S):
            rate = tl.load(a + s * C + columns, mask=inside, other=0.0)
            start = tl.load(kept + ((batch * CHUNKS + chunk) * S + s) * C + columns, mask=inside, other=0.0)
            written_1 = step_1 * values_1 * _shared(b, rows - 1, tokens, group, s, S, GROUPS)[:, None]
            alpha_1 = _decay(step_1 * rate[None, :]) * passed_1
            whole, before = tl.associative_scan((alpha_1, written_1), 0, _join)
            before += whole * start[None, :]
            alpha = _decay(step * rate[None, :]) * passed
            ours, theirs = _shared(b, rows, tokens, group, s, S, GROUPS), _shared(c, rows, tokens, group, s, S, GROUPS)
            after = alpha * before + step * values * ours[:, None]
            alpha_2 = _decay(step_2 * rate[None, :]) * passed_2
            whole, lam = tl.associative_scan((alpha_2, dmixed * theirs[:, None]), 0, _join, reverse=True)
            coming = tl.sum(tl.where(entry[:, None] == s, adjoint, 0.0), 0)
            lam += whole * coming[None, :]
            tl.store(db + rows * S + s, tl.sum(lam * step * values, 1), mask=rows < tokens)
            tl.store(dc + rows * S + s, tl.sum(dmixed * after, 1), mask=rows < tokens)
            mixed += theirs[:, None] * after
            dwrite += lam * ours[:, None]
            passing = alpha * lam
            grown = tl.where(step * rate[None, :] > 0.0, 0.0, passing * before)
            dstep += grown * rate[None, :]
            rates += tl.where(entry[:, None] == s, tl.sum(grown * step, 0)[None, :], 0.0)
            first = tl.sum(tl.where(place[:, None] == 0, passing, 0.0), 0)
            adjoint = tl.where(entry[:, None] == s, first[None, :], adjoint)
        dvalues = dwrite * step
        dstep += dwrite * values
        if SKIPPED:
            factor = tl.load(skip + columns, mask=inside, other=0.0)[None, :]
            dvalues += factor * dmixed
            mixed += factor * values
            skips += tl.sum(dmixed * values, 0)
        if SOFTPLUS:
            dstep *= _sigmoid(raw)
        dstep = tl.where(there, dstep, 0.0)
        if BIASED:
            biases += tl.sum(dstep, 0)
        at = rows[:, None] * C + columns[None, :]
        tl.store(dx + at, dvalues.to(dx.dtype.element_ty), mask=there)
        tl.store(ddelta + at, dstep.to(ddelta.dtype.element_ty), mask=there)
        if GATED:
            tl.store(dgate + at, (slope * mixed).to(dgate.dtype.element_ty), mask=there)
    tl.store(da + batch * S * C + tile, rates, mask=in_tile)
    if SKIPPED:
        tl.store(dskip + batch * C + columns, skips, mask=inside)
    if BIASED:
        tl.store(dbias + batch * C + columns, biases, mask=inside)
    if INITIAL:
        tl.store(dinitial + batch * S * C + tile, adjoint, mask=in_tile)
