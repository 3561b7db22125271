"""The TPU kernels, on transposed scores: keys in sublanes, queries in lanes.

So a number per query (the maximum, the sum, lse) is a row of lanes that broadcasts down the keys, is written as a row,
and nothing is moved between lanes and sublanes but the output once, and numbers per key. Exponents are of base 2.

    forward   s = k qᵀ    p = 2^(s - m)    y += vᵀ p                         row by row of tiles
    dq        ds = p (v dyᵀ - Δ)           dq += dsᵀ k                       row by row;  Δ = dy·y - dlse
    dkv       dv += p dy                   dk += ds q                        column by column, heads of a group in turn
    full      the sum of ds over heads, for what has a number per pair       tile by tile, heads in turn
"""

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import array_masks
from pallas_kernels.block_sparse_attention import scores
from pallas_kernels.block_sparse_attention.scores import Indices
from pallas_kernels.block_sparse_attention.tpu.lists import FIRST, LANE, LAST, NOTHING, WHOLE, Walk
from pallas_kernels.block_sparse_attention.tpu.plan import Extra, Plan
from pallas_kernels.tpu.calls import WIDE, product

LOG2E = math.log2(math.e)
LEAST = -1e30  # below every score, and finite: the difference of two is 0


class Call:
    """One kernel: its grid, its operands in order, and where a grid point is."""

    def __init__(self, plan: Plan, kind: str, walk: Walk, numbers: tuple[jax.Array, jax.Array]) -> None:
        self.plan, self.kind, self.walk, self.numbers = plan, kind, walk, numbers
        self.arrays: list[Any] = []
        self.specs: list[Any] = []
        self.names: list[str] = []
        self.outputs: dict[str, tuple[jax.ShapeDtypeStruct, Any]] = {}

    @property
    def grid(self) -> tuple[Any, ...]:
        """Batch elements, heads (of keys in `dkv`, of the output in `full`), tiles, and heads in turn."""
        batch, groups, repeats = self.plan.layout.inner
        total = self.walk.total
        if self.kind == "dkv":
            return batch, groups, total, repeats
        heads = groups * repeats
        if self.kind == "full":
            outer = self.plan.full_heads
            return batch, outer, total, heads // outer
        return batch, heads, total

    def at(self, ids: tuple[Any, ...], row: Any, column: Any, flags: Any) -> SimpleNamespace:
        """Where a grid point is, from its number and the prefetched lists."""
        layout, t = self.plan.layout, ids[2]
        lane = flags[t] >> LANE
        lane_b, lane_h = _divided(lane, layout.lanes_h)
        _, groups, repeats = layout.inner
        b = ids[0] if layout.lanes_b == 1 else lane_b
        if self.kind == "dkv":
            inner = ids[1] * repeats + ids[3]
        elif self.kind == "full":
            inner = ids[1] * self.grid[3] + ids[3]
        else:
            inner = ids[1]
        h = inner if layout.lanes_h == 1 else lane_h * (groups * repeats) + inner
        g, r = _divided(h, layout.repeats)
        return SimpleNamespace(b=b, h=h, g=g, r=r, i=row[t], j=column[t])

    def spec(self, block: tuple[int | None, ...], index: Callable[[SimpleNamespace], tuple[Any, ...]]) -> Any:
        """Of an operand whose block follows from where a grid point is."""

        def map_(*args: Any) -> tuple[Any, ...]:
            ids, (row, column, flags, mask, *_) = args[: len(self.grid)], args[len(self.grid) :]
            at = self.at(ids, row, column, flags)
            at.mask = mask[ids[2]]
            return index(at)

        return pl.BlockSpec(block, map_)

    def read(self, name: str, array: jax.Array, block: Any, index: Any) -> None:
        """Adds an input."""
        self.names.append(name)
        self.arrays.append(array)
        self.specs.append(self.spec(block, index))

    def write(self, name: str, shape: tuple[int, ...], dtype: Any, block: Any, index: Any, fill: float = 0.0) -> None:
        """Adds an output; blocks that no tile writes hold `fill`."""
        self.outputs[name] = (jax.ShapeDtypeStruct(shape, dtype), self.spec(block, index), fill)

    def tokens(self, name: str, array: jax.Array, axis: str, *, writes: bool = False) -> None:
        """Adds (B, N, H, D) or (B, M, G, D), or an output of such a shape and dtype."""
        layout = self.plan.layout
        batch, length, heads, size = array.shape
        block = layout.block_q if axis == "i" else layout.block_k
        head = "h" if axis == "i" else "g"
        if size % 128 == 0:
            shape, cut = (batch, length, heads * size), (None, block, size)
            index = lambda at: (at.b, getattr(at, axis), getattr(at, head))  # noqa: E731
        else:
            shape, cut = (batch, heads, length, size), (None, None, block, size)
            index = lambda at: (at.b, getattr(at, head), getattr(at, axis), 0)  # noqa: E731
        if writes:
            self.write(name, shape, array.dtype, cut, index)
        else:
            self.read(name, array.reshape(shape) if size % 128 == 0 else jnp.swapaxes(array, 1, 2), cut, index)

    def rows(self, name: str, array: jax.Array) -> None:
        """Adds (B, H, 1, N)."""
        self.read(name, array, (None, None, 1, self.plan.layout.block_q), lambda at: (at.b, at.h, 0, at.i))

    def extra(self, extra: Extra, array: jax.Array) -> None:
        """Adds an array of `plan.extras`, (B|1, H|G|1, …)."""
        b, h = (
            array.shape[0] > 1,
            {1: ""}.get(array.shape[1], "g" if array.shape[1] == self.plan.layout.groups else "h"),
        )
        layout = self.plan.layout

        def lead(at: SimpleNamespace) -> tuple[Any, Any]:
            return at.b if b else 0, getattr(at, h) if h else 0

        block, tail = {
            "scalar": ((1, 1), lambda at: (0, 0)),
            "row": ((1, layout.block_q), lambda at: (0, at.i)),
            "column": ((1, layout.block_k), lambda at: (0, at.j)),
            "full": ((layout.block_q, layout.block_k), lambda at: (at.i, at.j)),
            "table": ((layout.block_q, array.shape[3]), lambda at: (at.i, 0)),
        }[extra.kind]
        self.read(extra.name, array, (None, None, *block), lambda at: (*lead(at), *tail(at)))

    def run(self, body: Callable[..., None], scratch: list[tuple[tuple[int, ...], Any]]) -> dict[str, jax.Array]:
        """Runs `body(call, refs by name, scratch refs, where)`."""
        names, count = list(self.names), len(self.names)
        outputs = list(self.outputs)
        masks = self.plan.masks is not None
        # What no tile writes keeps what it had: the outputs begin as these arrays.
        fills = [jnp.full(struct.shape, fill, struct.dtype) for struct, _, fill in self.outputs.values()]
        lists = self.walk[:4] + self.numbers

        def kernel(row, column, flags, mask, bs, hs, *refs):
            ids = tuple(pl.program_id(axis) for axis in range(len(self.grid)))
            named = dict(zip(names, refs[:count], strict=True))
            rest = refs[count + len(fills) :]
            named |= dict(zip(outputs, rest[: len(outputs)], strict=True))
            where = self.at(ids, row, column, flags)
            where.flags, where.b_index, where.h_index = flags[ids[2]], bs[where.b], hs[where.h]
            where.turn = ids[3] if len(ids) > 3 else None
            body(self, named, rest[len(outputs) :], where)

        if masks:
            block = (None, self.plan.layout.block_k, self.plan.layout.block_q)
            names.append("mask")
            self.arrays.append(jnp.asarray(self.plan.masks))
            self.specs.append(self.spec(block, lambda at: (at.mask, 0, 0)))
            count += 1
        parallel = ("parallel", "parallel") + ("arbitrary",) * (len(self.grid) - 2)
        results = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(lists),
                grid=self.grid,
                in_specs=[*self.specs, *(pl.BlockSpec(memory_space=pl.ANY) for _ in fills)],
                out_specs=[spec for _, spec, _ in self.outputs.values()],
                scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
            ),
            out_shape=[struct for struct, _, _ in self.outputs.values()],
            input_output_aliases={len(lists) + count + n: n for n in range(len(fills))},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=parallel, vmem_limit_bytes=self.plan.chip.vmem_limit
            ),
            name=f"block_sparse_attention_{self.kind}",
        )(*(jnp.asarray(x, jnp.int32) for x in lists), *self.arrays, *fills)
        return dict(zip(outputs, results, strict=True))


