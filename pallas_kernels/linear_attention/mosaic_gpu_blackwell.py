"""Sweeps of chunked linear attention over the tokens, as a Pallas Mosaic GPU kernel for Blackwell (sm_100a).

`sweep` computes what `mosaic_gpu_sweep.sweep` does, by the same plans; chunks have 128 tokens here. For each of them

    out = ((row columnᵀ) ∘ P) value + (weight to the chunk's border) row S          S' = whole · S + columnᵀ (w value)

**Warpgroups.** A CTA has one head, or 64 or 128 of its output columns, and four warpgroups:

- two compute: on the results of products, each on half of the columns. They hold S, half of its columns each, float32,
  in registers from the first chunk to the last;
- one issues the products: (128, ·) operands in shared memory, results in tensor memory, where no thread waits for them;
- one issues the copies of the tokens, two or three chunks ahead.

**A chunk.** The products come in this order, each as soon as what it needs is there; a barrier tells when it is done:

    scores = row columnᵀ      read = row S      inside = (scores ∘ P) value      update = columnᵀ (w value)

Scores need the tokens alone, so those of the next chunk are computed while the compute warpgroups work on this one.
(scores ∘ P) goes back to tensor memory as bf16, the left operand of `inside`; S to shared memory, the right operand of
`read`. `update` stands where `read` stood, which both warpgroups have then in registers.

**Shared memory.** At 128 channels two stages of three arrays and S fill it, and nothing else gets a place: once a
chunk's scores and `read` are done, its row array is free for w value, and once `inside` is done, its value array for
the output, which one of the two warpgroups stores when both have written their half. A product has 128 rows: of heads
of 64 channels the copy engine fills column arrays up to 128 with zeros, and S has 64 rows more that stay 0.

Sources: Lightning Attention-2 (arXiv:2401.04658) for the chunks; FlashAttention-3 (arXiv:2407.08608) for warpgroups
that specialise. Names and layouts of Mosaic GPU follow JAX's documentation and jax.experimental.pallas.ops.gpu.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import partition
from pallas_kernels.linear_attention.mosaic_gpu_decay import Weights, per_head, per_token
from pallas_kernels.linear_attention.mosaic_gpu_plan import ALIGNMENT, SMEM_BYTES, Job, Plan, borders
from pallas_kernels.linear_attention.mosaic_gpu_sweep import STATE_DTYPE
from pallas_kernels.linear_attention.mosaic_gpu_tiles import launch

CHUNK = 128  # tokens of a chunk, rows of a product, and rows of a state
SIZES = (64, 128)  # inner and outer
COMPUTING = 2  # warpgroups; behind them come the one of the products and that of the copies
LAYOUT = plgpu.Layout.TCGEN05
BY_ROW, BY_COLUMN = LAYOUT.reduce(1), LAYOUT.reduce(0)


def sweep(plans: Sequence[Plan], length: int, heads: int, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Makes the sweeps of one launch, as `mosaic_gpu_sweep.sweep` does; T counts chunks of `CHUNK` tokens.

    Args:
      plans: of one job each, without blocks; inner and outer in `SIZES`.
      length: as there.
      heads: as there.
      arrays: as there.

    Returns:
      What it returns there; axis 3 of sums has a place per warpgroup and tile of channels.
    """
    common, chunks = plans[0], -(-length // CHUNK)
    shape = launch_shape(plans)
    column = arrays[common.jobs[0].column]
    batch, rows, dtype = column.shape[0], column.shape[1], column.dtype
    # A tile that reaches beyond an array the interpreter does not store, the copy engine stores what fits.
    rows = chunks * CHUNK if common.interpreted else rows
    names = list(dict.fromkeys(name for plan in plans for name in plan.arrays))
    names += ["decay"] * (common.decay is not None) + ["scale"] * any(plan.scaled for plan in plans)
    names += [f"initial {plan.jobs[0].out}" for plan in plans if plan.initial]

    def struct(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return partition.struct(shape, dtype, *(arrays[name] for name in names))

    out_types: dict[str, jax.ShapeDtypeStruct] = {}
    for plan in plans:
        inner, outer, out = plan.inner, plan.outer, plan.jobs[0].out
        if plan.outputs:
            out_types[out] = struct((batch, rows, heads, outer), dtype)
        if plan.final:
            out_types[f"final {out}"] = struct((batch, heads, CHUNK, outer), jnp.float32)
        if plan.keep:
            out_types[f"kept {out}"] = struct((batch, heads, borders(plan, chunks) + 1, inner, outer), STATE_DTYPE)
        if plan.sums:
            places, shares = 1 if plan.tangent else 2, outer // shape.columns * COMPUTING
            out_types[f"sums {out}"] = struct((batch, heads, places, shares, chunks * CHUNK), jnp.float32)

    ctas = [plan.outer // shape.columns for plan in plans]
    firsts = [sum(ctas[:number]) for number in range(len(plans))]
    scratch = shape.scratch(dtype)
    for number, plan in enumerate(plans):
        copies = len(plan.arrays) + (plan.decay == "token")
        scratch[f"full {number}"] = plgpu.Barrier(num_arrivals=copies, num_barriers=shape.stages)

    def body(*refs):
        gmem = dict(zip([*names, *out_types], refs, strict=False))
        chip = dict(zip(scratch, refs[len(gmem) :], strict=True))
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        row, rest = lax.div(cta, jnp.int32(sum(ctas))), lax.rem(cta, jnp.int32(sum(ctas)))

        def of_each_plan(work: Callable[["_Sweep"], None]) -> None:
            for number, (plan, first, count) in enumerate(zip(plans, firsts, ctas, strict=True)):

                @pl.when((rest >= first) & (rest < first + count))
                def _(number=number, plan=plan, first=first):
                    work(
                        _Sweep(
                            plan=plan,
                            job=plan.jobs[0],
                            shape=shape,
                            gmem=gmem,
                            chip=chip | {"full": chip[f"full {number}"]},
                            batch=lax.div(row, jnp.int32(heads)),
                            head=lax.rem(row, jnp.int32(heads)),
                            heads=heads,
                            tile=rest - first,
                            warpgroup=warpgroup,
                            chunks=chunks,
                            length=length,
                        )
                    )

        @pl.when(warpgroup < COMPUTING)
        def _():
            # Of 512 for a thread of each warpgroup; the other two need few.
            plgpu.set_max_registers(216, action="increase")
            of_each_plan(_compute)

        for number, work in enumerate((_multiply, _copy), start=COMPUTING):

            @pl.when(warpgroup == number)
            def _(work=work):
                plgpu.set_max_registers(40, action="decrease")
                of_each_plan(work)

    inputs = [_with_all_rows(arrays[name]) if name.startswith("initial") else arrays[name] for name in names]
    found = launch(body, inputs, out_types, scratch, batch * heads * sum(ctas), COMPUTING + 2, common.interpret)
    for plan in plans:
        out = plan.jobs[0].out
        if plan.outputs:
            found[out] = found[out][:, :length]
        if plan.final:
            found[f"final {out}"] = found[f"final {out}"][:, :, : plan.inner]
    return found


def _with_all_rows(state: jax.Array) -> jax.Array:
    """(B, H, inner, outer) with `CHUNK` rows."""
    return jnp.pad(state, ((0, 0), (0, 0), (0, CHUNK - state.shape[2]), (0, 0)))


class Shape(NamedTuple):
    """Sizes of what the CTAs of a launch have on chip.

    Attributes:
      columns: of the output that a CTA computes, 64 or 128.
      row: channels of the widest row array.
      partner: whether a sweep reads a fourth array.
      decays: whether there is a decay per token.
      stages: chunks of tokens in shared memory.
    """

    columns: int
    row: int
    partner: bool
    decays: bool
    stages: int = 3

    @property
    def half(self) -> int:
        """Columns of a compute warpgroup."""
        return self.columns // COMPUTING

    def arrays(self) -> dict[str, tuple[int, ...]]:
        """Arrays of 16-bit numbers in shared memory."""
        tokens = {"row": self.row, "column": CHUNK, "value": self.columns, "partner": self.columns * self.partner}
        return {name: (self.stages, CHUNK, size) for name, size in tokens.items() if size} | {
            "state": (CHUNK, self.columns)
        }

    def vectors(self) -> dict[str, tuple[int, ...]]:
        """Vectors of float32 in shared memory."""
        rows = {"decay": self.stages * self.decays, "sums": 2 * COMPUTING * self.partner}
        return {name: (count, CHUNK) for name, count in rows.items() if count}

    def smem_bytes(self) -> int:
        """Shared memory of a CTA, without its barriers."""
        vectors = sum(-(-4 * math.prod(x) // ALIGNMENT) * ALIGNMENT for x in self.vectors().values())
        return 2 * sum(map(math.prod, self.arrays().values())) + vectors

    def scratch(self, dtype: jnp.dtype) -> dict[str, Any]:
        """What the kernel allocates, but the barriers of the copies."""
        swizzle = 2 * self.half  # bytes: what a compute warpgroup writes is whole tiles
        transforms = (plgpu.TilingTransform((8, self.half)), plgpu.SwizzleTransform(swizzle))
        found = {name: plgpu.SMEM(size, dtype, transforms=transforms) for name, size in self.arrays().items()}
        found |= {name: plgpu.SMEM(size, jnp.float32) for name, size in self.vectors().items()}
        found |= {
            "scores": plgpu.TMEM((CHUNK, CHUNK), jnp.float32),
            "weighted scores": plgpu.TMEM((CHUNK, CHUNK), dtype, packed=True),
            "inside": plgpu.TMEM((CHUNK, CHUNK if self.partner else self.columns), jnp.float32),
            "read": plgpu.TMEM((CHUNK, self.columns), jnp.float32),
        }
        for name in ("scores done", "read done", "inside done", "update done"):
            found[name] = plgpu.Barrier(orders_tensor_core=True)
        for name in ("state ready", "scores ready", "value ready"):
            found[name] = plgpu.Barrier(num_arrivals=COMPUTING, orders_tensor_core=True)
        found["output ready"] = plgpu.Barrier(num_arrivals=COMPUTING)
        return found | {"free": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=self.stages)}


def launch_shape(plans: Sequence[Plan]) -> Shape:
    """What fits into shared memory: all columns that every sweep has, unless four arrays leave room for 64 alone.

    Raises:
      ValueError: if nothing fits.
    """
    partner = any(plan.sums for plan in plans)
    columns = min(SIZES[0] if partner else SIZES[-1], *(size for plan in plans for size in (plan.inner, plan.outer)))
    row = max(plan.inner for plan in plans)
    for stages in (3, 2):
        shape = Shape(columns, row, partner, plans[0].decay == "token", stages)
        if shape.smem_bytes() + ALIGNMENT <= SMEM_BYTES:
            return shape
    raise ValueError(f"{shape} needs {shape.smem_bytes()} bytes of shared memory, a CTA has {SMEM_BYTES}")


class _Sweep(NamedTuple):
    """One sweep of a CTA, and what it works with.

    Attributes:
      plan: what is static.
      job: its output.
      shape: sizes on chip.
      gmem: arrays in device memory, by name.
      chip: shared memory, tensor memory and barriers, by name.
      batch: sequence.
      head: of H.
      heads: H.
      tile: which `shape.columns` of the output.
      warpgroup: its number in the CTA.
      chunks: of the sequence.
      length: N.
    """

    plan: Plan
    job: Job
    shape: Shape
    gmem: dict[str, Any]
    chip: dict[str, Any]
    batch: jax.Array
    head: jax.Array
    heads: int
    tile: jax.Array
    warpgroup: jax.Array
    chunks: int
    length: int

    @property
    def own(self):
        """The columns of this compute warpgroup among those of its CTA."""
        return pl.ds(self.warpgroup * self.shape.half, self.shape.half)

    @property
    def outer(self):
        """The columns of this CTA among all of the output."""
        return pl.ds(self.tile * self.shape.columns, self.shape.columns)

    @property
    def own_outer(self):
        """Those of this compute warpgroup among all of the output."""
        return pl.ds(self.tile * self.shape.columns + self.warpgroup * self.shape.half, self.shape.half)

    @property
    def reads(self) -> bool:
        """Whether something reads the state."""
        return self.plan.outputs or self.plan.tangent

    def chunk(self, step: jax.Array) -> jax.Array:
        """The chunk visited at `step`."""
        return self.chunks - 1 - step if self.plan.reverse else step

    def valid(self, step: jax.Array) -> jax.Array:
        """Its tokens: the last chunk of a sequence may have fewer."""
        return jnp.minimum(self.length - self.chunk(step) * CHUNK, CHUNK)

    def slot(self, step: jax.Array) -> jax.Array:
        """Its stage in shared memory."""
        return lax.rem(step, jnp.int32(self.shape.stages))

    def load(self, ref, layout=LAYOUT, **options) -> jax.Array:
        """An array from shared or device memory."""
        return ref[...] if self.plan.interpreted else plgpu.load(ref, (), layout=layout, **options)

    def zeros(self) -> jax.Array:
        """Half of a state."""
        zero = jnp.zeros((CHUNK, self.shape.half), jnp.float32)
        return zero if self.plan.interpreted else plgpu.layout_cast(zero, LAYOUT)

    def iota(self, axis: int | None) -> jax.Array:
        """Row (0) or column (1) numbers of this warpgroup's half of the scores; None: row numbers as a vector."""
        half = CHUNK // COMPUTING
        size, layout = ((CHUNK,), BY_ROW) if axis is None else ((CHUNK, half), LAYOUT)
        if self.plan.interpreted:
            numbers = lax.broadcasted_iota(jnp.int32, size, axis or 0)
        else:
            numbers = plgpu.broadcasted_iota(jnp.int32, size, axis or 0, layout=layout)
        return numbers + self.warpgroup * half if axis == 1 else numbers


def _by_row(vector: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(vector, (CHUNK, columns), [0])


# ---- the warpgroups of the copies and of the products


def _copy(sweep: _Sweep) -> None:
    """Issues the copies of every chunk, as soon as its place in shared memory is free."""
    plan, shape, chip, gmem = sweep.plan, sweep.shape, sweep.chip, sweep.gmem

    @pl.loop(0, sweep.chunks)
    def _(step):
        slot, tokens = sweep.slot(step), pl.ds(sweep.chunk(step) * CHUNK, CHUNK)

        @pl.when(step >= shape.stages)
        def _():
            plgpu.barrier_wait(chip["free"].at[slot])

        for role in ("row", "column", "value", "partner"):
            name = getattr(sweep.job, role)
            if name not in plan.arrays or (role == "partner" and not plan.sums):
                continue
            head = lax.div(sweep.head, jnp.int32(sweep.heads // gmem[name].shape[2]))
            target = chip[role].at[slot]
            # Beyond the array's channels the copy engine fills up with zeros. Pallas refuses to read there from a start
            # that it knows, hence a zero that it does not.
            first = sweep.tile * (shape.columns if role in ("value", "partner") else 0)
            source = gmem[name].at[sweep.batch, tokens, head, pl.ds(first, target.shape[1])]
            plgpu.copy_gmem_to_smem(source, target, chip["full"].at[slot])
        if plan.decay == "token":
            source = gmem["decay"].at[sweep.batch, sweep.head, tokens]
            plgpu.copy_gmem_to_smem(source, chip["decay"].at[slot], chip["full"].at[slot])


def _multiply(sweep: _Sweep) -> None:
    """Issues the products of every chunk, as soon as their operands are there."""
    plan, chip = sweep.plan, sweep.chip

    @pl.loop(0, sweep.chunks)
    def _(step):
        slot = sweep.slot(step)
        row, column, value = (chip[role].at[slot] for role in ("row", "column", "value"))
        plgpu.barrier_wait(chip["full"].at[slot])
        if plan.outputs:
            known = column.at[:, pl.ds(0, sweep.shape.row)]
            plgpu.tcgen05_mma(chip["scores"], row, known.transpose((1, 0)), chip["scores done"], accumulate=False)
        if sweep.reads:
            plgpu.barrier_wait(chip["state ready"])
            if plan.sums and plan.outputs:
                plgpu.tcgen05_mma(chip["inside"], chip["partner"].at[slot], value.transpose((1, 0)), accumulate=False)
            state = chip["state"].at[pl.ds(0, sweep.shape.row)]
            plgpu.tcgen05_mma(chip["read"], row, state, accumulate=False)
            plgpu.tcgen05_commit_arrive(chip["read done"])  # of both products
        if plan.outputs:
            plgpu.barrier_wait(chip["scores ready"])
            inside = chip["inside"].at[:, pl.ds(0, sweep.shape.columns)]
            plgpu.tcgen05_mma(inside, chip["weighted scores"], value, chip["inside done"], accumulate=False)
        plgpu.barrier_wait(chip["value ready"])
        weighted = row.at[:, pl.ds(0, sweep.shape.columns)]
        plgpu.tcgen05_mma(chip["read"], column.transpose((1, 0)), weighted, chip["update done"], accumulate=False)


# ---- the warpgroups that compute


def _compute(sweep: _Sweep) -> None:
    """Walks over the chunks with half of the state's columns in registers, (CHUNK, half)."""
    plan, chip = sweep.plan, sweep.chip

    def state_at(name: str):
        return sweep.gmem[f"{name} {sweep.job.out}"].at[sweep.batch, sweep.head, :, sweep.own_outer]

    states = [sweep.zeros()]
    if plan.initial:
        # The sum, because inside shard_map a loaded value alone has mesh axes in its type, which the loop would lose.
        states = [states[0] + sweep.load(state_at("initial"), optimized=False)]
    if plan.tangent:
        states += [sweep.zeros()]
    _publish(sweep, jnp.int32(0), states)

    def chunk(step, states):
        plgpu.barrier_wait(chip["full"].at[sweep.slot(step)])
        states = _chunk(sweep, step, _weights(sweep, step), states)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the value array and the sums are free

        @pl.when(step + 1 < sweep.chunks)
        def _():
            _publish(sweep, step + 1, states)

        @pl.when(step + sweep.shape.stages < sweep.chunks)
        def _():
            plgpu.barrier_arrive(chip["free"].at[sweep.slot(step)])

        return tuple(states)

    states = lax.fori_loop(0, sweep.chunks, chunk, tuple(states))
    if plan.final:
        target = state_at("final")
        target[...] = states[-1]
    plgpu.wait_smem_to_gmem(0)


def _publish(sweep: _Sweep, step: jax.Array, states: Sequence[jax.Array]) -> None:
    """Puts the state, or its tangent, where the products of the chunk visited at `step` read it."""
    plan, chip = sweep.plan, sweep.chip
    if not sweep.reads:
        return
    staged = chip["state"].at[:, sweep.own]
    staged[...] = states[-1].astype(STATE_DTYPE)
    plgpu.commit_smem()
    plgpu.barrier_arrive(chip["state ready"])
    if plan.keep:
        plgpu.barrier_wait(chip["state ready"])
        border = sweep.chunk(step) + int(plan.reverse)
        kept = sweep.gmem[f"kept {sweep.job.out}"]

        def store(place):
            target = kept.at[sweep.batch, sweep.head, place, :, sweep.outer]
            plgpu.copy_smem_to_gmem(chip["state"].at[pl.ds(0, plan.inner)], target)

        one = sweep.warpgroup == 0

        @pl.when(one & (lax.rem(border, jnp.int32(plan.keep)) == 0) & (border < sweep.chunks))
        def _():
            store(lax.div(border, jnp.int32(plan.keep)))

        if not plan.reverse:

            @pl.when(one & (border == sweep.chunks - 1))
            def _():
                store(borders(plan, sweep.chunks))


def _weights(sweep: _Sweep, step: jax.Array) -> Weights:
    """Those of this warpgroup's half of the scores; in reverse the values' hold the scale."""
    plan, chip = sweep.plan, sweep.chip
    if plan.decay is None:
        weights = Weights()
    elif plan.decay == "head":

        def distance() -> jax.Array:
            later, earlier = (sweep.iota(axis) for axis in ((1, 0) if plan.reverse else (0, 1)))
            return later - earlier

        decay = sweep.gmem["decay"][sweep.head]
        weights = per_head(plan.reverse, decay, sweep.valid(step), sweep.iota(None), distance)
    else:
        slot, half = sweep.slot(step), CHUNK // COMPUTING
        total = chip["decay"].at[slot]
        rows = sweep.load(total, BY_ROW)

        def difference() -> jax.Array:
            columns = sweep.load(total.at[pl.ds(sweep.warpgroup * half, half)], BY_COLUMN)
            columns = lax.broadcast_in_dim(columns, (CHUNK, half), [1])
            # Columns of wgmma's tiles have the same layout, which is taken unless a cast is the next operation.
            columns = columns if plan.interpreted else plgpu.layout_cast(columns, LAYOUT)
            return _by_row(rows, half) - columns

        weights = per_token(plan.reverse, rows, chip["decay"][slot, CHUNK - 1], difference)
    if not (plan.scaled and plan.reverse):
        return weights
    scale = sweep.gmem["scale"][0]
    return weights._replace(value=scale if weights.value is None else weights.value * scale)


def _chunk(sweep: _Sweep, step: jax.Array, weights: Weights, states: Sequence[jax.Array]) -> list[jax.Array]:
    """One chunk: writes its output and its sums, and returns the states after it."""
    plan, shape, chip = sweep.plan, sweep.shape, sweep.chip
    scale = sweep.gmem["scale"][0] if plan.scaled else None
    value = chip["value"].at[sweep.slot(step), :, sweep.own]
    tokens = pl.ds(sweep.chunk(step) * CHUNK, CHUNK)
    if plan.outputs:
        plgpu.barrier_wait(chip["scores done"])
        half = pl.ds(sweep.warpgroup * (CHUNK // COMPUTING), CHUNK // COMPUTING)
        scores = _from_tensor_memory(chip["scores"].at[:, half])
        if weights.between is not None:
            scores = scores * weights.between()
        if scale is not None and plan.reverse:  # S holds the scale already
            scores = scores * scale
        i, j = sweep.iota(0), sweep.iota(1)
        scores = jnp.where(i <= j if plan.reverse else i >= j, scores, 0.0)
        if plan.sums:
            plgpu.barrier_wait(chip["read done"])
            other = _from_tensor_memory(chip["inside"].at[:, half])
            _write_sums(sweep, 1, tokens, jnp.sum(jnp.where(i != j, scores * other, 0.0), axis=1), staging=1)
        plgpu.async_store_tmem(chip["weighted scores"].at[:, half], scores.astype(value.dtype))
        plgpu.commit_tmem()
        plgpu.barrier_arrive(chip["scores ready"])
    if sweep.reads:
        if not (plan.outputs and plan.sums):
            plgpu.barrier_wait(chip["read done"])
        inter = _from_tensor_memory(chip["read"].at[:, sweep.own])
        if weights.border is not None:
            inter = inter * _by_row(weights.border, shape.half)
    weighted, weight = sweep.load(value), weights.value
    if weight is not None:
        weight = _by_row(weight, shape.half) if jnp.ndim(weight) else weight
        weighted = (weighted.astype(jnp.float32) * weight).astype(value.dtype)
    dead = chip["row"].at[sweep.slot(step), :, sweep.own]  # as scores and read are done
    dead[...] = weighted
    plgpu.commit_smem()
    plgpu.barrier_arrive(chip["value ready"])
    if plan.sums:
        partner = sweep.load(chip["partner"].at[sweep.slot(step), :, sweep.own]).astype(jnp.float32)
        _write_sums(sweep, 0, tokens, jnp.sum(inter * partner, axis=1))
    if plan.outputs:
        plgpu.barrier_wait(chip["inside done"])
        out = inter + _from_tensor_memory(chip["inside"].at[:, sweep.own])
        if scale is not None and not plan.reverse:
            out = out * scale
        value[...] = out.astype(value.dtype)
        plgpu.commit_smem()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # a kept state: behind the barrier both may write the next one
        plgpu.barrier_arrive(chip["output ready"])
        plgpu.barrier_wait(chip["output ready"])

        @pl.when(sweep.warpgroup == 0)
        def _():
            target = sweep.gmem[sweep.job.out].at[sweep.batch, tokens, sweep.head, sweep.outer]
            plgpu.copy_smem_to_gmem(chip["value"].at[sweep.slot(step)], target)

    plgpu.barrier_wait(chip["update done"])
    state, *tangents = states
    if plan.tangent:
        count = sweep.valid(step).astype(jnp.float32)
        tangents = [(tangent + state * count) * weights.whole for tangent in tangents]
    if weights.whole is not None:
        state = state * weights.whole
    return [state + _from_tensor_memory(chip["read"].at[:, sweep.own]), *tangents]


def _from_tensor_memory(ref) -> jax.Array:
    """What stands there; once it is returned, something else may."""
    found = plgpu.async_load_tmem(ref)
    plgpu.wait_load_tmem()
    return found


def _write_sums(sweep: _Sweep, place: int, tokens, sums: jax.Array, staging: int = 0) -> None:
    """Stores one number per token of the chunk at `place` of "sums"; what a chunk writes is staged apart."""
    staged = sweep.chip["sums"].at[2 * sweep.warpgroup + staging]
    staged[...] = sums
    plgpu.commit_smem()
    share = sweep.tile * COMPUTING + sweep.warpgroup
    target = sweep.gmem[f"sums {sweep.job.out}"].at[sweep.batch, sweep.head, place, share, tokens]
    plgpu.copy_smem_to_gmem(staged, target)
