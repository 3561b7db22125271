"""Block-sparse attention in plain JAX: every platform, forward and backward, in memory linear in the tokens and tiles.

A sweep goes over the list of visited tiles (`tiles`), a few tiles of one query block at a time, and for all batch
elements and heads that share the list at once. It slices the keys and values of the tiles out, takes the two products
with an online softmax between them, in float32, and writes the rows. The backward pass sweeps over the same list once:
it makes the weights anew from the log of their sums,

    p = exp(s - lse)    dv += pᵀ dy    ds = p (dy·v - dy·y + dlse)    dq += scale ds k    dk += scale dsᵀ q

and adds the gradients of keys and values, and of the bias and the arrays of `score_mod`, in place. What lies between
the product q·k and the score (softcap, bias, `score_mod`) is differentiated by JAX, a tile at a time.

`sizes_of` weighs larger tiles, with more pairs that are masked, against more steps.

Of few queries, as in decoding, the list is long and a step small. It is then cut into runs of equally many steps, which
are done side by side, each with its own part of the keys, and joined by lse. The list and not the axis of keys is cut:
the runs are as long as each other whatever the lengths are. The backward pass is the one sweep, from the joined lse.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.block_lists import lower_heads
from pallas_kernels.block_sparse_attention import scores
from pallas_kernels.block_sparse_attention.arguments import Arguments, Extras, Rules
from pallas_kernels.block_sparse_attention.parts import merge_attention
from pallas_kernels.block_sparse_attention.scores import Indices
from pallas_kernels.block_sparse_attention.tiles import Layout, Tiles, head_of, is_static, tiles_of
from pallas_kernels.masks import Mask
from pallas_kernels.partition import same_manual_axes
from pallas_kernels.promotion import numpy_ranks
from pallas_kernels.symbolic_zeros import cotangent

# In elements of scores, measured on CPU (README.md): what a step costs beside its scores, and the most in one step.
STEP_COST = 1 << 13
MOST_SCORES = 1 << 21
SIZES = (64, 128, 256, 512)
TOGETHER = (1, 2, 4, 8)
# Of a split of decoding: the most queries, the most runs, and the fewest steps of a run, where no tile is left out.
SPLIT_QUERIES = 16
MOST_SPLITS = 8
STEPS_OF_SPLIT = 4
MOST_BLOCKS = 1 << 20  # of a lowering that is only weighed


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static in a sweep; `together` tiles of a row are one step, and `splits` runs of steps go side by side.

    `as_stored` says that keys and values are read where they are, tokens before heads, instead of being turned first.
    """

    layout: Layout
    rules: Rules
    together: int
    precision: lax.Precision
    dtype: Any
    splits: int = 1
    as_stored: bool = False


class _Steps(NamedTuple):
    """The list as steps: row and first tile of each, (steps,) int32; how many count; and the tiles.

    `stored` is where the keys of each tile are: its column, or a page of a cache.
    """

    row: jax.Array
    first: jax.Array
    total: jax.Array
    tiles: Tiles
    stored: jax.Array


