"""Triton kernels of linear attention; `op.py` calls them, and its docstring tells the plan.

Arrays are contiguous, (B, N, H, D) and (B, H, ..., D, E) for states. A program walks over chunks of `CHUNK` tokens. It
never reads beyond the last token: what is masked reads as 0. Shapes stand behind the tiles: c tokens of a chunk.
`DOT` is the dtype of the operands of products, bfloat16 or float32; every sum is float32.

A pointer that a call does not use points at some other array; the flag that belongs to it says so.
"""

import triton
import triton.language as tl

LEAST = -128.0  # exp of it is 0 in float32; `arguments.decay_floor`
EPSILON = 1e-12  # `recurrence.EPSILON`

_LEAST = tl.constexpr(LEAST)
_EPSILON = tl.constexpr(EPSILON)


@triton.jit
def _rows(base, stride, count, columns, width, CHUNK: tl.constexpr, DOT: tl.constexpr):
    """(c, columns) of an array whose rows are `stride` apart; rows past `count` and columns past `width` are 0."""
    row = tl.arange(0, CHUNK)
    mask = (row < count)[:, None] & (columns < width)[None, :]
    return tl.load(base + row[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit
def _scalars(base, stride, count, CHUNK: tl.constexpr):
    """(c,) numbers in float32, `stride` apart; 0 from `count` on."""
    row = tl.arange(0, CHUNK)
    return tl.load(base + row * stride, mask=row < count, other=0.0).to(tl.float32)


@triton.jit
def _weights(g, stride, count, DECAY: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr):
    """Weights of the tokens of a chunk; no exponent is positive.

    `DECAY` is 0 for none, 1 for one log decay at `g`, 2 for one per token. With `STEP` above 0 the log decays are
    cumulated in two parts, multiples of STEP whose sums are all exact, and rests below STEP: see xla.py.

    Returns:
      exp(G_i - G_j) for i ≥ j, else 0, (c, c); exp(G_i), (c,); exp(G_end - G_j), (c,); exp(G_end).
    """
    row = tl.arange(0, CHUNK)
    reads = row[:, None] >= row[None, :]
    if DECAY == 0:
        between = tl.where(reads, 1.0, 0.0)
        since = tl.full((CHUNK,), 1.0, tl.float32)
        until = since
        whole = 1.0
    elif DECAY == 1:
        rate = tl.maximum(tl.load(g).to(tl.float32), _LEAST)
        apart = tl.maximum(row[:, None] - row[None, :], 0)
        between = tl.where(reads, tl.exp(apart.to(tl.float32) * rate), 0.0)
        since = tl.exp((row + 1).to(tl.float32) * rate)
        until = tl.exp(tl.maximum(count - 1 - row, 0).to(tl.float32) * rate)
        whole = tl.exp(count * rate)
    else:
        rate = tl.maximum(_scalars(g, stride, count, CHUNK), _LEAST)
        last = row == CHUNK - 1
        if STEP > 0:
            steps = tl.ceil(rate * (1 / STEP)) * STEP
            total = tl.cumsum(steps, 0)
            rest = tl.cumsum(rate - steps, 0)
            # One entry of the same sums, not a sum of its own: the last token's weight at the end is exactly 1.
            end = tl.sum(tl.where(last, total, 0.0), 0)
            end_rest = tl.sum(tl.where(last, rest, 0.0), 0)
            exponent = (total[:, None] - total[None, :]) + (rest[:, None] - rest[None, :])
            since = tl.exp(tl.minimum(total + rest, 0.0))
            until = tl.exp(tl.minimum((end - total) + (end_rest - rest), 0.0))
            whole = tl.exp(tl.minimum(end + end_rest, 0.0))
        else:
            total = tl.cumsum(rate, 0)
            end = tl.sum(tl.where(last, total, 0.0), 0)
            exponent = total[:, None] - total[None, :]
            since = tl.exp(tl.minimum(total, 0.0))
            until = tl.exp(tl.minimum(end - total, 0.0))
            whole = tl.exp(tl.minimum(end, 0.0))
        between = tl.where(reads, tl.exp(tl.minimum(exponent, 0.0)), 0.0)
    return between, since, until, whole


@triton.jit
def _inverse(den):
    """1 / (den + sign(den) ε), and 0 where den is 0."""
    safe = den + tl.where(den < 0, -_EPSILON, _EPSILON)
    return tl.where(den == 0, 0.0, 1 / tl.where(den == 0, 1.0, safe))


@triton.jit
def sweep(
    a, b, c, g, scale, inv, dden, first, first_z, tokens,
    y, den, kept, kept_z, last, last_z,
    HEADS: tl.constexpr, A_HEADS: tl.constexpr, B_HEADS: tl.constexpr, C_HEADS: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, BLOCK_IN: tl.constexpr, TILE: tl.constexpr,
    CHUNK: tl.constexpr, SPLIT: tl.constexpr, EVERY: tl.constexpr,
    DECAY: tl.constexpr, STEP: tl.constexpr, REVERSE: tl.constexpr,
    SCALE: tl.constexpr, NORMALIZE: tl.constexpr, FIRST: tl.constexpr,
    OUTPUT: tl.constexpr, KEEP: tl.constexpr, LAST: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Linear attention of one (batch, head, split, tile of OUT) per program: y_i = Σ_j P_ij (a_i·b_j) c_j + w_i a_i S.

    Forward (a, b, c = q, k, v; y the outputs, S the state). Reverse (k, q, dy; y is dv, S the cotangent of the state):
    the weights are transposed, scale and `inv` (1/den of each query) act on b, and z is summed with `dden`.

    Args:
      a: (B, N, A_HEADS, IN); b: (B, N, B_HEADS, IN); c: (B, N, C_HEADS, OUT).
      g: log decays, (HEADS,) or (B, N, HEADS).
      scale: (1,). inv, dden: (B, N, HEADS), read when REVERSE and NORMALIZE.
      first: S before the first chunk of a split in walking order, (B, HEADS, splits, IN, OUT). first_z: without OUT.
      tokens: N.
      y: (B, N, HEADS, OUT). den: (B, N, HEADS), forward and NORMALIZE.
      kept: S before each EVERY-th chunk, (B, HEADS, blocks, IN, OUT). kept_z: without OUT.
      last: S after the last chunk of a split, (B, HEADS, splits, IN, OUT). last_z: without OUT.
    """
    tiles: tl.constexpr = (OUT + TILE - 1) // TILE
    chunks = tl.cdiv(tokens, CHUNK)
    splits = tl.cdiv(chunks, SPLIT)
    program = tl.program_id(0)
    tile = program % tiles
    stream = program // tiles  # (batch, head, split), the split fastest
    split = stream % splits
    head = (stream // splits) % HEADS
    batch = (stream // splits // HEADS).to(tl.int64)
    begin = split * SPLIT
    count = tl.minimum(SPLIT, chunks - begin)
    inside = tl.arange(0, BLOCK_IN)
    outside = tile * TILE + tl.arange(0, TILE)
    row = tl.arange(0, CHUNK)

    a += (batch * tokens * A_HEADS + head // (HEADS // A_HEADS)) * IN
    b += (batch * tokens * B_HEADS + head // (HEADS // B_HEADS)) * IN
    c += (batch * tokens * C_HEADS + head // (HEADS // C_HEADS)) * OUT
    y += (batch * tokens * HEADS + head) * OUT
    per_token = batch * tokens * HEADS + head
    g += head if DECAY == 1 else per_token
    state_mask = (inside < IN)[:, None] & (outside < OUT)[None, :]
    place = inside[:, None] * OUT + outside[None, :]
    blocks = tl.cdiv(chunks, EVERY)
    owner = (batch * HEADS + head).to(tl.int64)
    own_sums = tl.where(tile == 0, IN, 0)  # every tile sums z, the first one writes it
    factor = 1.0
    if SCALE:
        factor = tl.load(scale)

    state = tl.zeros((BLOCK_IN, TILE), tl.float32)  # (IN, tile of OUT)
    z = tl.zeros((BLOCK_IN,), tl.float32)
    if FIRST:
        state = tl.load(first + (owner * splits + split) * IN * OUT + place, mask=state_mask, other=0.0)
        if NORMALIZE:
            z = tl.load(first_z + (owner * splits + split) * IN + inside, mask=inside < IN, other=0.0)

    for t in range(count):
        chunk = begin + t
        if REVERSE:
            chunk = begin + count - 1 - t
        start = (chunk * CHUNK).to(tl.int64)
        size = tl.minimum(tokens - chunk * CHUNK, CHUNK)
        if KEEP and chunk % EVERY == 0:
            block = owner * blocks + chunk // EVERY
            tl.store(kept + block * IN * OUT + place, state.to(kept.dtype.element_ty), mask=state_mask)
            if NORMALIZE:
                tl.store(kept_z + block * IN + inside, z, mask=inside < own_sums)
        g_stride = HEADS if DECAY == 2 else 0
        between, since, until, whole = _weights(g + start * g_stride, HEADS, size, DECAY, STEP, CHUNK)
        b_tile = _rows(b + start * B_HEADS * IN, B_HEADS * IN, size, inside, IN, CHUNK, DOT)  # (c, IN)
        c_tile = _rows(c + start * C_HEADS * OUT, C_HEADS * OUT, size, outside, OUT, CHUNK, DOT)  # (c, tile)
        if REVERSE:
            reads = until
            writes = since * factor
            z_writes = writes
            column = tl.full((CHUNK,), 1.0, tl.float32) * factor
            if NORMALIZE:
                inverse = _scalars(inv + per_token + start * HEADS, HEADS, size, CHUNK)
                z_writes = writes * _scalars(dden + per_token + start * HEADS, HEADS, size, CHUNK)
                writes = writes * inverse
                column = column * inverse
        else:
            reads = since * factor
            writes = until
            z_writes = writes
        if OUTPUT:
            a_tile = _rows(a + start * A_HEADS * IN, A_HEADS * IN, size, inside, IN, CHUNK, DOT)  # (c, IN)
            scores = tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION)  # (c, c)
            if REVERSE:
                scores = scores * tl.trans(between) * column[None, :]
            else:
                scores = scores * (between * factor)
            rounded = scores.to(DOT)
            out = tl.dot(a_tile, state.to(DOT), input_precision=PRECISION) * reads[:, None]  # (c, tile)
            out = tl.dot(rounded, c_tile, acc=out, input_precision=PRECISION)
            if NORMALIZE and not REVERSE:
                # Of the rounded scores, so that a row remains an average of values.
                divisor = tl.sum(rounded.to(tl.float32), 1)
                divisor += reads * tl.sum(a_tile.to(tl.float32) * z[None, :], 1)
                out = out * _inverse(divisor)[:, None]
                if KEEP:
                    mask = row < tl.where(tile == 0, size, 0)
                    tl.store(den + per_token + (start + row) * HEADS, divisor, mask=mask)
            mask = (row < size)[:, None] & (outside < OUT)[None, :]
            target = y + start * HEADS * OUT + row[:, None] * (HEADS * OUT) + outside[None, :]
            tl.store(target, out.to(y.dtype.element_ty), mask=mask)
        weighted = c_tile
        if DECAY > 0 or REVERSE:
            weighted = (c_tile.to(tl.float32) * writes[:, None]).to(DOT)
        state = tl.dot(tl.trans(b_tile), weighted, acc=state * whole, input_precision=PRECISION)
        if NORMALIZE:
            z = z * whole + tl.sum(b_tile.to(tl.float32) * z_writes[:, None], 0)

    if LAST:
        tl.store(last + (owner * splits + split) * IN * OUT + place, state, mask=state_mask)
        if NORMALIZE:
            tl.store(last_z + (owner * splits + split) * IN + inside, z, mask=inside < own_sums)


@triton.jit
def backward(
    q, k, v, dy, g, scale, inv, dden, kept, kept_z, first, first_z, tokens,
    dq, dk, dv, dg, dscale, last, last_z, scratch, scratch_z,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    TILE: tl.constexpr, BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr, SPLIT: tl.constexpr, EVERY: tl.constexpr,
    DECAY: tl.constexpr, STEP: tl.constexpr,
    SCALE: tl.constexpr, NORMALIZE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    VALUES: tl.constexpr, DECAY_GRADIENT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one (batch, head, split, tile of D) per program: blocks of EVERY chunks from the last to the first.

    For each block the states before its chunks are rebuilt from the kept one into `scratch`, which is small enough to
    stay in the second-level cache; then its chunks follow in reverse with the cotangent dS in registers.

    Args:
      q: (B, N, HEADS, D); k: (B, N, KV_HEADS, D); v: (B, N, KV_HEADS, E); dy: (B, N, HEADS, E).
      g: log decays, (HEADS,) or (B, N, HEADS). scale: (1,).
      inv, dden: 1/den and the cotangent of den, (B, N, HEADS).
      kept: state before each EVERY-th chunk, (B, HEADS, blocks, D, E). kept_z: (B, HEADS, blocks, D).
      first: cotangent of the state after each split, (B, HEADS, splits, D, E). first_z: without E.
      tokens: N.
      dq, dk: (B, N, HEADS, D). dv: (B, N, HEADS, E), when VALUES, which needs the whole of D in a tile.
      dg: parts that sum to the gradient, (tiles, B, N, HEADS) per token, (tiles, B, HEADS, chunks) constant.
      dscale: parts that sum to the gradient, (programs,).
      last: cotangent of the state before each split, (B, HEADS, splits, D, E). last_z: without E.
      scratch: (programs, EVERY, TILE, BLOCK_E) in DOT. scratch_z: (programs, EVERY, TILE).
    """
    tiles: tl.constexpr = (D + TILE - 1) // TILE
    chunks = tl.cdiv(tokens, CHUNK)
    splits = tl.cdiv(chunks, SPLIT)
    program = tl.program_id(0)
    tile = program % tiles
    stream = program // tiles
    split = stream % splits
    head = (stream // splits) % HEADS
    batch = (stream // splits // HEADS).to(tl.int64)
    begin = split * SPLIT
    count = tl.minimum(SPLIT, chunks - begin)
    keys = tile * TILE + tl.arange(0, TILE)
    values = tl.arange(0, BLOCK_E)
    row = tl.arange(0, CHUNK)

    kv_head = head // (HEADS // KV_HEADS)
    q += (batch * tokens * HEADS + head) * D
    k += (batch * tokens * KV_HEADS + kv_head) * D
    v += (batch * tokens * KV_HEADS + kv_head) * E
    dy += (batch * tokens * HEADS + head) * E
    dq += (batch * tokens * HEADS + head) * D
    dk += (batch * tokens * HEADS + head) * D
    dv += (batch * tokens * HEADS + head) * E
    per_token = batch * tokens * HEADS + head
    g += head if DECAY == 1 else per_token
    g_stride = HEADS if DECAY == 2 else 0
    state_mask = (keys < D)[:, None] & (values < E)[None, :]
    place = keys[:, None] * E + values[None, :]
    blocks = tl.cdiv(chunks, EVERY)
    owner = (batch * HEADS + head).to(tl.int64)
    scratch += program.to(tl.int64) * EVERY * TILE * BLOCK_E
    scratch_z += program.to(tl.int64) * EVERY * TILE
    spot = tl.arange(0, TILE)[:, None] * BLOCK_E + values[None, :]
    factor = 1.0
    if SCALE:
        factor = tl.load(scale)

    dstate = tl.zeros((TILE, BLOCK_E), tl.float32)  # (tile of D, E)
    dz = tl.zeros((TILE,), tl.float32)
    dscales = tl.zeros((CHUNK,), tl.float32)
    if FIRST:
        dstate = tl.load(first + (owner * splits + split) * D * E + place, mask=state_mask, other=0.0)
        if NORMALIZE:
            dz = tl.load(first_z + (owner * splits + split) * D + keys, mask=keys < D, other=0.0)

    own_blocks = tl.cdiv(count, EVERY)
    for step in range(own_blocks):
        block = begin // EVERY + own_blocks - 1 - step
        first_chunk = block * EVERY
        length = tl.minimum(EVERY, begin + count - first_chunk)
        source = owner * blocks + block
        state = tl.load(kept + source * D * E + place, mask=state_mask, other=0.0).to(tl.float32)
        z = tl.zeros((TILE,), tl.float32)
        if NORMALIZE:
            z = tl.load(kept_z + source * D + keys, mask=keys < D, other=0.0)
        tl.store(scratch + spot, state.to(DOT))
        if NORMALIZE:
            tl.store(scratch_z + tl.arange(0, TILE), z)
        for t in range(length - 1):  # full chunks: the last of a sequence is the last of its block
            start = ((first_chunk + t) * CHUNK).to(tl.int64)
            _, _, until, whole = _weights(g + start * g_stride, HEADS, CHUNK, DECAY, STEP, CHUNK)
            k_tile = _rows(k + start * KV_HEADS * D, KV_HEADS * D, CHUNK, keys, D, CHUNK, DOT)
            v_tile = _rows(v + start * KV_HEADS * E, KV_HEADS * E, CHUNK, values, E, CHUNK, DOT)
            weighted = k_tile
            if DECAY > 0:
                weighted = (k_tile.to(tl.float32) * until[:, None]).to(DOT)  # (c, tile)
            state = tl.dot(tl.trans(weighted), v_tile, acc=state * whole, input_precision=PRECISION)
            tl.store(scratch + (t + 1) * TILE * BLOCK_E + spot, state.to(DOT))
            if NORMALIZE:
                z = z * whole + tl.sum(k_tile.to(tl.float32) * until[:, None], 0)
                tl.store(scratch_z + (t + 1) * TILE + tl.arange(0, TILE), z)
        tl.debug_barrier()  # what one thread has written another one reads

        for u in range(length):
            t = length - 1 - u
            chunk = first_chunk + t
            start = (chunk * CHUNK).to(tl.int64)
            size = tl.minimum(tokens - chunk * CHUNK, CHUNK)
            between, since, until, whole = _weights(g + start * g_stride, HEADS, size, DECAY, STEP, CHUNK)
            before = tl.load(scratch + t * TILE * BLOCK_E + spot)  # (tile, E), the state before the chunk
            if DECAY_GRADIENT:
                through = tl.sum(tl.sum(before.to(tl.float32) * dstate, 1), 0)
            q_tile = _rows(q + start * HEADS * D, HEADS * D, size, keys, D, CHUNK, DOT)  # (c, tile)
            k_tile = _rows(k + start * KV_HEADS * D, KV_HEADS * D, size, keys, D, CHUNK, DOT)  # (c, tile)
            v_tile = _rows(v + start * KV_HEADS * E, KV_HEADS * E, size, values, E, CHUNK, DOT)  # (c, E)
            dy_tile = _rows(dy + start * HEADS * E, HEADS * E, size, values, E, CHUNK, DOT)  # (c, E)
            inverse = tl.full((CHUNK,), 1.0, tl.float32)
            if NORMALIZE:
                inverse = _scalars(inv + per_token + start * HEADS, HEADS, size, CHUNK)
                ones = _scalars(dden + per_token + start * HEADS, HEADS, size, CHUNK)
                before_z = tl.load(scratch_z + t * TILE + tl.arange(0, TILE))
                if DECAY_GRADIENT:
                    through += tl.sum(before_z * dz, 0)

            if VALUES or DECAY_GRADIENT:
                scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # (c, c), a part when D is tiled
            dscores = tl.dot(dy_tile, tl.trans(v_tile), input_precision=PRECISION)  # (c, c), dA_ij = dy_i·v_j
            dscores = dscores * inverse[:, None]
            if NORMALIZE:
                dscores += ones[:, None]
            dscores = dscores * between
            rounded = dscores.to(DOT)
            if DECAY_GRADIENT:
                pairs = scores * dscores * factor  # L_ij of the derivation
                if DECAY == 1:
                    apart = tl.maximum(row[:, None] - row[None, :], 0).to(tl.float32)
                    part = tl.sum(pairs * apart, 1)
                else:
                    below = row[:, None] > row[None, :]
                    after = tl.where(row[:, None] < row[None, :], 1.0, 0.0).to(DOT)  # row t sums the rows i > t
                    pairs = tl.where(below, pairs, 0.0)
                    sums = tl.dot(after, pairs.to(DOT), acc=pairs, input_precision=PRECISION)  # and row t itself
                    part = tl.sum(tl.where(below, sums, 0.0), 1)

            old = dstate.to(DOT)
            if VALUES:
                # dv_j = Σ_i P_ij (scale q_i·k_j) dy_i + exp(G_end - G_j) dSᵀ k_j
                weighted = (scores * between * (factor * inverse)[:, None]).to(DOT)
                dv_tile = tl.dot(k_tile, old, input_precision=PRECISION) * until[:, None]  # (c, E)
                dv_tile = tl.dot(tl.trans(weighted), dy_tile, acc=dv_tile, input_precision=PRECISION)
                mask = (row < size)[:, None] & (values < E)[None, :]
                target = start * HEADS * E + row[:, None] * (HEADS * E) + values[None, :]
                tl.store(dv + target, dv_tile.to(dv.dtype.element_ty), mask=mask)

            # dk_j = Σ_i P_ij dA_ij scale q_i + exp(G_end - G_j) dS v_j
            mask = (row < size)[:, None] & (keys < D)[None, :]
            target = start * HEADS * D + row[:, None] * (HEADS * D) + keys[None, :]
            inter = tl.dot(v_tile, tl.trans(old), input_precision=PRECISION)  # (c, tile)
            if NORMALIZE:
                inter += dz[None, :]
            inter = inter * until[:, None]
            if DECAY_GRADIENT:
                to_state = tl.sum(k_tile.to(tl.float32) * inter, 1)  # b_j of the derivation
            scaled = rounded
            if SCALE:
                scaled = (dscores * factor).to(DOT)
            dk_tile = tl.dot(tl.trans(scaled), q_tile, acc=inter, input_precision=PRECISION)
            tl.store(dk + target, dk_tile.to(dk.dtype.element_ty), mask=mask)

            # dq_i = scale (Σ_j P_ij dA_ij k_j + exp(G_i) S dy_i)
            inter = tl.dot(dy_tile, tl.trans(before), input_precision=PRECISION) * (since * inverse)[:, None]
            if NORMALIZE:
                inter += (since * ones)[:, None] * before_z[None, :]
            if DECAY_GRADIENT:
                from_state = tl.sum(q_tile.to(tl.float32) * inter, 1) * factor  # a_i of the derivation
            dq_tile = tl.dot(rounded, k_tile, acc=inter, input_precision=PRECISION)  # (c, tile), before scaling
            if SCALE:
                dscales += tl.sum(q_tile.to(tl.float32) * dq_tile, 1)
            tl.store(dq + target, (dq_tile * factor).to(dq.dtype.element_ty), mask=mask)

            if DECAY_GRADIENT:
                # dg_t = Σ_{i≥t>j} L_ij + Σ_{i≥t} a_i + Σ_{j<t} b_j + exp(G_end) <S, dS>
                if DECAY == 1:
                    part += from_state * (row + 1).to(tl.float32)
                    part += to_state * tl.maximum(size - 1 - row, 0).to(tl.float32)
                    streams = tl.num_programs(0) // (tiles * splits)
                    target = dg + (tile * streams + owner) * chunks + chunk
                    tl.store(target, tl.sum(part, 0) + through * whole * size)
                else:
                    part += tl.sum(tl.where(below, to_state[None, :], from_state[None, :]), 1) + through * whole
                    streams = tl.num_programs(0) // (tiles * splits * HEADS)
                    target = dg + (tile * streams + batch) * tokens * HEADS + head
                    tl.store(target + (start + row) * HEADS, part, mask=row < size)

            weighted = q_tile
            if DECAY > 0 or SCALE or NORMALIZE:
                weighted = (q_tile.to(tl.float32) * (since * inverse * factor)[:, None]).to(DOT)  # (c, tile)
            dstate = tl.dot(tl.trans(weighted), dy_tile, acc=dstate * whole, input_precision=PRECISION)
            if NORMALIZE:
                dz = dz * whole + tl.sum(q_tile.to(tl.float32) * (since * ones * factor)[:, None], 0)
        tl.debug_barrier()  # all have read before the next block overwrites

    if SCALE:
        tl.store(dscale + program, tl.sum(dscales, 0))
    if LAST:
        tl.store(last + (owner * splits + split) * D * E + place, dstate, mask=state_mask)
        if NORMALIZE:
            tl.store(last_z + (owner * splits + split) * D + keys, dz, mask=keys < D)


@triton.jit
def read(
    a, state, z, scale, weight, extra, tokens, y, den,
    HEADS: tl.constexpr, A_HEADS: tl.constexpr, STATE_HEADS: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, BLOCK_IN: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    SCALE: tl.constexpr, DIVIDE: tl.constexpr, WEIGHT: tl.constexpr, EXTRA: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens that all read one state (non-causal): y_i = scale (weight_i a_i S + extra_i z), c of them per program.

    Args:
      a: (B, N, A_HEADS, IN).
      state: (B, STATE_HEADS, IN, OUT).
      z: (B, STATE_HEADS, IN), the divisor is a_i·z, when DIVIDE; (B, STATE_HEADS, OUT) when EXTRA.
      scale: (1,).
      weight: (B, N, HEADS), when WEIGHT.
      extra: (B, N, HEADS), when EXTRA is 2; EXTRA 1 is for ones.
      tokens: N.
      y: (B, N, HEADS, OUT). den: (B, N, HEADS), when DIVIDE.
    """
    tiles: tl.constexpr = (OUT + TILE - 1) // TILE
    chunks = tl.cdiv(tokens, CHUNK)
    program = tl.program_id(0)
    tile = program % tiles
    chunk = (program // tiles) % chunks
    head = (program // tiles // chunks) % HEADS
    batch = (program // tiles // chunks // HEADS).to(tl.int64)
    inside = tl.arange(0, BLOCK_IN)
    outside = tile * TILE + tl.arange(0, TILE)
    row = tl.arange(0, CHUNK)
    start = (chunk * CHUNK).to(tl.int64)
    size = tl.minimum(tokens - chunk * CHUNK, CHUNK)
    owner = batch * STATE_HEADS + head // (HEADS // STATE_HEADS)
    per_token = (batch * tokens + start) * HEADS + head

    a += ((batch * tokens + start) * A_HEADS + head // (HEADS // A_HEADS)) * IN
    a_tile = _rows(a, A_HEADS * IN, size, inside, IN, CHUNK, DOT)  # (c, IN)
    mask = (inside < IN)[:, None] & (outside < OUT)[None, :]
    s_tile = tl.load(state + owner * IN * OUT + inside[:, None] * OUT + outside[None, :], mask=mask, other=0.0)
    out = tl.dot(a_tile, s_tile.to(DOT), input_precision=PRECISION)  # (c, tile)
    if WEIGHT:
        out = out * _scalars(weight + per_token, HEADS, size, CHUNK)[:, None]
    if EXTRA > 0:
        z_tile = tl.load(z + owner * OUT + outside, mask=outside < OUT, other=0.0)
        if EXTRA == 2:
            out += _scalars(extra + per_token, HEADS, size, CHUNK)[:, None] * z_tile[None, :]
        else:
            out += z_tile[None, :]
    if SCALE:
        out = out * tl.load(scale)
    if DIVIDE:
        z_tile = tl.load(z + owner * IN + inside, mask=inside < IN, other=0.0)
        divisor = tl.sum(a_tile.to(tl.float32) * z_tile[None, :], 1)
        if SCALE:
            divisor = divisor * tl.load(scale)
        out = out * _inverse(divisor)[:, None]
        tl.store(den + per_token + row * HEADS, divisor, mask=row < tl.where(tile == 0, size, 0))
    mask = (row < size)[:, None] & (outside < OUT)[None, :]
    y += per_token * OUT
    tl.store(y + row[:, None] * (HEADS * OUT) + outside[None, :], out.to(y.dtype.element_ty), mask=mask)
