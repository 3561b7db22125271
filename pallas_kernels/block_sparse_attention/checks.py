"""What arguments of block-sparse attention must be, each named in its error."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.array_masks import Values
from pallas_kernels.block_sparse_attention.arguments import FLOATS, Extras, Indexed, ScoreMod
from pallas_kernels.block_sparse_attention.blocks import Blocks
from pallas_kernels.integers import segments


class Sizes(NamedTuple):
    """B, N, M, H and G."""

    batch: int
    queries: int
    keys: int
    heads: int
    groups: int


def tensors(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Checks q, k and v."""
    for name, x, axes in (("q", q, "(B, N, H, D)"), ("k", k, "(B, M, G, D)"), ("v", v, "(B, M, G, E)")):
        if x.ndim != 4:
            raise ValueError(f"{name} must be {axes}, got shape {x.shape}")
        if 0 in x.shape:
            raise ValueError(f"{name} must have no empty axis, got shape {x.shape}")
        if x.dtype.name not in FLOATS:
            raise TypeError(f"{name} must be one of {', '.join(FLOATS)}, got {x.dtype.name}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype.name}, {k.dtype.name} and {v.dtype.name}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must agree in (B, M, G), got {k.shape} and {v.shape}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in B and D, got {q.shape} and {k.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"heads of q must be a multiple of the heads of k, got {q.shape[2]} and {k.shape[2]}")


def number(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, jax.core.Tracer) or np.ndim(value) != 0:
        raise TypeError(f"{name} must be a number, got {value!r}")
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def sinks(x: jax.Array, heads: int, dtype: jnp.dtype) -> jax.Array:
    """(H,) in the accumulator."""
    if x.shape != (heads,):
        raise ValueError(f"sinks must be (H,) = ({heads},), got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"sinks must be floating, got {x.dtype.name}")
    return x.astype(dtype)


def bias(x: jax.Array, sizes: Sizes) -> jax.Array:
    """The bias with its five axes."""
    if x.dtype.name not in FLOATS:
        raise TypeError(f"bias must be one of {', '.join(FLOATS)}, got {x.dtype.name}")
    return _five("bias", x, sizes, (1, sizes.queries), (1, sizes.keys))


def blocks(x: Blocks, sizes: Sizes) -> None:
    """Checks block sizes and shapes of lists."""
    if not isinstance(x, Blocks):
        raise TypeError(f"blocks must be a block_sparse_attention.Blocks or None, got {type(x).__name__}")
    if min(x.block_q, x.block_k) < 1:
        raise ValueError(f"blocks must have block sizes of at least 1, got {x.block_q} and {x.block_k}")
    rows = -(-sizes.queries // x.block_q)
    shape = x.indices.shape
    if len(shape) != 4 or x.counts.shape != shape[:3] or shape[2] != rows or not shape[3]:
        raise ValueError(
            f"blocks must have indices (B|1, H|G|1, {rows}, W) and counts (B|1, H|G|1, {rows}) for {sizes.queries} "
            f"queries in blocks of {x.block_q}, got {shape} and {x.counts.shape}"
        )
    for axis, size, allowed in (("B", shape[0], (1, sizes.batch)), ("H", shape[1], (1, sizes.groups, sizes.heads))):
        if size not in allowed:
            raise ValueError(f"blocks must have {axis} of {' or '.join(map(str, allowed))}, got indices {shape}")
    if shape[3] > -(-sizes.keys // x.block_k):
        raise ValueError(f"blocks lists {shape[3]} key blocks per row, and there are {-(-sizes.keys // x.block_k)}")


def with_segments(extras: Extras, ids: Any, sizes: Sizes) -> Extras:
    """The extras with segment ids."""
    pair = ids if isinstance(ids, tuple | list) else (ids, ids)
    wanted = (sizes.batch, sizes.queries), (sizes.batch, sizes.keys)
    if len(pair) != 2 or tuple(jnp.shape(x) for x in pair) != wanted:
        shapes = [jnp.shape(x) for x in pair]
        raise ValueError(f"segment_ids must be (B, N) = {wanted[0]} and (B, M) = {wanted[1]}, got shapes {shapes}")
    query, key = segments(*pair)
    return extras._replace(query_ids=query[:, None, None, :, None], key_ids=key[:, None, None, None])


def with_values(extras: Extras, values: tuple[Values, ...], sizes: Sizes) -> Extras:
    """The extras with the arrays of the mask."""
    queries, keys, tables, groups = [], [], [], []
    for value in values:
        queries.append(
            tuple(_five("queries of an ArrayMask", x[..., None], sizes, (sizes.queries,), (1,)) for x in value.queries)
        )
        keys.append(
            tuple(_five("keys of an ArrayMask", x[..., None, :], sizes, (1,), (sizes.keys,)) for x in value.keys)
        )
        table, ids = value.table, value.groups
        if table is None or ids is None:
            tables.append(None)
            groups.append(None)
            continue
        if table.dtype != bool or table.ndim != 4:
            raise ValueError(
                f"table of Chosen must be booleans (B|1, H|G|1, N, S), got {table.dtype.name} of shape {table.shape}"
            )
        tables.append(_five("table of Chosen", table, sizes, (sizes.queries,), (table.shape[3],)))
        groups.append(_key_ids("groups of Chosen", ids, sizes))
    return extras._replace(queries=tuple(queries), keys=tuple(keys), tables=tuple(tables), groups=tuple(groups))


def with_mod(extras: Extras, mod: ScoreMod, sizes: Sizes) -> Extras:
    """The extras with the arrays of a score modification."""
    plain, tables, ids = [], [], []
    for number, indexed in enumerate(mod.arrays):
        if not isinstance(indexed, Indexed):
            raise TypeError(f"arrays of score_mod must be Indexed, got {type(indexed).__name__} at {number}")
        array, look_up = _indexed(indexed, f"array {number} of score_mod", sizes)
        plain.append(array if look_up is None else None)
        tables.append(None if look_up is None else array)
        ids.append(look_up)
    return extras._replace(mods=tuple(plain), mod_tables=tuple(tables), mod_ids=tuple(ids))


_AXES = re.compile(r"b|h|g|i|j(//[1-9]\d*|%[1-9]\d*)?|id\[j\]")


def _indexed(indexed: Indexed, name: str, sizes: Sizes) -> tuple[jax.Array, jax.Array | None]:
    """An array with its five axes, and where keys look it up."""
    x, axes = jnp.asarray(indexed.array), indexed.axes.split()
    order = [("hg" if axis in "hg" else "j" if axis == "id[j]" else axis[0]) for axis in axes]
    places = ["b", "hg", "i", "j"]
    known = all(_AXES.fullmatch(axis) for axis in axes) and [p for p in places if p in order] == order
    if not known or len(axes) != x.ndim:
        raise ValueError(
            f"{name} must name its axes, out of 'b', 'h' or 'g', 'i', and 'j', 'j//c', 'j%c' or 'id[j]', in this "
            f"order; got {indexed.axes!r} for shape {x.shape}"
        )
    shape = [x.shape[order.index(p)] if p in order else 1 for p in places]
    key = axes[-1] if "j" in order else ""
    ids = None
    if key == "id[j]":
        if indexed.ids is None:
            raise ValueError(f"{name} is looked up by id[j] and needs ids (B|1, M)")
        ids = _key_ids(f"ids of {name}", jnp.asarray(indexed.ids), sizes)
    elif indexed.ids is not None:
        raise ValueError(f"{name} has ids, and no axis that is looked up by id[j]")
    elif "//" in key or "%" in key:
        number, by = jnp.arange(sizes.keys), int(re.sub(r"\D", "", key))
        ids = (number // by if "//" in key else number % by)[None, None, None, None]
        least = -(-sizes.keys // by) if "//" in key else by
        if shape[3] < least:
            raise ValueError(f"{name} must have at least {least} entries along {key!r}, got shape {x.shape}")
    heads = {"h": sizes.heads, "g": sizes.groups}.get(next((a for a in axes if a in "hg"), ""), 1)
    keys = sizes.keys if key == "j" else shape[3]
    wanted = (sizes.batch if "b" in order else 1, heads, sizes.queries if "i" in order else 1, keys)
    if tuple(shape) != wanted:
        raise ValueError(f"{name} with axes {indexed.axes!r} must have sizes {wanted} of (b, h, i, j), got {x.shape}")
    return _five(name, x.reshape(shape), sizes, (shape[2],), (shape[3],)), ids


def _key_ids(name: str, ids: jax.Array, sizes: Sizes) -> jax.Array:
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {ids.dtype.name}")
    if ids.shape not in ((1, sizes.keys), (sizes.batch, sizes.keys)):
        raise ValueError(f"{name} must be (B|1, M) = ({sizes.batch}|1, {sizes.keys}), got shape {ids.shape}")
    return ids.astype(jnp.int32)[:, None, None, None]


def _five(name: str, x: jax.Array, sizes: Sizes, rows: tuple[int, ...], columns: tuple[int, ...]) -> jax.Array:
    """(B|1, H|G|1, N|1, M|1) as (B|1, G|1, R|1, N|1, M|1)."""
    allowed = (1, sizes.batch), (1, sizes.groups, sizes.heads), rows, columns
    if x.ndim != 4 or any(size not in sizes for size, sizes in zip(x.shape, allowed, strict=True)):
        raise ValueError(f"{name} must be (B|1, H|G|1, N, M) with each of {allowed}, got shape {x.shape}")
    heads = (1, 1) if x.shape[1] == 1 else (sizes.groups, x.shape[1] // sizes.groups)
    return x.reshape(x.shape[0], *heads, *x.shape[2:])
