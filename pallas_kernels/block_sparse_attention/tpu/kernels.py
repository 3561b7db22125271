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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import array_masks
from pallas_kernels.block_sparse_attention import scores
from pallas_kernels.block_sparse_attention.scores import Indices
from pallas_kernels.block_sparse_attention.tpu.call import BlockShape, Call, Tile, divided
from pallas_kernels.block_sparse_attention.tpu.lists import FIRST, LAST, Walk
from pallas_kernels.block_sparse_attention.tpu.plan import Plan
from pallas_kernels.tpu.calls import WIDE, product

LOG2E = math.log2(math.e)
LEAST = -1e30  # below every score, and finite: the difference of two is 0


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


def _indices(tile: Tile) -> Indices:
    shape = tile.plan.layout.block_k, tile.plan.layout.block_q
    i = tile.first[0] + lax.broadcasted_iota(jnp.int32, shape, 1)
    j = tile.first[1] + lax.broadcasted_iota(jnp.int32, shape, 0)
    return Indices(tile.where.b_index, tile.where.h_index, i, j)


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


# ---- the kernels


def forward(plan: Plan, walk: Walk, numbers: Any, q: Any, k: Any, v: Any, extras: dict[str, Any]) -> tuple[Any, Any]:
    """y (B, N, H, E) and lse (B, H, 1, N)."""
    call = Call(plan, "forward", walk, numbers)
    _inputs(call, q, k, v, extras)
    y = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype)
    call.tokens("y", y, "i", writes=True)
    lse = q.shape[0], q.shape[2], 1, q.shape[1]
    call.write("lse", lse, WIDE, (None, None, 1, "i"), lambda at: (at.b, at.h, 0, at.i), -jnp.inf)
    results = call.run(_forward, [(v.shape[3], "i"), (1, "i"), (1, "i")])
    return _tokens(results["y"], y), results["lse"]


def _forward(tile: Tile, outputs: dict[str, Any]) -> None:
    sums, top, total = tile.scratch

    @pl.when((tile.where.flags & FIRST) != 0)
    def _():
        sums[...], total[...] = jnp.zeros(sums.shape, WIDE), jnp.zeros(total.shape, WIDE)
        top[...] = jnp.full(top.shape, LEAST, WIDE)

    def work(part: Tile, masked: bool) -> None:
        plan, refs, (sums, top, total) = part.plan, part.refs, part.scratch
        values, index, v = _values(plan, refs), _indices(part), refs["v"][...]
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

    tile.each(work)

    @pl.when((tile.where.flags & LAST) != 0)
    def _():
        empty = total[...] == 0
        divisor = jnp.where(empty, 1, total[...])
        outputs["y"][...] = jnp.transpose(sums[...] / divisor).astype(outputs["y"].dtype)
        outputs["lse"][...] = jnp.where(empty, -jnp.inf, top[...] / LOG2E + jnp.log(divisor))


def backward_rows(
    plan: Plan, walk: Walk, numbers: Any, q: Any, k: Any, v: Any, extras: dict[str, Any], back: tuple[Any, Any, Any]
) -> dict[str, Any]:
    """dq (B, N, H, D), and the gradients of extras with a number per query, (B, H, 1, N), or a row, (B, H, N, S)."""
    call = Call(plan, "dq", walk, numbers)
    _inputs(call, q, k, v, extras, back)
    call.tokens("dq", q, "i", writes=True)
    batch, length, heads, size = q.shape
    scratch: list[BlockShape] = [("i", size)]
    for extra in plan.wanted("row", "scalar"):
        index = lambda at: (at.b, at.h, 0, at.i)  # noqa: E731
        call.write(f"d_{extra.name}", (batch, heads, 1, length), WIDE, (None, None, 1, "i"), index)
        scratch.append((1, "i"))
    for extra in plan.wanted("table"):
        width = extras[extra.name].shape[3]
        index = lambda at: (at.b, at.h, at.i, 0)  # noqa: E731
        call.write(f"d_{extra.name}", (batch, heads, length, width), WIDE, (None, None, "i", width), index)
        scratch.append(("i", width))
    results = call.run(_backward_rows, scratch)
    return {"q": _tokens(results.pop("dq"), q)} | {name.removeprefix("d_"): x for name, x in results.items()}