def _divided(x: Any, size: int) -> tuple[Any, Any]:
    """Quotient and rest of a number that is not negative."""
    return (x, 0) if size == 1 else (lax.div(x, jnp.int32(size)), lax.rem(x, jnp.int32(size)))


# ---- a tile


def column_of(row: jax.Array) -> jax.Array:
    """(1, n) to (n, 1), in 32 bits."""
    return jnp.transpose(jnp.broadcast_to(row, (8, row.shape[1])))[:, :1]


def row_of(column: jax.Array) -> jax.Array:
    """(n, 1) to (1, n), in 32 bits."""
    return jnp.transpose(jnp.broadcast_to(column, (column.shape[0], 128)))[:1]


def _values(plan: Plan, refs: dict[str, Any]) -> dict[str, Any]:
    """What each extra has for the pairs of a tile, (block_k|1, block_q|1); of tables their row (block_q, S)."""
    values = {}
    for extra in plan.extras:
        x = refs[extra.name][...]
        x = x.astype(WIDE if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)
        values[extra.name] = {"column": column_of, "full": jnp.transpose}.get(extra.kind, lambda x: x)(x)
    return values


def _one_hot(plan: Plan, ids: jax.Array, size: int) -> jax.Array:
    """(block_k, 1) to (block_k, S)."""
    return (ids == lax.broadcasted_iota(jnp.int32, (plan.layout.block_k, size), 1)).astype(WIDE)


