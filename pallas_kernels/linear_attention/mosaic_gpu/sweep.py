"""Sweeps of chunked linear attention over the tokens, as a Pallas Mosaic GPU kernel for Hopper.

Forward and backward pass of causal linear attention are four sweeps of one form, see `plan`. A sweep reads
three arrays, row, column and value, and holds the state S = Σ_j P_j column_jᵀ value_j, (inner, outer); for each chunk
of 64 tokens

    out = ((row columnᵀ) ∘ P) value + (weight to the chunk's border) row S          S' = whole · S + columnᵀ (w value)

**Tiles.** Everything on chip is a tile of 64×64: tokens × channels, tokens × tokens, channels × channels. A warpgroup
owns 64 columns of `out` and the (inner, 64) columns of S, float32 accumulators in registers from the first chunk to the
last; S goes to shared memory once per chunk, as bf16, because it is the right operand of row·S. The second warpgroup of
a CTA has another tile of the head, another job, or another head. Warpgroups share nothing but the tiles that they read,
so no barrier stands between them; the scores are computed by each of them. Once S is read, the output and the weighted
values of the chunk stand in its tiles: that leaves room for two stages of tokens at 256 channels.
One more warpgroup issues the copies: boxes of 64 tokens × 64 channels straight out of (B, N, H, D), two or three chunks
ahead. The copy engine fills tokens beyond the arrays with zeros and does not store them; Mosaic's tiling of it wants
arrays of a multiple of 8 tokens, `ROWS`.

**Launches.** A launch makes one sweep or several side by side, each in CTAs of its own. Those of one head are
neighbours in the grid: what more than one of them reads in the same order comes from memory once.

Sources: Lightning Attention-2 (arXiv:2401.04658) for the chunks; FlashAttention-3 (arXiv:2407.08608) for warpgroups
that specialise. Names and layouts of Mosaic GPU follow JAX's documentation and jax.experimental.pallas.ops.gpu.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import partition
from pallas_kernels.linear_attention.mosaic_gpu.decay import Weights, per_head, per_token
from pallas_kernels.linear_attention.mosaic_gpu.plan import OUT, WEIGHTED, Job, Plan, borders, vectors
from pallas_kernels.linear_attention.mosaic_gpu.tiles import (
    BY_COLUMN,
    BY_ROW,
    TILE,
    Transposed,
    by_column,
    by_row,
    iota,
    launch,
    load,
    products,
    shared,
    zeros,
)

ROWS = 8  # tokens of a row group of the swizzle: arrays have a multiple of it
STATE_DTYPE = jnp.bfloat16  # of S as an operand and as kept


def sweep(plans: Sequence[Plan], length: int, heads: int, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Makes the sweeps of one launch; every array has B at axis 0.

    Args:
      plans: see `Plan`; all with the same decay and interpreter.
      length: N, at most that of the arrays, whose tokens from N on are zeros.
      heads: H.
      arrays: the token arrays that the jobs name, (B, N, H, ·) or (B, N, G, ·), bf16;
        "decay": (H,) log decays, or (B, H, T·64) base-2 log decays cumulated within each of the T chunks, float32;
        "scale": (1,) float32;
        "initial <out>": states before the first chunk visited, (B, H, inner, outer) float32.

    Returns:
      By name: each job's out (B, N, H, outer) in the dtype of the inputs;
      "final <out>": (B, H, inner, outer) float32;
      "kept <out>" of a plan's first job: (B, H, X, inner, outer) bf16, the states at the borders in front of chunks 0,
      keep, 2·keep, ..., and at place X - 1 that in front of the last chunk. In reverse places 0 and X - 1 are not
      written;
      "sums <out>" of a plan's first job: (B, H, 2, outer/64, T·64) float32, for each token i shares, one per tile of
      channels, of Σ_j P_ij (row_i·column_j)(partner_i·value_j). Place 0 of axis 2 is about the tokens j before the
      chunk (behind it, in reverse), place 1 about the other tokens of the chunk. In reverse they hold the scale, too.
    """
    common = plans[0]
    wgs, chunks = max(plan.warpgroups for plan in plans), -(-length // TILE)
    column = arrays[common.jobs[0].column]
    batch, rows, dtype = column.shape[0], column.shape[1], column.dtype
    # A tile that reaches beyond an array the interpreter does not store, the copy engine stores what fits.
    rows = chunks * TILE if common.interpreted else rows

    names = list(dict.fromkeys(name for plan in plans for name in plan.arrays))
    names += ["decay"] * (common.decay is not None) + ["scale"] * any(plan.scaled for plan in plans)
    names += [f"initial {job.out}" for plan in plans if plan.initial for job in plan.jobs]

    def struct(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return partition.struct(shape, dtype, *(arrays[name] for name in names))

    out_types: dict[str, jax.ShapeDtypeStruct] = {}
    for plan in plans:
        inner, outer, first = plan.inner, plan.outer, plan.jobs[0].out
        for job in plan.jobs:
            if plan.outputs:
                out_types[job.out] = struct((batch, rows, heads, outer), dtype)
            if plan.final:
                out_types[f"final {job.out}"] = struct((batch, heads, inner, outer), jnp.float32)
        if plan.keep:
            out_types[f"kept {first}"] = struct((batch, heads, borders(plan, chunks) + 1, inner, outer), STATE_DTYPE)
        if plan.sums:
            out_types[f"sums {first}"] = struct((batch, heads, 2, outer // TILE, chunks * TILE), jnp.float32)

    scratch = {"tiles": shared(max(plan.smem_tiles for plan in plans), dtype=dtype)}
    rows_for = vectors(plans)
    if any(rows_for.values()):
        scratch["vectors"] = plgpu.SMEM((sum(rows_for.values()), TILE), jnp.float32)
    for number, plan in enumerate(plans):
        copies = plan.heads * (plan.per_head + (plan.decay == "token"))
        scratch[f"full {number}"] = plgpu.Barrier(num_arrivals=copies, num_barriers=plan.stages)
        scratch[f"free {number}"] = plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages)

    # CTAs of one head, or of two where one of the plans takes two, are neighbours: a row of the grid.
    together = max(plan.heads for plan in plans)
    ctas = [together // plan.heads * plan.groups for plan in plans]
    width = sum(ctas)

    def body(*refs):
        gmem = dict(zip([*names, *out_types], refs, strict=False))
        smem = dict(zip(scratch, refs[len(gmem) :], strict=True))
        first_row = 0
        for name, count in rows_for.items():
            if count:
                smem[name] = smem["vectors"].at[pl.ds(first_row, count)]
            first_row += count
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")

        def of_each_plan(work: Callable[[Plan, "_Place", dict[str, Any]], None]) -> None:
            for number, plan in enumerate(plans):
                first = sum(ctas[:number])
                rest, row = _divided(cta, width)

                @pl.when((rest >= first) & (rest < first + ctas[number]))
                def _(number=number, plan=plan, row=row, cta_of_plan=rest - first):
                    of_head = lax.rem(warpgroup, jnp.int32(plan.tiles * plan.heads))  # by head, then by tile
                    own = lax.div(of_head, jnp.int32(plan.tiles))
                    group, rest = _divided(cta_of_plan, plan.groups)
                    unit = lax.rem(row, jnp.int32(heads // together))
                    first_head = unit * together + rest * plan.heads
                    place = _Place(
                        batch=lax.div(row, jnp.int32(heads // together)),
                        first_head=first_head,
                        head=first_head + own,
                        own=own,
                        group=group,
                        warpgroup=warpgroup,
                        tile=group * plan.tiles + lax.rem(of_head, jnp.int32(plan.tiles)),
                        heads=heads,
                        chunks=chunks,
                        length=length,
                    )
                    work(plan, place, smem | {"full": smem[f"full {number}"], "free": smem[f"free {number}"]})

        def compute(plan: Plan, place: _Place, smem: dict[str, Any]) -> None:
            for number, job in enumerate(plan.jobs):

                @pl.when(lax.div(warpgroup, jnp.int32(plan.tiles * plan.heads)) == number)
                def _(job=job):
                    _compute(plan, place, gmem, smem, job)

        @pl.when(warpgroup < wgs)
        def _():
            # Of 512 for a thread of each warpgroup; 256 is most, and never fewer than a launch of two warpgroups gives.
            plgpu.set_max_registers(240 if wgs == 2 else 256, action="increase")
            of_each_plan(compute)

        @pl.when(warpgroup == wgs)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            of_each_plan(lambda plan, place, smem: _copy(plan, place, gmem, smem))

    inputs = [arrays[name] for name in names]
    outputs = launch(body, inputs, out_types, scratch, batch * heads // together * width, wgs + 1, common.interpret)
    tokens = {job.out for plan in plans for job in plan.jobs}
    return {name: x[:, :length] if name in tokens else x for name, x in outputs.items()}


def _divided(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Remainder and quotient."""
    return lax.rem(x, jnp.int32(size)), lax.div(x, jnp.int32(size))


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

    def tiles_of_warpgroup(self, plan: Plan, smem: dict[str, Any], zero: jax.Array | int):
        """Tiles that this warpgroup computes, in shared memory."""
        return smem["tiles"].at[pl.ds(plan.own_at + self.warpgroup * plan.per_warpgroup + zero, plan.per_warpgroup)]

    def rows(self, plan: Plan, smem: dict[str, Any], name: str, slot: jax.Array) -> list[Any]:
        """Tiles of an array whose columns are the rows of this warpgroup's state, in shared memory."""
        tokens = _tokens(plan, smem, name, slot, self.own)
        return [tokens.at[block] for block in range(plan.blocks)]

    def columns(self, plan: Plan, smem: dict[str, Any], name: str, slot: jax.Array):
        """The tile of an array whose columns are those of this warpgroup, in shared memory."""
        tile = self.tile if plan.whole(name) else lax.rem(self.warpgroup, jnp.int32(plan.tiles))
        return _tokens(plan, smem, name, slot, self.own).at[tile]


def _tokens(plan: Plan, smem: dict[str, Any], name: str, slot: jax.Array, own: jax.Array | int):
    """Tiles of an array in shared memory, in a stage and of a head of the CTA."""
    first = (slot * plan.heads + own) * plan.per_head + plan.tokens_at(name)
    return smem["tiles"].at[pl.ds(first, plan.loaded(name))]


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
                for block in range(plan.loaded(name)):
                    channel = (0 if plan.whole(name) else place.group * plan.tiles) + block
                    source = gmem[name].at[place.batch, tokens, head, pl.ds(channel * TILE, TILE)]
                    target = _tokens(plan, smem, name, slot, own).at[block]
                    plgpu.copy_gmem_to_smem(source, target, smem["full"].at[slot])
            if plan.decay == "token":
                source = gmem["decay"].at[place.batch, place.first_head + own, tokens]
                plgpu.copy_gmem_to_smem(source, smem["decay"].at[slot * plan.heads + own], smem["full"].at[slot])


# ---- the warpgroups that compute


def _compute(plan: Plan, place: _Place, gmem: dict[str, Any], smem: dict[str, Any], job: Job) -> None:
    """Walks over the chunks with the state of the job in registers: `plan.blocks` tiles of (64, 64)."""

    def state_at(name: str, block: int):
        rows, channels = (pl.ds(tile * TILE, TILE) for tile in (block, place.tile))
        return gmem[f"{name} {job.out}"].at[place.batch, place.head, rows, channels]

    states = [zeros(plan.interpreted)] * plan.blocks
    if plan.initial:
        # The sum, because inside shard_map a loaded value alone has mesh axes in its type, which the loop would lose.
        given = [load(plan.interpreted, state_at("initial", block), optimized=False) for block in range(plan.blocks)]
        states = [zero + x for zero, x in zip(states, given, strict=True)]
    scale = gmem["scale"][0] if plan.scaled else None
    if plan.short_of_registers:
        smem["zero"][0, place.warpgroup] = jnp.float32(0)

    def chunk(step, states):
        slot = lax.rem(step, jnp.int32(plan.stages))
        plgpu.barrier_wait(smem["full"].at[slot])
        # A zero that the compiler does not know: what depends on it, addresses and masks, is computed in every chunk
        # anew. Without it some hundred registers would hold it all through the loop.
        zero = smem["zero"][0, place.warpgroup].astype(jnp.int32) if plan.short_of_registers else 0
        weights = _weights(plan, place, gmem, smem, slot, place.chunk(plan, step), zero)
        after = _chunk(plan, place, gmem, smem, job, slot, step, weights, scale, states, zero)

        @pl.when(step + plan.stages < place.chunks)
        def _():
            plgpu.barrier_arrive(smem["free"].at[slot])

        return tuple(after)

    states = lax.fori_loop(0, place.chunks, chunk, tuple(states))
    if plan.final:
        for block, state in enumerate(states):
            target = state_at("final", block)
            target[...] = state
    plgpu.wait_smem_to_gmem(0)


def _weights(plan: Plan, place: _Place, gmem, smem, slot, chunk, zero) -> Weights:
    if plan.decay is None:
        return Weights()
    if plan.decay == "head":

        def distance() -> jax.Array:
            later, earlier = (iota(plan.interpreted, axis) for axis in ((1, 0) if plan.reverse else (0, 1)))
            return later + zero - earlier

        valid = jnp.minimum(place.length - chunk * TILE, TILE)
        token = iota(plan.interpreted, None) + zero
        return per_head(plan.reverse, gmem["decay"][place.head], valid, token, distance)
    of_slot = slot * plan.heads + place.own
    total = smem["decay"].at[of_slot]
    rows = load(plan.interpreted, total, layout=BY_ROW)

    def difference() -> jax.Array:
        return by_row(rows) - by_column(load(plan.interpreted, total, layout=BY_COLUMN))

    return per_token(plan.reverse, rows, smem["decay"][of_slot, TILE - 1], difference)


def _chunk(plan: Plan, place: _Place, gmem, smem, job: Job, slot, step, weights: Weights, scale, states, zero):
    """One chunk: writes its output, and returns the state (list of tiles) after it."""

    own = place.tiles_of_warpgroup(plan, smem, zero)
    column, value = place.rows(plan, smem, job.column, slot), place.columns(plan, smem, job.value, slot)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the last chunk stored still stands in the tiles below

    if plan.outputs:
        operand = [own.at[block] for block in range(plan.blocks)]
        for target, state in zip(operand, states, strict=True):
            target[...] = state.astype(STATE_DTYPE)
        plgpu.commit_smem()
        if plan.keep and job is plan.jobs[0]:
            _keep(plan, place, gmem, operand, job, step)
        row = place.rows(plan, smem, job.row, slot)
        of_scores = (None, [(x, Transposed(y)) for x, y in zip(row, column, strict=True)])
        of_state = (None, list(zip(row, operand, strict=True)))
        at_once = not plan.short_of_registers
        scores, *inter = products(plan.interpreted, of_scores, *([of_state] if at_once else []))
        if weights.between is not None:
            scores = scores * weights.between()
        if scale is not None and plan.reverse:  # S holds the scale already
            scores = scores * scale
        i, j = iota(plan.interpreted, 0) + zero, iota(plan.interpreted, 1)
        scores = jnp.where(i <= j if plan.reverse else i >= j, scores, 0.0)
        summed = plan.sums and job is plan.jobs[0]
        if summed:
            partner = place.columns(plan, smem, job.partner, slot)
            (other,) = products(plan.interpreted, (None, [(partner, Transposed(value))]))
            inside = jnp.sum(jnp.where(i != j, scores * other, 0.0), axis=1)
            _write_sums(plan, place, gmem, smem, job, 1, step, inside, staging=1)
        scores = scores.astype(value.dtype)
        (inter,) = inter if at_once else products(plan.interpreted, of_state)
        if weights.border is not None:
            inter = inter * by_row(weights.border)
        if summed:
            outside = jnp.sum(inter * load(plan.interpreted, partner).astype(jnp.float32), axis=1)
            _write_sums(plan, place, gmem, smem, job, 0, step, outside)
        (out,) = products(plan.interpreted, (inter, [(scores, value)]))
        if scale is not None and not plan.reverse:
            out = out * scale
        # The whole warpgroup has read the state, and so have the stores of a kept one.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staged = own.at[OUT]
        staged[...] = out.astype(value.dtype)
        plgpu.commit_smem()
        tokens = pl.ds(place.chunk(plan, step) * TILE, TILE)
        target = gmem[job.out].at[place.batch, tokens, place.head, pl.ds(place.tile * TILE, TILE)]
        plgpu.copy_smem_to_gmem(staged, target)

    weight = weights.value
    if scale is not None and plan.reverse:
        weight = scale if weight is None else weight * scale
    if weight is not None:
        weighted = load(plan.interpreted, value).astype(jnp.float32) * (by_row(weight) if jnp.ndim(weight) else weight)
        value = own.at[WEIGHTED]
        value[...] = weighted.astype(value.dtype)
        plgpu.commit_smem()
    if weights.whole is not None:
        states = [state * weights.whole for state in states]
    terms = ((state, [(Transposed(x), value)]) for state, x in zip(states, column, strict=True))
    return products(plan.interpreted, *terms)


def _keep(plan: Plan, place: _Place, gmem, operand, job: Job, step) -> None:
    """Stores the state in front of the chunk (behind it, in reverse) if it is one of those to keep."""
    border = place.chunk(plan, step) + int(plan.reverse)

    def store(at):
        for block, staged in enumerate(operand):
            target = gmem[f"kept {job.out}"].at[
                place.batch, place.head, at, pl.ds(block * TILE, TILE), pl.ds(place.tile * TILE, TILE)
            ]
            plgpu.copy_smem_to_gmem(staged, target)

    @pl.when((lax.rem(border, jnp.int32(plan.keep)) == 0) & (border < place.chunks))
    def _():
        store(lax.div(border, jnp.int32(plan.keep)))

    if not plan.reverse:

        @pl.when(border == place.chunks - 1)
        def _():
            store(borders(plan, place.chunks))


def _write_sums(plan: Plan, place: _Place, gmem, smem, job: Job, where, step, sums, staging: int = 0) -> None:
    """Stores one number per token of the chunk at place `where` of "sums"; what a chunk writes is staged apart."""
    staged = smem["sums"].at[2 * place.warpgroup + staging]
    staged[...] = sums
    plgpu.commit_smem()
    tokens = pl.ds(place.chunk(plan, step) * TILE, TILE)
    target = gmem[f"sums {job.out}"].at[place.batch, place.head, where, place.tile, tokens]
    plgpu.copy_smem_to_gmem(staged, target)