def _backward_rows(tile: Tile, outputs: dict[str, Any]) -> None:
    plan, (dq, *sums) = tile.plan, tile.scratch
    extras = (*plan.wanted("row", "scalar"), *plan.wanted("table"))

    @pl.when((tile.where.flags & FIRST) != 0)
    def _():
        for ref in tile.scratch:
            ref[...] = jnp.zeros(ref.shape, WIDE)

    def work(part: Tile, masked: bool) -> None:
        _, ds, more = _weights(part, masked, [extra.name for extra in extras])
        k, (dq, *sums) = part.refs["k"][...], part.scratch
        dq[...] += product(k.dtype, ds, k, "tn")
        for ref, d in zip(sums, more, strict=True):
            ref[...] += _as_row(ref, d)

    tile.each(work)

    @pl.when((tile.where.flags & LAST) != 0)
    def _():
        outputs["dq"][...] = dq[...].astype(outputs["dq"].dtype)
        for extra, ref in zip(extras, sums, strict=True):
            outputs[f"d_{extra.name}"][...] = ref[...]


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
    batch, length, groups, size = k.shape
    scratch: list[BlockShape] = [("j", size), ("j", v.shape[3])]
    repeats = plan.layout.repeats
    for extra in plan.wanted("column"):
        index = lambda at: (at.b, at.g, 0, at.j)  # noqa: E731
        call.write(f"d_{extra.name}", (batch, groups, repeats, length), WIDE, (None, None, repeats, "j"), index)
        scratch.append((repeats, "j"))
    results = call.run(_backward_columns, scratch)
    made = {"k": _tokens(results.pop("dk"), k), "v": _tokens(results.pop("dv"), v)}
    return made | {name.removeprefix("d_"): x for name, x in results.items()}


def _backward_columns(tile: Tile, outputs: dict[str, Any]) -> None:
    (dk, dv, *sums), where = tile.scratch, tile.where
    extras = tile.plan.wanted("column")

    @pl.when(((where.flags & FIRST) != 0) & (where.turn == 0))
    def _():
        for ref in tile.scratch:
            ref[...] = jnp.zeros(ref.shape, WIDE)

    def work(part: Tile, masked: bool) -> None:
        p, ds, more = _weights(part, masked, [extra.name for extra in extras])
        q, (dk, dv, *sums) = part.refs["q"][...], part.scratch
        dv[...] += product(q.dtype, p, part.refs["dy"][...], "nn")
        dk[...] += product(q.dtype, ds, q, "nn")
        for ref, d in zip(sums, more, strict=True):
            own = lax.broadcasted_iota(jnp.int32, ref.shape, 0) == where.r
            ref[...] += jnp.where(own, row_of(d), 0)

    tile.each(work)

    @pl.when(((where.flags & LAST) != 0) & (where.turn == where.turns - 1))
    def _():
        outputs["dk"][...] = dk[...].astype(outputs["dk"].dtype)
        outputs["dv"][...] = dv[...].astype(outputs["dv"].dtype)
        for extra, ref in zip(extras, sums, strict=True):
            outputs[f"d_{extra.name}"][...] = ref[...]


def backward_full(
    plan: Plan, walk: Walk, numbers: Any, q: Any, k: Any, v: Any, extras: dict[str, Any], back: tuple[Any, Any, Any]
) -> dict[str, Any]:
    """The gradients of extras with a number per pair, (B, heads, N, M), summed over the heads that share them."""
    call = Call(plan, "full", walk, numbers)
    _inputs(call, q, k, v, extras, back)
    layout = plan.layout
    heads = layout.lanes_h * plan.full_heads
    per = layout.groups * layout.repeats // heads
    scratch: list[BlockShape] = []
    for extra in plan.wanted("full"):
        index = lambda at: (at.b, divided(at.h, per)[0], at.i, at.j)  # noqa: E731
        shape = (q.shape[0], heads, q.shape[1], k.shape[1])
        call.write(f"d_{extra.name}", shape, WIDE, (None, None, "i", "j"), index)
        scratch.append(("j", "i"))
    return {name.removeprefix("d_"): x for name, x in call.run(_backward_full, scratch).items()}


def _backward_full(tile: Tile, outputs: dict[str, Any]) -> None:
    extras, where = tile.plan.wanted("full"), tile.where

    @pl.when(where.turn == 0)
    def _():
        for ref in tile.scratch:
            ref[...] = jnp.zeros(ref.shape, WIDE)

    def work(part: Tile, masked: bool) -> None:
        _, _, more = _weights(part, masked, [extra.name for extra in extras])
        for ref, d in zip(part.scratch, more, strict=True):
            ref[...] += d

    tile.each(work)

    @pl.when(where.turn == where.turns - 1)
    def _():
        for extra, ref in zip(extras, tile.scratch, strict=True):
            outputs[f"d_{extra.name}"][...] = jnp.transpose(ref[...])


def _weights(tile: Tile, masked: bool, wanted: list[str]) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """p, and the gradients of q·k and of the extras that are asked for."""
    plan, refs = tile.plan, tile.refs
    values, index, q, k, v = _values(plan, refs), _indices(tile), *(refs[n][...] for n in "qkv")
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
