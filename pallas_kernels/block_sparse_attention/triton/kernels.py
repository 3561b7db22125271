"""Triton kernels of block-sparse attention; `op.py` calls them, `../README.md` has the equations.

Arrays are contiguous, (B, N, H, D), and (B, H, N) for numbers per query. A program walks over a list of tiles:
`offsets` says where the list of each block of each lane begins, `others` which block is at the other side, `kinds` the
mask of a tile: 0 for none, n + 1 for `masks[n]`, (P, keys, queries) int8. Nothing is read beyond the last token.
Exponents are to the base 2; every sum is float32.
"""

import triton
import triton.language as tl

_LEAST = tl.constexpr(-1e30)  # below every score, and finite: the difference of two is 0
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(base, rows, length, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr):
    """(rows, PADDED) of an array whose rows are `stride` apart; 0 beyond its length and width."""
    columns = tl.arange(0, PADDED)
    mask = (rows < length)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit
def _write(base, x, rows, length, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    mask = (rows < length)[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + rows[:, None].to(tl.int64) * stride + columns[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _lane(batch, head, HEADS: tl.constexpr, LANES_B: tl.constexpr, LANES_H: tl.constexpr):
    """The lists of a batch element and head."""
    lane = 0
    if LANES_B > 1:
        lane = batch * LANES_H
    if LANES_H > 1:
        lane += head // (HEADS // LANES_H)
    return lane


@triton.jit
def _scores(q, k, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Scores to the base 2 of (rows, D) and (columns, D), and what the softcap multiplies their gradient with."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE
    slope = tl.full(s.shape, 1.0, tl.float32)
    if SOFTCAP > 0:
        capped = 2 * tl.sigmoid(2 * s / SOFTCAP) - 1  # tanh
        slope = 1 - capped * capped
        s = SOFTCAP * capped
    return s * _LOG2E, slope


@triton.jit
def _seen(
    query_ids, key_ids, masks, kind, rows, columns, row, column, tokens,
    KEYS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What is allowed of a tile, (rows, columns)."""
    seen = (rows < tokens)[:, None] & (columns < KEYS)[None, :]
    if SEGMENTS:
        own = tl.load(query_ids + rows, mask=rows < tokens, other=0)
        their = tl.load(key_ids + columns, mask=columns < KEYS, other=0)
        seen = seen & (own[:, None] == their[None, :])
    if MASKED:
        i, j = rows - row * BLOCK_Q, columns - column * BLOCK_K
        number = tl.maximum(kind - 1, 0).to(tl.int64)
        own_mask = tl.load(masks + number * (BLOCK_Q * BLOCK_K) + j[None, :] * BLOCK_Q + i[:, None]).to(tl.int32)
        seen = seen & (tl.where(kind > 0, own_mask, 1) != 0)
    return seen


@triton.jit
def forward(
    q, k, v, query_ids, key_ids, offsets, others, kinds, masks, tokens, y, lse,
    KEYS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    LANES_B: tl.constexpr, LANES_H: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    SEGMENTS: tl.constexpr, MASKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (B, N, H, E) and lse (B, H, N) of one block of queries of one head per program."""
    blocks = tl.cdiv(tokens, BLOCK_Q)
    program = tl.program_id(0)
    i = program % blocks
    head = (program // blocks) % HEADS
    batch = (program // blocks // HEADS).to(tl.int64)
    group = head // (HEADS // GROUPS)
    q += (batch * tokens * HEADS + head) * D
    k += (batch * KEYS * GROUPS + group) * D
    v += (batch * KEYS * GROUPS + group) * E
    y += (batch * tokens * HEADS + head) * E
    query_ids += batch * tokens
    key_ids += batch * KEYS
    list_ = _lane(batch, head, HEADS, LANES_B, LANES_H) * blocks + i
    rows = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
    own = _rows(q, rows, tokens, HEADS * D, D, BLOCK_D, DOT)
    top = tl.full((BLOCK_Q,), _LEAST, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    sums = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
    for t in range(tl.load(offsets + list_), tl.load(offsets + list_ + 1)):
        j = tl.load(others + t)
        columns = j * BLOCK_K + tl.arange(0, BLOCK_K)
        keys = _rows(k, columns, KEYS, GROUPS * D, D, BLOCK_D, DOT)
        values = _rows(v, columns, KEYS, GROUPS * E, E, BLOCK_E, DOT)
        s, _ = _scores(own, keys, SCALE, SOFTCAP, PRECISION)
        seen = _seen(query_ids, key_ids, masks, tl.load(kinds + t), rows, columns, i, j, tokens,
                     KEYS, BLOCK_Q, BLOCK_K, SEGMENTS, MASKED)  # fmt: skip
        s = tl.where(seen, s, _LEAST)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.where(seen, tl.exp2(s - higher[:, None]), 0.0)
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        sums = sums * shrink[:, None] + tl.dot(p.to(DOT), values, input_precision=PRECISION)
        top = higher
    empty = total == 0
    divisor = tl.where(empty, 1.0, total)
    _write(y, sums / divisor[:, None], rows, tokens, HEADS * E, E, BLOCK_E)
    result = tl.where(empty, float("-inf"), (top + tl.log2(divisor)) / _LOG2E)
    tl.store(lse + (batch * HEADS + head) * tokens + rows, result, mask=rows < tokens)


@triton.jit
def backward_rows(
    q, k, v, dy, lse, delta, query_ids, key_ids, offsets, others, kinds, masks, tokens, dq,
    KEYS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    LANES_B: tl.constexpr, LANES_H: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    SEGMENTS: tl.constexpr, MASKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (B, N, H, D) of one block of queries of one head per program; lse and Δ are (B, H, N)."""
    blocks = tl.cdiv(tokens, BLOCK_Q)
    program = tl.program_id(0)
    i = program % blocks
    head = (program // blocks) % HEADS
    batch = (program // blocks // HEADS).to(tl.int64)
    group = head // (HEADS // GROUPS)
    of_head = batch * tokens * HEADS + head
    k += (batch * KEYS * GROUPS + group) * D
    v += (batch * KEYS * GROUPS + group) * E
    query_ids += batch * tokens
    key_ids += batch * KEYS
    list_ = _lane(batch, head, HEADS, LANES_B, LANES_H) * blocks + i
    rows = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
    own = _rows(q + of_head * D, rows, tokens, HEADS * D, D, BLOCK_D, DOT)
    dout = _rows(dy + of_head * E, rows, tokens, HEADS * E, E, BLOCK_E, DOT)
    per_row = (batch * HEADS + head) * tokens + rows
    log_sum = tl.load(lse + per_row, mask=rows < tokens, other=0.0) * _LOG2E
    shared = tl.load(delta + per_row, mask=rows < tokens, other=0.0)
    sums = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for t in range(tl.load(offsets + list_), tl.load(offsets + list_ + 1)):
        j = tl.load(others + t)
        columns = j * BLOCK_K + tl.arange(0, BLOCK_K)
        keys = _rows(k, columns, KEYS, GROUPS * D, D, BLOCK_D, DOT)
        values = _rows(v, columns, KEYS, GROUPS * E, E, BLOCK_E, DOT)
        s, slope = _scores(own, keys, SCALE, SOFTCAP, PRECISION)
        seen = _seen(query_ids, key_ids, masks, tl.load(kinds + t), rows, columns, i, j, tokens,
                     KEYS, BLOCK_Q, BLOCK_K, SEGMENTS, MASKED)  # fmt: skip
        p = tl.where(seen, tl.exp2(tl.where(seen, s - log_sum[:, None], 0.0)), 0.0)
        ds = p * (tl.dot(dout, tl.trans(values), input_precision=PRECISION) - shared[:, None]) * slope
        sums += tl.dot(ds.to(DOT), keys, input_precision=PRECISION)
    _write(dq + of_head * D, sums * SCALE, rows, tokens, HEADS * D, D, BLOCK_D)


@triton.jit
def backward_columns(
    q, k, v, dy, lse, delta, query_ids, key_ids, offsets, others, kinds, masks, tokens, dk, dv,
    KEYS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    LANES_B: tl.constexpr, LANES_H: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    SEGMENTS: tl.constexpr, MASKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv (B, M, G, ·) of one block of keys of one group per program, its heads one after the other."""
    blocks: tl.constexpr = (KEYS + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    j = program % blocks
    group = (program // blocks) % GROUPS
    batch = (program // blocks // GROUPS).to(tl.int64)
    of_group = batch * KEYS * GROUPS + group
    query_ids += batch * tokens
    key_ids += batch * KEYS
    columns = j * BLOCK_K + tl.arange(0, BLOCK_K)
    keys = _rows(k + of_group * D, columns, KEYS, GROUPS * D, D, BLOCK_D, DOT)
    values = _rows(v + of_group * E, columns, KEYS, GROUPS * E, E, BLOCK_E, DOT)
    of_keys = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    of_values = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    for turn in range(HEADS // GROUPS):
        head = group * (HEADS // GROUPS) + turn
        of_head = batch * tokens * HEADS + head
        list_ = _lane(batch, head, HEADS, LANES_B, LANES_H) * blocks + j
        for t in range(tl.load(offsets + list_), tl.load(offsets + list_ + 1)):
            i = tl.load(others + t)
            rows = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
            own = _rows(q + of_head * D, rows, tokens, HEADS * D, D, BLOCK_D, DOT)
            dout = _rows(dy + of_head * E, rows, tokens, HEADS * E, E, BLOCK_E, DOT)
            per_row = (batch * HEADS + head) * tokens + rows
            log_sum = tl.load(lse + per_row, mask=rows < tokens, other=0.0) * _LOG2E
            shared = tl.load(delta + per_row, mask=rows < tokens, other=0.0)
            s, slope = _scores(own, keys, SCALE, SOFTCAP, PRECISION)
            seen = _seen(query_ids, key_ids, masks, tl.load(kinds + t), rows, columns, i, j, tokens,
                         KEYS, BLOCK_Q, BLOCK_K, SEGMENTS, MASKED)  # fmt: skip
            p = tl.where(seen, tl.exp2(tl.where(seen, s - log_sum[:, None], 0.0)), 0.0)
            of_values += tl.dot(tl.trans(p).to(DOT), dout, input_precision=PRECISION)
            ds = p * (tl.dot(dout, tl.trans(values), input_precision=PRECISION) - shared[:, None]) * slope
            of_keys += tl.dot(tl.trans(ds).to(DOT), own, input_precision=PRECISION)
    _write(dk + of_group * D, of_keys * SCALE, columns, KEYS, GROUPS * D, D, BLOCK_D)
    _write(dv + of_group * E, of_values, columns, KEYS, GROUPS * E, E, BLOCK_E)
