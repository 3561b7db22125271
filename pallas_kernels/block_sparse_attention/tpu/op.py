"""Pallas for TPU: a grid over visited tiles, forward and backward. See `kernels` for the derivation.

Here: the normal form of the operands, the lists, and the derivative. What differs by batch element and head is cut over
devices (`partition`), lists that are made at run time on each device of its own part.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, partition
from pallas_kernels.block_sparse_attention import scores
from pallas_kernels.block_sparse_attention.arguments import Arguments, Extras, Rules
from pallas_kernels.block_sparse_attention.blocks import Blocks
from pallas_kernels.block_sparse_attention.tiles import is_static, tiles_of
from pallas_kernels.block_sparse_attention.tpu import kernels, lists
from pallas_kernels.block_sparse_attention.tpu.plan import Extra, Names, PlaceNames, Plan, padded, refusal, sizes
from pallas_kernels.symbolic_zeros import cotangent
from pallas_kernels.tpu.chips import LANES, Chip, chip_of


@dataclasses.dataclass(frozen=True)
class _Config:
    """What is static in a call; sizes are of the whole, not of a device's part."""

    rules: Rules
    chip: Chip
    queries: int
    keys: int
    block_q: int
    block_k: int
    extras: tuple[Extra, ...]
    names: Names
    axes: tuple[str, ...]  # of the extras, and of the arrays of `blocks`, for `partition`
    blocks: tuple[int, int] | None
    cut_heads: bool

    def axes_of(self, axes: str) -> str:
        """Axes with the letters of heads only where heads may be cut over devices."""
        return axes if self.cut_heads else axes.replace("H", "X").replace("G", "Y")


def supports(args: Arguments) -> str | None:
    """Why the kernels cannot take `args`; None when they can."""
    return refusal(args, chip_of(dispatch.current_device_kind())) or partition.refusal()


def run(args: Arguments) -> tuple[jax.Array, jax.Array]:
    """y (B, N, H, E) in the dtype of q, and lse (B, N, H) in float32."""
    chip = chip_of(dispatch.current_device_kind())
    chosen = sizes(args, chip)
    assert chosen is not None  # what `supports` said
    (b, n, h, _), (_, m, g, _) = args.q.shape, args.k.shape
    extras, names, arrays = _named(args)
    arrays = {extra.name: _whole(extra, arrays[extra.name], *chosen) for extra in extras}
    lists_ = [] if args.blocks is None else [args.blocks.indices, args.blocks.counts]
    own = args.rules.mask.heads == 1 and all(e.kind != "full" or arrays[e.name].shape[1] == h for e in extras)

    def axes(x: jax.Array) -> str:
        letters = ["B" if x.shape[0] == b else "x", {h: "H", g: "G"}.get(x.shape[1], "y") if x.shape[1] > 1 else "y"]
        return "".join(letters) + "zw"[: x.ndim - 2]

    config = _Config(
        rules=args.rules,
        chip=chip,
        queries=n,
        keys=m,
        block_q=chosen[0],
        block_k=chosen[1],
        extras=extras,
        names=names,
        axes=tuple(axes(x) for x in (*arrays.values(), *lists_)),
        blocks=None if args.blocks is None else (args.blocks.block_q, args.blocks.block_k),
        cut_heads=own,
    )
    q, k, v = padded(args.q, 1, chosen[0]), padded(args.k, 1, chosen[1]), padded(args.v, 1, chosen[1])
    y, lse = _attention(config, *partition.same_manual_axes((q, k, v, tuple(arrays.values()), tuple(lists_))))
    return y[:, :n], jnp.moveaxis(lse[:, :, 0, :n], 1, 2)


# ---- operands


def _named(args: Arguments) -> tuple[tuple[Extra, ...], Names, dict[str, jax.Array]]:
    """The extras by name, (B|1, H|G|1, N|1, M|1|S); floating ones as they are, the others int32."""
    x, made, arrays = args.extras, [], {}

    def add(name: str, array: jax.Array, ids: str | None = None) -> str:
        array = array.reshape(array.shape[0], -1, *array.shape[3:])
        if not jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(jnp.int32)
        rows, columns = (size > 1 for size in array.shape[2:])
        kind = {(False, False): "scalar", (True, False): "row", (False, True): "column", (True, True): "full"}
        made.append(Extra(name, "table" if ids else kind[rows, columns], ids))
        arrays[name] = array
        return name

    if x.bias is not None:
        add("bias", x.bias)
    if x.scale is not None:
        add("scale", x.scale)
    mods = []
    for number, (plain, table, ids) in enumerate(zip(x.mods, x.mod_tables, x.mod_ids, strict=True)):
        if plain is None and table.shape[3] == 1:  # the same for all queries: looked up here
            plain = scores.looked_up(table, ids, args.accumulator)
        if plain is not None:
            mods.append(add(f"mod{number}", plain))
        else:
            mods.append(add(f"mod{number}", table, add(f"mod{number}_ids", ids)))
    places = []
    for number, (queries, keys, table, groups) in enumerate(zip(x.queries, x.keys, x.tables, x.groups, strict=True)):
        if table is not None:
            ids = add(f"groups{number}", groups)
            places.append(PlaceNames(table=add(f"table{number}", table.astype(jnp.float32), ids)))
            continue
        names = [
            tuple(add(f"{name}{number}_{at}", a) for at, a in enumerate(each))
            for name, each in (("queries", queries), ("keys", keys))
        ]
        places.append(PlaceNames(*names))
    if x.query_ids is not None:
        add("query_ids", x.query_ids)
        add("key_ids", x.key_ids)
    names = Names(x.bias is not None, tuple(mods), x.scale is not None, x.query_ids is not None, tuple(places))
    return tuple(made), names, arrays


