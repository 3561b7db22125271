"""From products of queries and keys to scores and to what is allowed, on any tile; shared by all implementations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import array_masks
from pallas_kernels.block_sparse_attention.arguments import Extras, Rules
from pallas_kernels.masks import Mask

LARGEST_ONE_HOT = 512  # entries of a table that are looked up by a product, whose transpose is no scatter


class Indices(NamedTuple):
    """Indices that broadcast to (B, G, R, N, M) of a tile."""

    b: jax.Array
    h: jax.Array
    i: jax.Array
    j: jax.Array


def of(batch: int, groups: int, repeats: int, i: jax.Array, j: jax.Array) -> Indices:
    """Indices of all batch elements and heads, of queries `i` (N,) and keys `j` (M,)."""
    b = jnp.arange(batch)[:, None, None, None, None]
    h = jnp.arange(groups * repeats).reshape(groups, repeats, 1, 1)
    return Indices(b, h, i[:, None], j)


def modified(rules: Rules, products: jax.Array, x: Extras, at: Indices) -> jax.Array:
    """Scores from q·k, both (B, G, R, N, M) in the accumulator; differentiable in the floating arrays of `x`."""
    scores = products * (rules.scale if x.scale is None else x.scale.astype(products.dtype))
    if rules.softcap is not None:
        scores = rules.softcap * jnp.tanh(scores / rules.softcap)
    if x.bias is not None:
        scores = scores + x.bias.astype(scores.dtype)
    if rules.function is not None:
        values = [
            looked_up(table, ids, scores.dtype) if value is None else value
            for value, table, ids in zip(x.mods, x.mod_tables, x.mod_ids, strict=True)
        ]
        scores = jnp.asarray(rules.function(scores, *at, *values)).astype(scores.dtype)
    return scores


def allowed(mask: Mask, x: Extras, at: Indices) -> jax.Array:
    """Booleans that broadcast to (B, G, R, N, M); `mask` has one rule for all heads of the tile."""
    places = [lambda p=p: _place(mask, p, x, at) for p in range(len(x.queries))]
    seen = array_masks.allowed(mask, at.i, at.j, places)
    return seen if x.query_ids is None else seen & (x.query_ids == x.key_ids)


def allowed_by_heads(mask: Mask, x: Extras, at: Indices) -> jax.Array:
    """As `allowed`, of a mask that may have a rule for each of all heads, which `at` then holds."""
    if mask.heads == 1:
        return allowed(mask, x, at)
    groups, repeats = at.h.shape[:2]
    shape = jnp.broadcast_shapes(*(a.shape for a in at))
    each = [jnp.broadcast_to(allowed(mask.head(h), x, at), shape) for h in range(mask.heads)]
    return jnp.stack([one[:, h // repeats, h % repeats] for h, one in enumerate(each)], 1).reshape(
        shape[0], groups, repeats, *shape[3:]
    )


def map_extras(f: Callable[..., Any], x: Extras, *others: Extras) -> Extras:
    """`f(array, whether its last axis is looked up rather than one of keys, …)` of each array."""
    marks = jax.tree.map(lambda _: False, x)
    marks = marks._replace(**{n: jax.tree.map(lambda _: True, getattr(x, n)) for n in ("tables", "mod_tables")})
    return jax.tree.map(f, x, marks, *others)


def _place(mask: Mask, number: int, x: Extras, at: Indices) -> jax.Array:
    if x.tables[number] is None:
        return array_masks.rule_of(mask, number)(at.i, at.j, *x.queries[number], *x.keys[number])
    table, groups = x.tables[number], x.groups[number]
    inside = (groups >= 0) & (groups < table.shape[-1])
    return _gathered(table, jnp.where(inside, groups, 0)) & inside


def looked_up(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """(B|1, G|1, R|1, N|1, S) at (B|1, 1, 1, 1, M): (B|1, G|1, R|1, N|1, M)."""
    if not jnp.issubdtype(table.dtype, jnp.floating) or table.shape[-1] > LARGEST_ONE_HOT:
        return _gathered(table, ids)
    chosen = jax.nn.one_hot(ids[:, 0, 0, 0], table.shape[-1], dtype=dtype)
    shape = jnp.broadcast_shapes(table.shape[:1], chosen.shape[:1])
    table, chosen = (jnp.broadcast_to(a, (*shape, *a.shape[1:])) for a in (table, chosen))
    return jnp.einsum("bgrns,bms->bgrnm", table.astype(dtype), chosen, precision="highest")


def _gathered(table: jax.Array, ids: jax.Array) -> jax.Array:
    batch = max(table.shape[0], ids.shape[0])
    ids = jnp.broadcast_to(ids, (batch, *table.shape[1:-1], ids.shape[-1]))
    return jnp.take_along_axis(jnp.broadcast_to(table, (batch, *table.shape[1:])), ids, axis=-1)