def _looked_up(plan: Plan, values: dict[str, Any], name: str) -> Any:
    """What `modified` reads: the value itself, or that of a table at each key."""
    extra = plan.extra(name)
    if extra.kind != "table":
        return values[name]
    chosen = _one_hot(plan, values[extra.ids], values[name].shape[1])
    return product(WIDE, chosen, values[name].astype(WIDE), "nt")


def _indices(plan: Plan, where: SimpleNamespace) -> Indices:
    shape = plan.layout.block_k, plan.layout.block_q
    i = where.i * shape[1] + lax.broadcasted_iota(jnp.int32, shape, 1)
    j = where.j * shape[0] + lax.broadcasted_iota(jnp.int32, shape, 0)
    return Indices(where.b_index, where.h_index, i, j)


def _modified(plan: Plan, products: jax.Array, values: dict[str, Any], index: Indices) -> jax.Array:
    """Scores to the base 2."""
    names, rules = plan.names, plan.rules
    if plan.is_plain:
        return products * (rules.scale * LOG2E)
    value = functools.partial(_looked_up, plan, values)
    x = scores.Extras(
        bias=value("bias") if names.bias else None,
        mods=tuple(value(name) for name in names.mods),
        mod_tables=(None,) * len(names.mods),
        mod_ids=(None,) * len(names.mods),
        scale=value("scale") if names.scale else None,
    )
    return scores.modified(rules, products, x, index) * LOG2E


def _seen(plan: Plan, refs: dict[str, Any], values: dict[str, Any], index: Indices) -> jax.Array:
    """What a partial tile allows, (block_k, block_q)."""
    seen = index.j < plan.layout.keys
    if plan.masks is not None:
        seen = refs["mask"][...].astype(jnp.int32) != 0
    elif plan.evaluates:

        def place(number: int) -> Any:
            at = plan.names.places[number]
            if at.table:
                return _looked_up(plan, values, at.table) > 0.5
            arrays = [values[name] for name in (*at.queries, *at.keys)]
            return array_masks.rule_of(plan.rules.mask, number)(index.i, index.j, *arrays)

        places = [functools.partial(place, number) for number in range(len(plan.names.places))]
        seen &= array_masks.allowed(plan.rules.mask, index.i, index.j, places)
    if plan.names.segments:
        seen &= values["query_ids"] == values["key_ids"]
    return seen


