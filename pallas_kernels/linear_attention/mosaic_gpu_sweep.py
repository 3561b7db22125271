"""One sweep of chunked linear attention over the tokens, as a Pallas Mosaic GPU kernel for Hopper.

Forward and backward pass of causal linear attention are four sweeps of one form, see `mosaic_gpu_plan`. A sweep reads
three arrays, row, column and value, and holds the state S = Σ_j P_j column_jᵀ value_j, (inner, outer); for each chunk
of 64 tokens

    out = ((row columnᵀ) ∘ P) value + (weight to the chunk's border) row S          S' = whole · S + columnᵀ (w value)

**Tiles.** Everything on chip is a tile of 64×64: tokens × channels, tokens × tokens, channels × channels. A warpgroup
owns 64 columns of `out` and the (inner, 64) columns of S, float32 accumulators in registers from the first chunk to the
last; S goes to shared memory once per chunk, as bf16, because it is the right operand of row·S. The second warpgroup of
a CTA has another tile of the head, another job, or another head. Warpgroups share nothing but the tiles that they read,
so no barrier stands between them; the scores are computed by each of them.
One more warpgroup issues the copies: boxes of 64 tokens × 64 channels straight out of (B, N, H, D), two or three chunks
ahead. The copy engine fills tokens beyond the arrays with zeros and does not store them; Mosaic's tiling of it wants
arrays of a multiple of 8 tokens, `ROWS`.

Sources: Lightning Attention-2 (arXiv:2401.04658) for the chunks; FlashAttention-3 (arXiv:2407.08608) for warpgroups
that specialise. Names and layouts of Mosaic GPU follow JAX's documentation and jax.experimental.pallas.ops.gpu.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import partition
from pallas_kernels.linear_attention.mosaic_gpu_plan import Job, Plan
from pallas_kernels.linear_attention.mosaic_gpu_tiles import (
    BY_COLUMN,
    BY_ROW,
    TILE,
    Transposed,
    by_column,
    by_row,
    iota,
    load,
    products,
    shared,
    zeros,
)

ROWS = 8  # tokens of a row group of the swizzle: arrays have a multiple of it
LOG2_E = math.log2(math.e)
FLOOR = -128.0  # exp of a log decay below it is 0
STATE_DTYPE = jnp.bfloat16  # of S as an operand and as kept


def sweep(plan: Plan, length: int, heads: int, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Runs one sweep; every array has B at axis 0.

    Args:
      plan: see `Plan`.
      length: N, at most that of the arrays, whose tokens from N on are zeros.
      heads: H.
      arrays: the token arrays that the jobs name, (B, N, H, ·) or (B, N, G, ·), bf16;
        "decay": (H,) log decays, or (B, H, T·64) base-2 log decays cumulated within each of the T chunks, float32;
        "scale": (1,) float32;
        "initial <out>": states before the first chunk visited, (B, H, inner, outer) float32.

    Returns:
      By name: each job's out (B, N, H, outer) in the dtype of the inputs;
      "final <out>": (B, H, inner, outer) float32;
      "kept <out>" of the first job: (B, H, X, inner, outer) bf16, the states at the borders in front of chunks 0, keep,
      2·keep, ..., and at place X - 1 that in front of the last chunk. In reverse places 0 and X - 1 are not written;
      "sums" of the first job: (B, H, outer/64 + 1, T·64) float32: Σ_j P_ij (row_i·column_j)(partner_i·value_j) of each
      token i. The last place of axis 2 holds the sum over the other tokens j of the chunk, the places before it, to be
      added up, that over the tokens before the chunk (behind it, in reverse). In reverse they hold the scale, too.
    """
    blocks = {name: arrays[name].shape[3] // TILE for name in plan.arrays}
    first = plan.jobs[0]
    batch, rows = arrays[first.column].shape[:2]
    inner, outer = (arrays[name].shape[3] for name in (first.column, first.value))
    chunks, dtype = -(-length // TILE), arrays[first.column].dtype
    wgs, tiles = plan.warpgroups, plan.tiles
    groups = outer // TILE // tiles

    names = list(plan.arrays)
    names += ["decay"] * (plan.decay is not None) + ["scale"] * plan.scaled
    names += [f"initial {job.out}" for job in plan.jobs if plan.initial]

    def struct(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return partition.struct(shape, dtype, *(arrays[name] for name in names))

    out_types: dict[str, jax.ShapeDtypeStruct] = {}
    for job in plan.jobs:
        if plan.outputs:
            # Of a tile that reaches beyond an array the interpreter stores nothing, the copy engine what fits.
            rows = chunks * TILE if plan.interpreted else rows
            out_types[job.out] = struct((batch, rows, heads, outer), dtype)
        if plan.final:
            out_types[f"final {job.out}"] = struct((batch, heads, inner, outer), jnp.float32)
    if plan.keep:
        borders = _borders(plan, chunks) + 1
        out_types[f"kept {first.out}"] = struct((batch, heads, borders, inner, outer), STATE_DTYPE)
    if plan.sums:
        out_types["sums"] = struct((batch, heads, outer // TILE + 1, chunks * TILE), jnp.float32)

    loaded = {name: blocks[name] if plan.whole(name) else tiles for name in plan.arrays}
    scratch = {name: shared(plan.stages, plan.heads, count, dtype=dtype) for name, count in loaded.items()}
    scratch["state"] = shared(wgs, inner // TILE, dtype=STATE_DTYPE)
    scratch["weighted"] = shared(wgs, dtype=dtype)
    if plan.outputs:
        scratch["out"] = shared(wgs, dtype=dtype)
    if plan.decay == "token":
        scratch["decay"] = plgpu.SMEM((plan.stages, plan.heads, TILE), jnp.float32)
    if plan.sums:
        scratch["sums"] = plgpu.SMEM((wgs, 2, TILE), jnp.float32)
    copies = plan.heads * (sum(loaded.values()) + (plan.decay == "token"))
    scratch["full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=plan.stages)
    scratch["free"] = plgpu.Barrier(num_arrivals=wgs, num_barriers=plan.stages)

    def body(*refs):
        gmem = dict(zip([*names, *out_types], refs, strict=False))
        smem = dict(zip(scratch, refs[len(gmem) :], strict=True))
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        # CTAs of one head are neighbours: what they all read comes from memory once.
        row, group = lax.div(cta, jnp.int32(groups)), lax.rem(cta, jnp.int32(groups))
        rows_of_batch = jnp.int32(heads // plan.heads)
        of_head = lax.rem(warpgroup, jnp.int32(tiles * plan.heads))  # warpgroups of one job: by head, then by tile
        own = lax.div(of_head, jnp.int32(tiles))
        first_head = lax.rem(row, rows_of_batch) * plan.heads
        place = _Place(
            batch=lax.div(row, rows_of_batch),
            first_head=first_head,
            head=first_head + own,
            own=own,
            group=group,
            warpgroup=warpgroup,
            tile=group * tiles + lax.rem(of_head, jnp.int32(tiles)),
            heads=heads,
            chunks=chunks,
            length=length,
        )

        for number, job in enumerate(plan.jobs):

            @pl.when(lax.div(warpgroup, jnp.int32(tiles * plan.heads)) == number)
            def _(job=job):
                plgpu.set_max_registers(240 if wgs == 2 else 248, action="increase")
                _compute(plan, place, gmem, smem, job, inner // TILE)

        @pl.when(warpgroup == wgs)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            _copy(plan, place, gmem, smem)

    outputs = plgpu.kernel(
        body,
        out_type=list(out_types.values()),
        scratch_types=list(scratch.values()),
        grid=(batch * heads // plan.heads * groups,),
        grid_names=("cta",),
        num_threads=wgs + 1,
        thread_name="warpgroup",
        # The layouts below are chosen by hand: "lane" semantics, which JAX 0.11 no longer has by default.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plan.interpret,
    )(*(arrays[name] for name in names))
    outputs = dict(zip(out_types, outputs, strict=True))
    for job in plan.jobs:
        if plan.outputs:
            outputs[job.out] = outputs[job.out][:, :length]
    return outputs


class _Place(NamedTuple):
    """Where a warpgroup stands in the grid, and the sizes that it must know.

    Attributes:
      batch: its sequence.
      first_head: of its CTA.
      head: its own.
      own: number of its head in the CTA.
      group: number of its CTA among those of the same heads.
      warpgroup: its number in the CTA.
      tile: its columns of the output.
      heads: H.
      chunks: of the sequence.
      length: N.
    """

    batch: jax.Array
    first_head: jax.Array
    head: jax.Array
    own: jax.Array
    group: jax.Array
    warpgroup: jax.Array
    tile: jax.Array
    heads: int
    chunks: int
    length: int

    def chunk(self, plan: Plan, step: jax.Array | int) -> jax.Array | int:
        """The chunk visited at `step`."""
        return self.chunks - 1 - step if plan.reverse else step


# ---- the warpgroup that copies


def _copy(plan: Plan, place: _Place, gmem: dict[str, Any], smem: dict[str, Any]) -> None:
    """Issues the copies of every chunk, as soon as its place in shared memory is free."""

    @pl.loop(0, place.chunks)
    def _(step):
        slot = lax.rem(step, jnp.int32(plan.stages))
        tokens = pl.ds(place.chunk(plan, step) * TILE, TILE)

        @pl.when(step >= plan.stages)
        def _():
            plgpu.barrier_wait(smem["free"].at[slot])

        for own in range(plan.heads):
            for name in plan.arrays:
                head = lax.div(place.first_head + own, jnp.int32(place.heads // gmem[name].shape[2]))
                for block in range(smem[name].shape[2]):
                    channel = block if plan.whole(name) else place.group * plan.tiles + block
                    source = gmem[name].at[place.batch, tokens, head, pl.ds(channel * TILE, TILE)]
                    plgpu.copy_gmem_to_smem(source, smem[name].at[slot, own, block], smem["full"].at[slot])
            if plan.decay == "token":
                source = gmem["decay"].at[place.batch, place.first_head + own, tokens]
                plgpu.copy_gmem_to_smem(source, smem["decay"].at[slot, own], smem["full"].at[slot])


# ---- the warpgroups that compute


def _compute(plan: Plan, place: _Place, gmem: dict[str, Any], smem: dict[str, Any], job: Job, blocks: int) -> None:
    """Walks over the chunks with the state of the job in registers: `blocks` tiles of (64, 64)."""

    def state_at(name: str, block: int):
        channels = pl.ds(place.tile * TILE, TILE)
        return gmem[f"{name} {job.out}"].at[place.batch, place.head, pl.ds(block * TILE, TILE), channels]

    states = [zeros(plan.interpreted)] * blocks
    if plan.initial:
        # The sum, because inside shard_map a loaded value alone has mesh axes in its type, which the loop would lose.
        given = [load(plan.interpreted, state_at("initial", block), optimized=False) for block in range(blocks)]
        states = [zero + x for zero, x in zip(states, given, strict=True)]
    scale = gmem["scale"][0] if plan.scaled else None

    def chunk(step, states):
        slot = lax.rem(step, jnp.int32(plan.stages))
        plgpu.barrier_wait(smem["full"].at[slot])
        weights = _weights(plan, place, gmem, smem, slot, place.chunk(plan, step))
        after = _chunk(plan, place, gmem, smem, job, slot, step, weights, scale, states)

        @pl.when(step + plan.stages < place.chunks)
        def _():
            plgpu.barrier_arrive(smem["free"].at[slot])

        return tuple(after)

    states = lax.fori_loop(0, place.chunks, chunk, tuple(states))
    if plan.final:
        for block in range(blocks):
            target = state_at("final", block)
            target[...] = states[block]
    plgpu.wait_smem_to_gmem(0)


class _Weights(NamedTuple):
    """Decays in a chunk; None where they are 1.

    Attributes:
      between: function that gives the (64, 64) between row i and column j, to be computed where they are used.
      border: (64,), between a token and the border of the chunk where S stands.
      value: (64,), between a token and the border where S' stands.
      whole: scalar, of the chunk.
    """

    between: Callable[[], jax.Array] | None = None
    border: jax.Array | None = None
    value: jax.Array | None = None
    whole: jax.Array | None = None


def _weights(plan: Plan, place: _Place, gmem, smem, slot, chunk) -> _Weights:
    """Every exponent is at most 0; a token's weight in itself, and the last one's up to the end, are exactly 1."""
    if plan.decay is None:
        return _Weights()
    if plan.decay == "head":
        g = jnp.maximum(gmem["decay"][place.head], FLOOR) * LOG2_E
        valid = jnp.minimum(place.length - chunk * TILE, TILE)
        token = iota(plan.interpreted, None)
        since_start = jnp.exp2((token + 1).astype(jnp.float32) * g)
        until_end = jnp.exp2(jnp.maximum(valid - 1 - token, 0).astype(jnp.float32) * g)
        whole = jnp.exp2(valid.astype(jnp.float32) * g)

        def between() -> jax.Array:
            later, earlier = (iota(plan.interpreted, axis) for axis in ((1, 0) if plan.reverse else (0, 1)))
            return jnp.exp2(jnp.maximum(later - earlier, 0).astype(jnp.float32) * g)

    else:
        total = smem["decay"].at[slot, place.own]
        rows = load(plan.interpreted, total, layout=BY_ROW)
        end = smem["decay"][slot, place.own, TILE - 1]
        since_start = jnp.exp2(rows)
        until_end = jnp.exp2(jnp.minimum(end - rows, 0.0))
        whole = jnp.exp2(end)

        def between() -> jax.Array:
            columns = load(plan.interpreted, total, layout=BY_COLUMN)
            difference = by_row(rows) - by_column(columns)
            return jnp.exp2(jnp.minimum(-difference if plan.reverse else difference, 0.0))

    if plan.reverse:
        return _Weights(between, until_end, since_start, whole)
    return _Weights(between, since_start, until_end, whole)


def _chunk(plan: Plan, place: _Place, gmem, smem, job: Job, slot, step, weights: _Weights, scale, states):
    """One chunk: writes its output, and returns the state (list of tiles) after it."""
    own = place.warpgroup
    blocks = range(len(states))
    column = [smem[job.column].at[slot, place.own, block] for block in blocks]
    tile = place.tile if plan.whole(job.value) else lax.rem(own, jnp.int32(plan.tiles))
    value = smem[job.value].at[slot, place.own, tile]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the last chunk stored still stands in the buffers below

    if plan.outputs:
        operand = smem["state"].at[own]
        for block in blocks:
            operand.at[block][...] = states[block].astype(STATE_DTYPE)
        plgpu.commit_smem()
        if plan.keep and job is plan.jobs[0]:
            _keep(plan, place, gmem, operand, job, step, len(states))
        row = [smem[job.row].at[slot, place.own, block] for block in blocks]
        scores, inter = products(
            plan.interpreted,
            (None, [(row[block], Transposed(column[block])) for block in blocks]),
            (None, [(row[block], operand.at[block]) for block in blocks]),
        )
        if weights.between is not None:
            scores = scores * weights.between()
        if scale is not None and plan.reverse:  # S holds the scale already
            scores = scores * scale
        i, j = iota(plan.interpreted, 0), iota(plan.interpreted, 1)
        scores = jnp.where(i <= j if plan.reverse else i >= j, scores, 0.0)
        summed = plan.sums and job is plan.jobs[0]
        if summed:
            _sum_inside(plan, place, gmem, smem, job, slot, step, scores)
        if weights.border is not None:
            inter = inter * by_row(weights.border)
        if summed:
            partner = load(plan.interpreted, smem[job.partner].at[slot, place.own, place.tile]).astype(jnp.float32)
            _write_sums(plan, place, gmem, smem, 0, place.tile, step, jnp.sum(inter * partner, axis=1))
        (out,) = products(plan.interpreted, (inter, [(scores.astype(value.dtype), value)]))
        if scale is not None and not plan.reverse:
            out = out * scale
        smem["out"].at[own][...] = out.astype(value.dtype)
        plgpu.commit_smem()
        tokens = pl.ds(place.chunk(plan, step) * TILE, TILE)
        target = gmem[job.out].at[place.batch, tokens, place.head, pl.ds(place.tile * TILE, TILE)]
        plgpu.copy_smem_to_gmem(smem["out"].at[own], target)

    weight = weights.value
    if scale is not None and plan.reverse:
        weight = scale if weight is None else weight * scale
    if weight is not None:
        weighted = load(plan.interpreted, value).astype(jnp.float32) * (weight if weight is scale else by_row(weight))
        smem["weighted"].at[own][...] = weighted.astype(value.dtype)
        plgpu.commit_smem()
        value = smem["weighted"].at[own]
    if weights.whole is not None:
        states = [state * weights.whole for state in states]
    return products(plan.interpreted, *((states[block], [(Transposed(column[block]), value)]) for block in blocks))


def _borders(plan: Plan, chunks: int) -> int:
    """Number of borders in front of chunks 0, keep, 2·keep, ..."""
    return -(-chunks // plan.keep)


def _keep(plan: Plan, place: _Place, gmem, operand, job: Job, step, blocks: int) -> None:
    """Stores the state in front of the chunk (behind it, in reverse) if it is one of those to keep."""
    border = place.chunk(plan, step) + int(plan.reverse)

    def store(at):
        for block in range(blocks):
            target = gmem[f"kept {job.out}"].at[
                place.batch, place.head, at, pl.ds(block * TILE, TILE), pl.ds(place.tile * TILE, TILE)
            ]
            plgpu.copy_smem_to_gmem(operand.at[block], target)

    @pl.when((lax.rem(border, jnp.int32(plan.keep)) == 0) & (border < place.chunks))
    def _():
        store(lax.div(border, jnp.int32(plan.keep)))

    if not plan.reverse:

        @pl.when(border == place.chunks - 1)
        def _():
            store(_borders(plan, place.chunks))


def _sum_inside(plan: Plan, place: _Place, gmem, smem, job: Job, slot, step, scores) -> None:
    """Sums of the weighted scores times partner_i·value_j in a chunk; the warpgroup of the first tile writes them."""

    @pl.when(place.tile == 0)
    def _():
        partner, value = (smem[name].at[slot, place.own] for name in (job.partner, job.value))
        pairs = [(partner.at[b], Transposed(value.at[b])) for b in range(smem[job.partner].shape[2])]
        (other,) = products(plan.interpreted, (None, pairs))
        others = iota(plan.interpreted, 0) != iota(plan.interpreted, 1)
        sums = jnp.sum(jnp.where(others, scores * other, 0.0), axis=1)
        _write_sums(plan, place, gmem, smem, 1, gmem["sums"].shape[2] - 1, step, sums)


def _write_sums(plan: Plan, place: _Place, gmem, smem, buffer: int, where, step, sums) -> None:
    """Stores one number per token of the chunk at place `where` of "sums"."""
    staged = smem["sums"].at[place.warpgroup, buffer]
    staged[...] = sums
    plgpu.commit_smem()
    tokens = pl.ds(place.chunk(plan, step) * TILE, TILE)
    plgpu.copy_smem_to_gmem(staged, gmem["sums"].at[place.batch, place.head, where, tokens])