def _whole(extra: Extra, x: jax.Array, block_q: int, block_k: int) -> jax.Array:
    """Whole blocks, (B|1, H|G|1, 1, N), (…, 1, M), (…, N, M) or (…, N, S)."""
    if extra.kind == "row":
        return padded(jnp.swapaxes(x, 2, 3), 3, block_q)
    if extra.kind == "column":
        return padded(x, 3, block_k)
    if extra.kind == "scalar":
        return x
    return padded(padded(x, 2, block_q), 3, block_k if extra.kind == "full" else LANES)


def _planned(config: _Config, wanted: frozenset[str], q, k, arrays, lists_):
    """The plan, and the walks, of a device's part."""
    g = k.shape[2]
    by_name = dict(zip((extra.name for extra in config.extras), arrays, strict=True))

    def five(name: str, rows: bool = False, size: int | None = None) -> jax.Array:
        x = by_name[name]
        if rows:
            x = jnp.swapaxes(x, 2, 3)[:, :, : config.queries]
        elif size is None:
            x = x[:, :, :, : config.keys]
        else:
            x = x[:, :, : config.queries] > 0.5
        heads = (1, 1) if x.shape[1] == 1 else (g, x.shape[1] // g)
        return x.reshape(x.shape[0], *heads, *x.shape[2:])

    def ids_of(table: str | None) -> jax.Array | None:
        return None if table is None else five(next(e.ids for e in config.extras if e.name == table))

    places = config.names.places
    row = {extra.name: extra.kind == "row" for extra in config.extras}
    x = Extras(
        queries=tuple(tuple(five(name, rows=row[name]) for name in place.queries) for place in places),
        keys=tuple(tuple(five(name) for name in place.keys) for place in places),
        tables=tuple(None if place.table is None else five(place.table, size=1) for place in places),
        groups=tuple(ids_of(place.table) for place in places),
        query_ids=five("query_ids", rows=row["query_ids"]) if config.names.segments else None,
        key_ids=five("key_ids") if config.names.segments else None,
    )
    shapes = [jax.ShapeDtypeStruct((a.shape[0], n, *a.shape[2:]), a.dtype) for a, n in
              ((q, config.queries), (k, config.keys))]  # fmt: skip
    blocks = None if config.blocks is None else Blocks(*lists_, *config.blocks)
    args = Arguments(shapes[0], shapes[1], shapes[1], x, blocks, config.rules)
    layout, tiles = tiles_of(args, config.block_q, config.block_k)
    masks = lists.masks_of(config.rules.mask, layout) if is_static(args) else None
    patterns, number = lists.patterns(config.rules.mask, layout, tiles)
    full = [by_name[e.name].shape[1] for e in config.extras if e.kind == "full" and e.name in wanted]
    plan = Plan(
        layout=layout,
        rules=config.rules,
        chip=config.chip,
        extras=config.extras,
        names=config.names,
        masks=None if masks is None else masks[0],
        evaluates=not is_static(args),
        patterns=patterns,
        differentiated=wanted,
        full_heads=max([1, *(size // layout.lanes_h for size in full)]),
    )
    return plan, lists.walks(layout, tiles, None if masks is None else masks[1], number), by_name


# ---- the calls


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config: _Config, q, k, v, arrays, lists_):
    """y (B, N', H, E) and lse (B, H, 1, N')."""
    local = partition.batched_and_partitioned(
        functools.partial(_run_forward, config), _inputs(config), tuple(map(config.axes_of, ("BNHE", "BHON")))
    )
    return local(q, k, v, *_numbers(q), *arrays, *lists_)


def _attention_forward(config: _Config, *arguments):
    arrays = arguments[3]
    marks = {
        extra.name: ()
        for extra, x in zip(config.extras, arrays, strict=True)
        if x.perturbed and jnp.issubdtype(x.value.dtype, jnp.floating)
    }
    arguments = jax.tree.map(lambda x: x.value, arguments)
    y, lse = _attention(config, *arguments)
    return (y, lse), (arguments, y, lse, marks)


def _attention_backward(config: _Config, residuals, cotangents):
    (q, k, v, arrays, lists_), y, lse, marks = residuals
    dy, dlse = map(cotangent, cotangents)
    dy = jnp.zeros_like(y) if dy is None else dy
    delta = jnp.moveaxis((dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1), 1, 2)[:, :, None]
    delta = delta if dlse is None else delta - dlse
    wanted = [extra for extra in config.extras if extra.name in marks]
    kinds = {"full": "BHNM", "table": "BHNS", "column": "BHM", "row": "BHON", "scalar": "BHON"}
    outputs = [kinds[e.kind] if e.kind != "full" or config.cut_heads else "BXNM" for e in wanted]
    inputs = (*_inputs(config)[:5], "BNHE", "BHON", "BHON", *_inputs(config)[5:])
    local = partition.batched_and_partitioned(
        functools.partial(_run_backward, config, frozenset(marks)),
        tuple(map(config.axes_of, inputs)),
        tuple(map(config.axes_of, ("BNHD", "BMGD", "BMGE", *outputs))),
    )
    finite = jnp.where(lse == -jnp.inf, 0, lse)
    dq, dk, dv, *more = local(q, k, v, *_numbers(q), dy, finite, delta, *arrays, *lists_)
    found = {e.name: _summed(e, d, x) for e, d, x in zip(
        wanted, more, (a for e, a in zip(config.extras, arrays, strict=True) if e.name in marks), strict=True
    )}  # fmt: skip
    return dq, dk, dv, tuple(found.get(extra.name) for extra in config.extras), None


_attention.defvjp(_attention_forward, _attention_backward, symbolic_zeros=True)


def _summed(extra: Extra, d: jax.Array, x: jax.Array) -> jax.Array:
    """The gradient of an extra from those per batch element and head."""
    if extra.kind == "scalar":
        d = d.sum(-1, keepdims=True)
    elif extra.kind == "column":
        d = d[:, :, None]
    d = d.sum(0, keepdims=True) if x.shape[0] == 1 else d
    if d.shape[1] != x.shape[1]:
        d = d.reshape(d.shape[0], x.shape[1], -1, *d.shape[2:]).sum(2)
    return d.astype(x.dtype)


def _numbers(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numbers of batch elements and heads, of which a device gets its own."""
    numbers = jnp.arange(q.shape[0], dtype=jnp.int32), jnp.arange(q.shape[2], dtype=jnp.int32)
    return partition.same_manual_axes((*numbers, q))[:2]


def _inputs(config: _Config) -> tuple[str, ...]:
    return tuple(map(config.axes_of, ("BNHD", "BMGD", "BMGE", "B", "H", *config.axes)))


def _run_forward(config: _Config, q, k, v, bs, hs, *rest):
    count = len(config.extras)
    plan, (by_row, _), arrays = _planned(config, frozenset(), q, k, rest[:count], rest[count:])
    if isinstance(by_row.total, int) and not by_row.total:
        shape = (q.shape[0], q.shape[2], 1, q.shape[1])
        return jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype), jnp.full(shape, -jnp.inf, jnp.float32)
    return kernels.forward(plan, by_row, (bs, hs), q, k, v, arrays)


def _run_backward(config: _Config, wanted: frozenset[str], q, k, v, bs, hs, dy, lse, delta, *rest):
    count = len(config.extras)
    plan, (by_row, by_column), arrays = _planned(config, wanted, q, k, rest[:count], rest[count:])
    operands, back = ((bs, hs), q, k, v, arrays), (dy, lse, delta)
    if isinstance(by_row.total, int) and not by_row.total:
        empty = [jnp.zeros(_full_shape(e, arrays[e.name], q, k), jnp.float32) for e in plan.wanted(*KINDS)]
        return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v), *empty
    found = kernels.backward_rows(plan, by_row, *operands, back)
    found |= kernels.backward_columns(plan, by_column, *operands, back)
    if plan.wanted("full"):
        found |= kernels.backward_full(plan, by_row, *operands, back)
    for extra in plan.wanted("column"):
        d = found[extra.name]
        found[extra.name] = d.reshape(d.shape[0], -1, d.shape[3])
    return *(found[name] for name in "qkv"), *(found[e.name] for e in config.extras if e.name in wanted)


KINDS = ("scalar", "row", "column", "full", "table")


def _full_shape(extra: Extra, x: jax.Array, q: jax.Array, k: jax.Array) -> tuple[int, ...]:
    """Of a gradient per batch element and head."""
    b, n, h, _ = q.shape
    return {
        "column": (b, h, k.shape[1]),
        "full": (b, x.shape[1], n, k.shape[1]),
        "table": (b, h, n, x.shape[3]),
    }.get(extra.kind, (b, h, 1, n))