def _on_tile(where: SimpleNamespace, work: Callable[[bool], None]) -> None:
    """`work(masked)`, with a mask or without, of a tile that has pairs."""
    whole, nothing = (where.flags & WHOLE) != 0, (where.flags & NOTHING) != 0
    pl.when(whole)(lambda: work(False))
    pl.when(jnp.logical_not(whole | nothing))(lambda: work(True))


# ---- the kernels


def forward(plan: Plan, walk: Walk, numbers: Any, q: Any, k: Any, v: Any, extras: dict[str, Any]) -> tuple[Any, Any]:
    """y (B, N, H, E) and lse (B, H, 1, N)."""
    call = Call(plan, "forward", walk, numbers)
    _inputs(call, q, k, v, extras)
    y = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype)
    call.tokens("y", y, "i", writes=True)
    block_q, size = plan.layout.block_q, v.shape[3]
    lse = q.shape[0], q.shape[2], 1, q.shape[1]
    call.write("lse", lse, WIDE, (None, None, 1, block_q), lambda at: (at.b, at.h, 0, at.i), -jnp.inf)
    results = call.run(_forward, [((size, block_q), WIDE), ((1, block_q), WIDE), ((1, block_q), WIDE)])
    return _tokens(results["y"], y), results["lse"]


def _forward(call: Call, refs: dict[str, Any], scratch: Any, where: SimpleNamespace) -> None:
    plan, (sums, top, total) = call.plan, scratch

    @pl.when((where.flags & FIRST) != 0)
    def _():
        sums[...], total[...] = jnp.zeros(sums.shape, WIDE), jnp.zeros(total.shape, WIDE)
        top[...] = jnp.full(top.shape, LEAST, WIDE)

    def work(masked: bool) -> None:
        values, index, v = _values(plan, refs), _indices(plan, where), refs["v"][...]
        s = _modified(plan, product(v.dtype, refs["k"][...], refs["q"][...], "nt"), values, index)
        if masked:
            seen = _seen(plan, refs, values, index)
            s = jnp.where(seen, s, LEAST)
        higher = jnp.maximum(top[...], jnp.max(s, axis=0, keepdims=True))
        p = jnp.exp2(s - higher)
        p = jnp.where(seen, p, 0) if masked else p
        shrink = jnp.exp2(top[...] - higher)
        total[...] = total[...] * shrink + jnp.sum(p, axis=0, keepdims=True)
        sums[...] = sums[...] * shrink + product(v.dtype, v, p, "tn")
        top[...] = higher

    _on_tile(where, work)

    @pl.when((where.flags & LAST) != 0)
    def _():
        empty = total[...] == 0
        divisor = jnp.where(empty, 1, total[...])
        refs["y"][...] = jnp.transpose(sums[...] / divisor).astype(refs["y"].dtype)
        refs["lse"][...] = jnp.where(empty, -jnp.inf, top[...] / LOG2E + jnp.log(divisor))


def backward_rows(
    plan: Plan, walk: Walk, numbers: Any, q: Any, k: Any, v: Any, extras: dict[str, Any], back: tuple[Any, Any, Any]
) -> dict[str, Any]:
    """dq (B, N, H, D), and the gradients of extras with a number per query, (B, H, 1, N), or a row, (B, H, N, S)."""
    call = Call(plan, "dq", walk, numbers)
    _inputs(call, q, k, v, extras, back)
    call.tokens("dq", q, "i", writes=True)
    block_q, (batch, length, heads, size) = plan.layout.block_q, q.shape
    scratch = [((block_q, size), WIDE)]
    for extra in plan.wanted("row", "scalar"):
        index = lambda at: (at.b, at.h, 0, at.i)  # noqa: E731
        call.write(f"d_{extra.name}", (batch, heads, 1, length), WIDE, (None, None, 1, block_q), index)
        scratch.append(((1, block_q), WIDE))
    for extra in plan.wanted("table"):
        width = extras[extra.name].shape[3]
        index = lambda at: (at.b, at.h, at.i, 0)  # noqa: E731
        call.write(f"d_{extra.name}", (batch, heads, length, width), WIDE, (None, None, block_q, width), index)
        scratch.append(((block_q, width), WIDE))
    results = call.run(_backward_rows, scratch)
    return {"q": _tokens(results.pop("dq"), q)} | {name.removeprefix("d_"): x for name, x in results.items()}