class _Tensors(NamedTuple):
    """q (B, G, R, N', D), k (B, G, 1, M', D), v (B, G, 1, M', E), N' and M' whole blocks, and the extras.

    As they are stored, k is (B|1, M', G, D) and v (B|1, M', G, E); the 1 is that of pages, which elements share.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    extras: Extras


class _Place(NamedTuple):
    """Where a step is: its batch element, group and head (of the first of what shares a lane), query block, keys.

    `stored` are the blocks of k and v that hold the keys of `columns`.
    """

    b: jax.Array
    g: jax.Array
    r: jax.Array
    i: jax.Array
    columns: jax.Array
    stored: jax.Array


def supports(args: Arguments) -> str | None:
    """None: it takes all arguments."""
    return None


@jax.jit
def run(args: Arguments) -> tuple[jax.Array, jax.Array]:
    """y (B, N, H, E) in the dtype of q, and lse (B, N, H) in the accumulator."""
    block_q, block_k, together = _chosen_sizes(args)
    layout, tiles = tiles_of(args, block_q, block_k)
    plan = _Plan(
        layout, args.rules, together, args.precision, args.accumulator, splits_of(layout, tiles.row.size // together)
    )
    b, n, h, _ = args.q.shape
    q = args.q.reshape(b, n, layout.groups, layout.repeats, -1)
    x = _Tensors(
        _padded(jnp.moveaxis(q, 1, 3), 3, block_q),
        *(_padded(jnp.swapaxes(a, 1, 2)[:, :, None], 3, block_k) for a in (args.k, args.v)),
        _padded_extras(layout, args.extras),
    )
    y, lse = _sweep(plan, *same_manual_axes((x, _steps(plan, tiles))))
    y, lse = (jnp.moveaxis(a[:, :, :, :n], 3, 1) for a in (y, lse))
    return y.reshape(b, n, h, -1), lse.reshape(b, n, h)


# Sizes


def _chosen_sizes(args: Arguments) -> tuple[int, int, int]:
    (b, n, h, _), m = args.q.shape, args.k.shape[1]
    if args.blocks is not None:
        block_q, block_k = min(args.blocks.block_q, n), min(args.blocks.block_k, m)
        lanes = args.blocks.indices.shape[0] * args.blocks.indices.shape[1]
        most = max(1, MOST_SCORES // (b * h // lanes * block_q * block_k))
        wanted = max(1, min(args.blocks.indices.shape[3], 512 // block_k, most))
        return args.blocks.block_q, args.blocks.block_k, max(c for c in TOGETHER if c <= wanted)
    return sizes_of(args.rules.mask, n, m, b * h, is_static(args))


@functools.lru_cache(maxsize=1024)
def sizes_of(mask: Mask, queries: int, keys: int, batch: int, static: bool) -> tuple[int, int, int]:
    """Queries and keys of a tile, and tiles of a step, of the least cost.

    Args:
      mask: who may see whom.
      queries: N.
      keys: M.
      batch: B·H.
      static: whether the tiles are known when tracing; otherwise they are kept small, as many may turn out empty.
    """
    shared = batch if mask.heads == 1 else batch // mask.heads
    options = [sorted({min(size, length) for size in SIZES}) for length in (queries, keys)]
    if not static:
        options = [[size for size in sizes if size <= 128] or sizes[:1] for sizes in options]
    pairs = [
        pair
        for pair in itertools.product(*options)
        if -(-queries // pair[0]) * -(-keys // pair[1]) <= MOST_BLOCKS or pair == tuple(o[-1] for o in options)
    ]

    def cost(choice: tuple[tuple[int, int], int]) -> tuple[bool, float]:
        (block_q, block_k), together = choice
        counts = np.concatenate([one.counts for one in lower_heads(mask, queries, keys, block_q, block_k)])
        steps = int((-(-counts // together)).sum())
        elements = shared * block_q * block_k * together
        return elements > MOST_SCORES, steps * (STEP_COST + elements + shared * together * block_k * 8)

    (block_q, block_k), together = min(itertools.product(pairs, TOGETHER), key=cost)
    return block_q, block_k, together


def splits_of(layout: Layout, steps: int) -> int:
    """Runs into which a list of up to `steps` steps is cut: one, unless there are few queries."""
    if layout.queries > SPLIT_QUERIES:
        return 1
    room = layout.keys // (layout.queries * layout.repeats)  # so that the parts of y have no more elements than v
    return max(1, min(MOST_SPLITS, steps // STEPS_OF_SPLIT, room))


def _steps(plan: _Plan, tiles: Tiles, stored: jax.Array | None = None) -> _Steps:
    size, rows = plan.together, plan.layout.rows
    static = isinstance(tiles.row, np.ndarray)
    lib = np if static else jnp
    counts = lib.diff(tiles.offsets)
    per_row = -(-counts // size)
    if static:
        row = np.repeat(np.arange(rows, dtype=np.int32), per_row)
        within = np.arange(row.size) - np.repeat(np.cumsum(per_row) - per_row, per_row)
        count = row.size
    else:
        width = -(-(tiles.row.size // rows) // size)
        there = (jnp.arange(width) < per_row[:, None]).reshape(-1)
        (at,) = jnp.nonzero(there, size=there.size, fill_value=0)
        row, within, count = at // width, at % width, per_row.sum()
    first = tiles.offsets[row] + within * size
    stored = jnp.pad(jnp.asarray(tiles.column if stored is None else stored, jnp.int32), (0, size))
    column, full = (lib.pad(x, (0, size)) for x in (tiles.column, tiles.full))
    tiles = Tiles(jnp.zeros((), jnp.int32), jnp.asarray(column), jnp.asarray(full), jnp.asarray(tiles.offsets))
    # One step at least, so that there is something to slice where nothing is visited.
    row, first = (jnp.asarray(lib.pad(x, (0, 1)), jnp.int32) for x in (row, first))
    return _Steps(row, first, jnp.asarray(count, jnp.int32), tiles, stored)


# Layout


def _padded(x: jax.Array, axis: int, block: int) -> jax.Array:
    extra = -x.shape[axis] % block
    return jnp.pad(x, [(0, extra if a == axis else 0) for a in range(x.ndim)]) if extra else x


def _padded_extras(layout: Layout, x: Extras) -> Extras:
    def pad(a: jax.Array, table: bool) -> jax.Array:
        a = _padded(a, 3, layout.block_q) if a.shape[3] > 1 else a
        return a if table or a.shape[4] == 1 else _padded(a, 4, layout.block_k)

    return scores.map_extras(pad, x)


def _place(plan: _Plan, steps: _Steps, t: jax.Array) -> tuple[_Place, jax.Array, jax.Array, jax.Array]:
    """Where step t is; which of its tiles count; whether all do and are full; and whether it begins a row."""
    layout, size = plan.layout, plan.together
    row, first = steps.row[t], steps.first[t]
    lane, i = row // layout.q_blocks, row % layout.q_blocks
    b, h = lane // layout.lanes_h, lane % layout.lanes_h
    per_head = layout.lanes_h > layout.groups
    g, r = (h // layout.repeats, h % layout.repeats) if per_head else (h, jnp.zeros_like(h))
    cut = functools.partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
    columns, full, stored = (cut(x) for x in (steps.tiles.column, steps.tiles.full, steps.stored))
    counted = jnp.arange(size) < steps.tiles.offsets[row + 1] - first
    # In place of tiles that do not count the first one, which does: what it reads is there.
    columns, stored = (jnp.where(counted, x, x[0]) for x in (columns, stored))
    return _Place(b, g, r, i, columns, stored), counted, (counted & full).all(), first == steps.tiles.offsets[row]


def _window(plan: _Plan, x: jax.Array, at: _Place, c: int | None, *, rows: int | None, keys: int | None):
    """Start and size of what a tile sees of `x`; `rows` and `keys` name the axes of tokens, where they are cut."""
    layout = plan.layout
    start, size = [], []
    for axis, (first, inner) in enumerate(zip((at.b, at.g, at.r), layout.inner, strict=True)):
        whole = x.shape[axis] == 1
        start.append(0 if whole else first)
        size.append(1 if whole else inner)
    for axis in range(3, x.ndim):
        if axis == rows:
            start.append(at.i * layout.block_q)
            size.append(layout.block_q)
        elif axis == keys:
            # Axis 3 is that of k and v themselves, axis 4 that of keys in what belongs to pairs.
            start.append((at.stored if axis == 3 else at.columns)[c] * layout.block_k)
            size.append(layout.block_k)
        else:
            start.append(0)
            size.append(x.shape[axis])
    # Of one type, also in 64-bit mode, where Python's 0 is wider than what was computed.
    return [jnp.asarray(place, jnp.int32) for place in start], size


def _fetch(plan: _Plan, x: jax.Array, at: _Place, *, rows: int | None = None, keys: int | None = None) -> jax.Array:
    count = 1 if keys is None else plan.together
    return _read(x, [_window(plan, x, at, c, rows=rows, keys=keys) for c in range(count)], keys)


def _add(
    plan: _Plan, total: jax.Array, part: jax.Array, at: _Place, *, rows: int | None = None, keys: int | None = None
) -> jax.Array:
    """The transpose of `_fetch`, in place."""
    count = 1 if keys is None else plan.together
    return _added(total, part, [_window(plan, total, at, c, rows=rows, keys=keys) for c in range(count)], keys)


def _read(x: jax.Array, windows: list[Any], axis: int | None) -> jax.Array:
    """What the windows show, joined along an axis."""
    parts = [lax.dynamic_slice(x, *window) for window in windows]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _added(total: jax.Array, part: jax.Array, windows: list[Any], axis: int | None) -> jax.Array:
    """The transpose of `_read`, in place."""
    for c, (start, size) in enumerate(windows):
        own = part if axis is None else lax.slice_in_dim(part, c * size[axis], (c + 1) * size[axis], axis=axis)
        total = lax.dynamic_update_slice(total, lax.dynamic_slice(total, start, size) + own.astype(total.dtype), start)
    return total


def _stored(plan: _Plan, x: jax.Array, at: _Place) -> list[Any]:
    """Start and size of the keys of each tile of a step in (B|1, M', G, D)."""
    batch, groups, _ = plan.layout.inner
    size = [min(batch, x.shape[0]), plan.layout.block_k, groups, x.shape[3]]
    b = 0 if x.shape[0] == 1 else at.b
    starts = ((b, at.stored[c] * plan.layout.block_k, at.g, 0) for c in range(plan.together))
    return [([jnp.asarray(place, jnp.int32) for place in start], size) for start in starts]


def _fetch_keys(plan: _Plan, x: jax.Array, at: _Place) -> jax.Array:
    """The keys or values of a step, (B, G, 1, m, D); of a cache no more than these are turned."""
    if not plan.as_stored:
        return _fetch(plan, x, at, keys=3)
    return jnp.swapaxes(_read(x, _stored(plan, x, at), 1), 1, 2)[:, :, None]


def _add_keys(plan: _Plan, total: jax.Array, part: jax.Array, at: _Place) -> jax.Array:
    """The transpose of `_fetch_keys`, in place."""
    if not plan.as_stored:
        return _add(plan, total, part, at, keys=3)
    return _added(total, jnp.swapaxes(part[:, :, 0], 1, 2), _stored(plan, total, at), 1)


def _axes(x: jax.Array, table: bool) -> dict[str, int | None]:
    return {"rows": 3 if x.shape[3] > 1 else None, "keys": None if table or x.shape[4] == 1 else 4}


# A tile


def _indices(plan: _Plan, at: _Place) -> Indices:
    layout = plan.layout
    batch, groups, repeats = layout.inner
    b = at.b + jnp.arange(batch)[:, None, None, None, None]
    h = (at.g + jnp.arange(groups))[:, None] * layout.repeats + at.r + jnp.arange(repeats)
    i = at.i * layout.block_q + jnp.arange(layout.block_q)
    j = (at.columns[:, None] * layout.block_k + jnp.arange(layout.block_k)).reshape(-1)
    return Indices(b, h[..., None, None], i[:, None], j)


def _allowed(plan: _Plan, x: Extras, at: _Place, index: Indices, counted: jax.Array, full: jax.Array) -> jax.Array:
    layout, mask = plan.layout, plan.rules.mask
    # Rows that pad the last block are left unmasked: nothing is read of them.
    there = jnp.repeat(counted, layout.block_k) & (index.j < layout.keys)

    def evaluate(rule: Mask) -> jax.Array:
        seen = scores.allowed(rule, x, index) & there
        return jnp.broadcast_to(seen, (1,) * (5 - seen.ndim) + seen.shape)

    if mask.heads == 1:
        rules = [mask]
        own = functools.partial(evaluate, mask)
    else:
        of_lane = [head_of(layout, mask, lane) for lane in range(layout.lanes_h)]
        rules = list(dict.fromkeys(of_lane))
        number = jnp.asarray([rules.index(rule) for rule in of_lane])
        lane = at.g if layout.lanes_h == layout.groups else at.g * layout.repeats + at.r

        def own():
            return lax.switch(number[lane], [functools.partial(evaluate, rule) for rule in rules])

    shape = jax.eval_shape(functools.partial(evaluate, rules[0]))
    everything = jnp.ones(shape.shape, bool) | there[:1]  # varies over the mesh as the other branch does
    return lax.cond(full, lambda: everything, own)


def _dot(plan: _Plan, equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, precision=plan.precision, preferred_element_type=plan.dtype)


def _products(plan: _Plan, q: jax.Array, k: jax.Array) -> jax.Array:
    """(B, G, R, n, D) and (B, G, 1, m, D) to (B, G, R, n, m): one product for the heads of a group."""
    b, g, r, n, d = q.shape
    return _dot(plan, "bgnd,bgmd->bgnm", q.reshape(b, g, r * n, d), k[:, :, 0]).reshape(b, g, r, n, -1)


def _rows(plan: _Plan, p: jax.Array, v: jax.Array) -> jax.Array:
    """(B, G, R, n, m) and (B, G, 1, m, E) to (B, G, R, n, E)."""
    b, g, r, n, m = p.shape
    return _dot(plan, "bgnm,bgme->bgne", p.reshape(b, g, r * n, m).astype(v.dtype), v[:, :, 0]).reshape(b, g, r, n, -1)


def _columns(plan: _Plan, p: jax.Array, y: jax.Array) -> jax.Array:
    """(B, G, R, n, m) and (B, G, R, n, E) to (B, G, 1, m, E)."""
    b, g, r, n, m = p.shape
    y = y.reshape(b, g, r * n, -1)
    return _dot(plan, "bgnm,bgne->bgme", p.reshape(b, g, r * n, m).astype(y.dtype), y)[:, :, None]


# The sweep


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sweep(plan: _Plan, x: _Tensors, steps: _Steps) -> tuple[jax.Array, jax.Array]:
    """y (B, G, R, N', E) in the dtype of q, and lse (B, G, R, N')."""
    if plan.splits == 1:
        return _swept(plan, x, steps, jnp.zeros((), jnp.int32), steps.total, x.q.dtype)
    size = -(-steps.total // plan.splits)
    first = jnp.arange(plan.splits, dtype=jnp.int32) * size
    y, lse = jax.vmap(lambda first: _swept(plan, x, steps, first, size, plan.dtype))(first)
    y, lse = merge_attention(list(zip(y, lse, strict=True)))
    return y.astype(x.q.dtype), lse


def _swept(plan: _Plan, x: _Tensors, steps: _Steps, first: jax.Array, count: jax.Array, dtype: Any):
    """The part that the steps from `first` on have in y and lse; those behind the last step of the list have none."""
    shape, inner = x.q.shape[:4], (*plan.layout.inner, plan.layout.block_q)
    least = jnp.finfo(plan.dtype).min

    def step(t, carry):
        y, lse, sums, top, total = carry
        there = first + t < steps.total
        at, counted, full, begins = _place(plan, steps, jnp.minimum(first + t, steps.total - 1))
        counted, full, begins = counted & there, full & there, (begins & there) | (t == 0)
        some = scores.map_extras(lambda a, table: _fetch(plan, a, at, **_axes(a, table)), x.extras)
        index = _indices(plan, at)
        q, k, v = _fetch(plan, x.q, at, rows=3), _fetch_keys(plan, x.k, at), _fetch_keys(plan, x.v, at)
        s = scores.modified(plan.rules, _products(plan, q, k), some, index)
        seen = _allowed(plan, some, at, index, counted, full)
        s = jnp.where(seen, s, least)
        top = jnp.where(begins, least, top)
        higher = jnp.maximum(top, s.max(-1))
        shrink = jnp.where(begins, 0, jnp.exp(top - higher))
        p = jnp.where(seen, jnp.exp(s - higher[..., None]), 0)
        sums = sums * shrink[..., None] + _rows(plan, p, v)
        total = total * shrink + p.sum(-1)
        empty = total == 0
        divisor = jnp.where(empty, 1, total)
        rows = (sums / divisor[..., None]).astype(y.dtype)
        y = lax.dynamic_update_slice(y, rows, _window(plan, y, at, None, rows=3, keys=None)[0])
        own = jnp.where(empty, -jnp.inf, higher + jnp.log(divisor))
        lse = lax.dynamic_update_slice(lse, own, _window(plan, lse, at, None, rows=3, keys=None)[0])
        return y, lse, sums, higher, total

    size = x.v.shape[-1]
    start = (
        jnp.zeros((*shape, size), dtype),
        jnp.full(shape, -jnp.inf, plan.dtype),
        jnp.zeros((*inner, size), plan.dtype),
        jnp.full(inner, least, plan.dtype),
        jnp.zeros(inner, plan.dtype),
    )
    y, lse, *_ = lax.fori_loop(0, count, step, same_manual_axes((start, x.q))[0])
    return y, lse


def _sweep_forward(plan: _Plan, x: _Tensors, steps: _Steps):
    wanted = jax.tree.map(lambda a: a.perturbed and jnp.issubdtype(a.value.dtype, jnp.floating), x.extras)
    x, steps = jax.tree.map(lambda a: a.value, (x, steps))
    y, lse = _sweep(plan, x, steps)
    marks = tuple(() if one else None for one in jax.tree.leaves(wanted))  # static: as the structure of a tree
    return (y, lse), (x, steps, y, lse, marks)


@numpy_ranks()
def _sweep_backward(plan: _Plan, residuals, cotangents):
    x, steps, y, lse, marks = residuals
    dy, dlse = map(cotangent, cotangents)
    dy = jnp.zeros_like(y) if dy is None else dy
    shared = (dy.astype(plan.dtype) * y.astype(plan.dtype)).sum(-1)
    if dlse is not None:
        shared = shared - dlse
    leaves, structure = jax.tree.flatten(x.extras)
    tables = jax.tree.leaves(scores.map_extras(lambda a, table: table, x.extras))
    places = [place for place, mark in enumerate(marks) if mark is not None]

    def step(t, carry):
        dq, dk, dv, dextras = carry
        at, counted, full, _ = _place(plan, steps, t)
        some = [_fetch(plan, a, at, **_axes(a, table)) for a, table in zip(leaves, tables, strict=True)]
        index = _indices(plan, at)
        q, k, v = _fetch(plan, x.q, at, rows=3), _fetch_keys(plan, x.k, at), _fetch_keys(plan, x.v, at)
        dy_i, lse_i, shared_i = (_fetch(plan, a, at, rows=3) for a in (dy, lse, shared))

        def modified(products, chosen):
            every = list(some)
            for place, value in zip(places, chosen, strict=True):
                every[place] = value
            return scores.modified(plan.rules, products, jax.tree.unflatten(structure, every), index)

        s, pull = jax.vjp(modified, _products(plan, q, k), [some[place] for place in places])
        seen = _allowed(plan, jax.tree.unflatten(structure, some), at, index, counted, full)
        # A row that sees nothing has lse = -inf; its weights are masked, of any finite number.
        p = jnp.where(
            seen, jnp.exp(jnp.where(seen, s, -jnp.inf) - jnp.where(lse_i == -jnp.inf, 0, lse_i)[..., None]), 0
        )
        ds = p * (_products(plan, dy_i, v) - shared_i[..., None])
        ds, more = pull(ds)
        dq = _add(plan, dq, _rows(plan, ds, k), at, rows=3)
        dk = _add_keys(plan, dk, _columns(plan, ds, q), at)
        dv = _add_keys(plan, dv, _columns(plan, p, dy_i), at)
        dextras = [
            _add(plan, total, part, at, **_axes(total, tables[place]))
            for total, part, place in zip(dextras, more, places, strict=True)
        ]
        return dq, dk, dv, dextras

    wide = [jnp.zeros(a.shape, plan.dtype) for a in (x.q, x.k, x.v)]
    dextras = [jnp.zeros(leaves[place].shape, plan.dtype) for place in places]
    start = same_manual_axes(((*wide, dextras), x.q))[0]
    dq, dk, dv, dextras = lax.fori_loop(0, steps.total, step, start)
    found = dict(zip(places, dextras, strict=True))
    every = [found[place].astype(a.dtype) if place in found else None for place, a in enumerate(leaves)]
    grads = [d.astype(a.dtype) for d, a in zip((dq, dk, dv), (x.q, x.k, x.v), strict=True)]
    return _Tensors(*grads, jax.tree.unflatten(structure, every)), None


_sweep.defvjp(_sweep_forward, _sweep_backward, symbolic_zeros=True)