def _backward_rows(call: Call, refs: dict[str, Any], scratch: Any, where: SimpleNamespace) -> None:
    plan, (dq, *sums) = call.plan, scratch
    extras = (*plan.wanted("row", "scalar"), *plan.wanted("table"))

    @pl.when((where.flags & FIRST) != 0)
    def _():
        for ref in scratch:
            ref[...] = jnp.zeros(ref.shape, WIDE)

    def work(masked: bool) -> None:
        _, ds, more = _weights(plan, refs, where, masked, [extra.name for extra in extras])
        dtype = refs["k"].dtype
        dq[...] += product(dtype, ds, refs["k"][...], "tn")
        for ref, part in zip(sums, more, strict=True):
            ref[...] += _as_row(ref, part)

    _on_tile(where, work)

    @pl.when((where.flags & LAST) != 0)
    def _():
        refs["dq"][...] = dq[...].astype(refs["dq"].dtype)
        for extra, ref in zip(extras, sums, strict=True):
            refs[f"d_{extra.name}"][...] = ref[...]


def _as_row(ref: Any, part: jax.Array) -> jax.Array:
    """A part (1, 1) of a scalar's gradient as one of a row: in its first lane."""
    if part.shape == ref.shape:
        return part
    return jnp.where(lax.broadcasted_iota(jnp.int32, ref.shape, 1) == 0, part, 0)


def backward_columns(
    plan: Plan, walk: Walk, numbers: Any, q: Any, k: Any, v: Any, extras: dict[str, Any], back: tuple[Any, Any, Any]
) -> dict[str, Any]:
    """dk, dv (B, M, G, ·), and the gradients of extras with a number per key, (B, G, R, M)."""
    call = Call(plan, "dkv", walk, numbers)
    _inputs(call, q, k, v, extras, back)
    call.tokens("dk", k, "j", writes=True)
    call.tokens("dv", v, "j", writes=True)
    block_k, (batch, length, groups, size) = plan.layout.block_k, k.shape
    scratch = [((block_k, size), WIDE), ((block_k, v.shape[3]), WIDE)]
    repeats = plan.layout.repeats
    for extra in plan.wanted("column"):
        index = lambda at: (at.b, at.g, 0, at.j)  # noqa: E731
        call.write(f"d_{extra.name}", (batch, groups, repeats, length), WIDE, (None, None, repeats, block_k), index)
        scratch.append(((repeats, block_k), WIDE))
    results = call.run(_backward_columns, scratch)
    made = {"k": _tokens(results.pop("dk"), k), "v": _tokens(results.pop("dv"), v)}
    return made | {name.removeprefix("d_"): x for name, x in results.items()}


def _backward_columns(call: Call, refs: dict[str, Any], scratch: Any, where: SimpleNamespace) -> None:
    plan, (dk, dv, *sums) = call.plan, scratch
    extras = plan.wanted("column")
    turns = call.grid[3]

    @pl.when(((where.flags & FIRST) != 0) & (where.turn == 0))
    def _():
        for ref in scratch:
            ref[...] = jnp.zeros(ref.shape, WIDE)

    def work(masked: bool) -> None:
        p, ds, more = _weights(plan, refs, where, masked, [extra.name for extra in extras])
        dtype = refs["q"].dtype
        dv[...] += product(dtype, p, refs["dy"][...], "nn")
        dk[...] += product(dtype, ds, refs["q"][...], "nn")
        for ref, part in zip(sums, more, strict=True):
            own = lax.broadcasted_iota(jnp.int32, ref.shape, 0) == where.r
            ref[...] += jnp.where(own, row_of(part), 0)

    _on_tile(where, work)

    @pl.when(((where.flags & LAST) != 0) & (where.turn == turns - 1))
    def _():
        refs["dk"][...] = dk[...].astype(refs["dk"].dtype)
        refs["dv"][...] = dv[...].astype(refs["dv"].dtype)
        for extra, ref in zip(extras, sums, strict=True):
            refs[f"d_{extra.name}"][...] = ref[...]


def backward_full(
    plan: Plan, walk: Walk, numbers: Any, q: Any, k: Any, v: Any, extras: dict[str, Any], back: tuple[Any, Any, Any]
) -> dict[str, Any]:
    """The gradients of extras with a number per pair, (B, heads, N, M), summed over the heads that share them."""
    call = Call(plan, "full", walk, numbers)
    _inputs(call, q, k, v, extras, back)
    layout = plan.layout
    block, heads = (layout.block_q, layout.block_k), layout.lanes_h * plan.full_heads
    per = layout.groups * layout.repeats // heads
    scratch = []
    for extra in plan.wanted("full"):
        index = lambda at: (at.b, _divided(at.h, per)[0], at.i, at.j)  # noqa: E731
        shape = (q.shape[0], heads, q.shape[1], k.shape[1])
        call.write(f"d_{extra.name}", shape, WIDE, (None, None, *block), index)
        scratch.append(((layout.block_k, layout.block_q), WIDE))
    return {name.removeprefix("d_"): x for name, x in call.run(_backward_full, scratch).items()}


def _backward_full(call: Call, refs: dict[str, Any], scratch: Any, where: SimpleNamespace) -> None:
    plan, extras = call.plan, call.plan.wanted("full")
    turns = call.grid[3]

    @pl.when(where.turn == 0)
    def _():
        for ref in scratch:
            ref[...] = jnp.zeros(ref.shape, WIDE)

    def work(masked: bool) -> None:
        _, _, more = _weights(plan, refs, where, masked, [extra.name for extra in extras])
        for ref, part in zip(scratch, more, strict=True):
            ref[...] += part

    _on_tile(where, work)

    @pl.when(where.turn == turns - 1)
    def _():
        for extra, ref in zip(extras, scratch, strict=True):
            refs[f"d_{extra.name}"][...] = jnp.transpose(ref[...])


def _weights(plan: Plan, refs: dict[str, Any], where: SimpleNamespace, masked: bool, wanted: list[str]):
    """p, and the gradients of q·k and of the extras that are asked for."""
    values, index, q, k, v = _values(plan, refs), _indices(plan, where), *(refs[n][...] for n in "qkv")
    dtype = q.dtype

    def modified(products: jax.Array, chosen: list[jax.Array]) -> jax.Array:
        return _modified(plan, products, values | dict(zip(wanted, chosen, strict=True)), index)

    s, pull = jax.vjp(modified, product(dtype, k, q, "nt"), [values[name] for name in wanted])
    exponent = s - refs["lse"][...] * LOG2E
    if masked:
        seen = _seen(plan, refs, values, index)
        p = jnp.where(seen, jnp.exp2(jnp.where(seen, exponent, 0)), 0)
    else:
        p = jnp.exp2(exponent)
    ds = p * (product(dtype, v, refs["dy"][...], "nt") - refs["delta"][...]) * (1 / LOG2E)
    ds, more = pull(ds)
    return p, ds, more


def _inputs(call: Call, q: Any, k: Any, v: Any, extras: dict[str, Any], back: tuple[Any, Any, Any] | None = None):
    call.tokens("q", q, "i")
    call.tokens("k", k, "j")
    call.tokens("v", v, "j")
    for extra in call.plan.extras:
        call.extra(extra, extras[extra.name])
    if back is not None:
        dy, lse, delta = back
        call.tokens("dy", dy, "i")
        call.rows("lse", lse)
        call.rows("delta", delta)


def _tokens(x: jax.Array, like: Any) -> jax.Array:
    """The inverse of `Call.tokens`."""
    return x.reshape(like.shape) if like.shape[3] % 128 == 0 else jnp.swapaxes(x, 1, 2)
