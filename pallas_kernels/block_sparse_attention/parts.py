"""What belongs to block-sparse attention beside its output: partial results joined, and parts of the weights A.

None of these builds A, which is N×M.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pallas_kernels.block_sparse_attention import scores
from pallas_kernels.block_sparse_attention.api import block_sparse_attention, normal_form
from pallas_kernels.block_sparse_attention.arguments import Arguments, Extras
from pallas_kernels.masks import Mask, Transposed

KEYS_TOGETHER = 512  # whose scores exist together in `key_group_lse`


def merge_attention(parts: Sequence[tuple[ArrayLike, ArrayLike]]) -> tuple[jax.Array, jax.Array]:
    """Joins attention to disjoint sets of keys into attention to all of them.

    Differentiable; a part without keys (lse = -inf) counts nothing, and a row without any gives 0 and -inf.

    Args:
      parts: pairs (y (..., E), lse (...)) of one shape each, as `block_sparse_attention` returns them.

    Raises:
      ValueError: without parts, or for shapes that do not agree.
    """
    pairs = [(jnp.asarray(y), jnp.asarray(lse)) for y, lse in parts]
    if not pairs:
        raise ValueError("parts must have at least one pair (y, lse)")
    for y, lse in pairs:
        if y.shape != pairs[0][0].shape or lse.shape != y.shape[:-1]:
            raise ValueError(f"parts must agree in shape, y (..., E) and lse (...), got {y.shape} and {lse.shape}")
    lses = jnp.stack([lse for _, lse in pairs])
    top = jax.lax.stop_gradient(lses.max(0))
    top = jnp.where(top == -jnp.inf, 0, top)
    shares = jnp.exp(lses - top)
    total = shares.sum(0)
    divisor = jnp.where(total == 0, 1, total)
    ys = jnp.stack([y for y, _ in pairs])
    y = (ys * (shares / divisor)[..., None]).sum(0).astype(ys.dtype)
    return y, jnp.where(total == 0, -jnp.inf, top + jnp.log(divisor))


def attention_columns(q: ArrayLike, k: ArrayLike, lse: ArrayLike, columns: ArrayLike, **options: Any) -> jax.Array:
    """Columns of A: how much each query attends to some keys.

    Args:
      q: queries, (B, N, H, D).
      k: keys, (B, M, G, D).
      lse: (B, N, H), of the call with these arguments.
      columns: indices of keys, integers (C,).
      **options: mask, segment_ids, bias, score_mod, scale and softcap of the call.

    Returns:
      (B, H, N, C) in float32 (or float64).

    Raises:
      ValueError: for `blocks`, or columns of another rank.
    """
    args, columns = _without_blocks(q, k, options), jnp.asarray(columns)
    if columns.ndim != 1 or not jnp.issubdtype(columns.dtype, jnp.integer):
        raise ValueError(f"columns must be integers (C,), got {columns.dtype.name} of shape {columns.shape}")

    def chosen(a: jax.Array, table: bool) -> jax.Array:
        return a if table or a.shape[4] == 1 else jnp.take(a, columns, axis=4)

    x = scores.map_extras(chosen, args.extras)
    s, seen = _scores(args, args.k[:, columns], x, columns)
    lse = jnp.moveaxis(jnp.asarray(lse), 1, 2).reshape(*s.shape[:3], -1, 1)
    p = jnp.where(seen, jnp.exp(jnp.where(seen, s, -jnp.inf) - jnp.where(lse == -jnp.inf, 0, lse)), 0)
    return p.reshape(p.shape[0], -1, *p.shape[3:])


def key_group_lse(
    q: ArrayLike, k: ArrayLike, groups: int | ArrayLike, *, num_groups: int | None = None, **options: Any
) -> jax.Array:
    """The log of the sum of exponentials over each group of keys, of which routing and merging are made.

    Args:
      q: queries, (B, N, H, D).
      k: keys, (B, M, G, D).
      groups: keys per group, c, where key j is in group j // c; or the group of each key, integers (B|1, M).
      num_groups: S; needed where `groups` are ids.
      **options: mask, segment_ids, bias, score_mod, scale and softcap, as in `block_sparse_attention`.

    Returns:
      (B, H, N, S) in float32 (or float64); -inf for a group of which a query sees nothing.

    Raises:
      ValueError: for `blocks`, or ids without `num_groups`.
    """
    args = _without_blocks(q, k, options)
    batch, queries, heads, _ = args.q.shape
    keys = args.k.shape[1]
    if isinstance(groups, jax.Array | np.ndarray):
        if num_groups is None:
            raise ValueError("num_groups is needed where groups are ids (B|1, M)")
        ids = jnp.broadcast_to(groups, (batch, keys))
    else:
        ids = jnp.broadcast_to(jnp.arange(keys) // operator.index(groups), (batch, keys))
        num_groups = -(-keys // operator.index(groups)) if num_groups is None else num_groups
    block = min(KEYS_TOGETHER, keys)
    fill = -keys % block

    def blocks(a: jax.Array, axis: int, value: int = 0) -> jax.Array:
        a = jnp.pad(a, [(0, fill if i == axis else 0) for i in range(a.ndim)], constant_values=value)
        return jnp.moveaxis(a.reshape(*a.shape[:axis], -1, block, *a.shape[axis + 1 :]), axis, 0)

    whole, cut = [], []
    leaves, structure = jax.tree.flatten(args.extras)
    tables = jax.tree.leaves(scores.map_extras(lambda a, table: table or a.shape[4] == 1, args.extras))
    for a, table in zip(leaves, tables, strict=True):
        whole.append(a if table else None)
        cut.append(None if table else blocks(a, 4))

    @jax.checkpoint
    def step(carry, inputs):
        top, total = carry
        start, k_some, ids_some, cut_some = inputs
        x = jax.tree.unflatten(structure, [a if b is None else b for a, b in zip(whole, cut_some, strict=True)])
        j = start + jnp.arange(block)
        s, seen = _scores(args, k_some, x, j)
        ids_some = jnp.where(j < keys, ids_some, num_groups)  # a group beyond those that are asked for
        # A key of no group must not overflow: what is infinite has a gradient of NaN, though no group holds it.
        s = jnp.where(seen & (ids_some < num_groups)[:, None, None, None], s, -jnp.inf)
        highest = jax.vmap(functools.partial(_per_group, jax.ops.segment_max, num_groups))(
            jax.lax.stop_gradient(s), ids_some
        )
        higher = jnp.maximum(top, highest)
        finite = jnp.where(higher == -jnp.inf, 0, higher)
        padded = jnp.pad(finite, [(0, 0)] * 4 + [(0, 1)])
        at = jnp.clip(ids_some, 0, num_groups)[:, None, None, None]
        p = jnp.exp(s - jnp.take_along_axis(padded, jnp.broadcast_to(at, s.shape), axis=-1))
        sums = jax.vmap(functools.partial(_per_group, jax.ops.segment_sum, num_groups))(p, ids_some)
        return (higher, total * jnp.exp(jnp.where(top == -jnp.inf, -jnp.inf, top - finite)) + sums), None

    shape = (batch, args.k.shape[2], heads // args.k.shape[2], queries, num_groups)
    start = jnp.full(shape, -jnp.inf, args.accumulator), jnp.zeros(shape, args.accumulator)
    starts = jnp.arange(0, keys + fill, block)
    (top, total), _ = jax.lax.scan(step, start, (starts, blocks(args.k, 1), blocks(ids, 1), cut))
    empty = total == 0
    lse = jnp.where(empty, -jnp.inf, jnp.where(empty, 0, top) + jnp.log(jnp.where(empty, 1, total)))
    return lse.reshape(batch, heads, queries, num_groups)


def transposed_attention(
    q: ArrayLike,
    k: ArrayLike,
    x: ArrayLike,
    lse: ArrayLike,
    *,
    mask: Mask | None = None,
    segment_ids: Any = None,
    bias: ArrayLike | None = None,
    **options: Any,
) -> jax.Array:
    """Aᵀ x, what each key is attended by: the same op with queries and keys swapped and -lse as a bias of its keys.

    Args:
      q: queries, (B, N, H, D).
      k: keys, (B, M, G, D).
      x: what is summed, one row per query, (B, N, H, E) in the dtype of q.
      lse: (B, N, H), of the call with these arguments.
      mask: a mask of indices, or None.
      segment_ids: as in `block_sparse_attention`.
      bias: as in `block_sparse_attention`.
      **options: scale, softcap and implementation.

    Returns:
      (B, M, H, E) in the dtype of q.

    Raises:
      ValueError: as `block_sparse_attention`, and for a mask with arrays.
    """
    q, k, lse = (jnp.asarray(a) for a in (q, k, lse))
    if mask is not None and not mask.static:
        raise ValueError("mask of transposed_attention must be one of indices, without arrays")
    if isinstance(segment_ids, tuple | list):
        segment_ids = segment_ids[::-1]
    added = -jnp.swapaxes(jnp.where(lse == -jnp.inf, 0, lse), 1, 2)[:, :, None]
    repeats = q.shape[2] // k.shape[2]
    if bias is not None:
        bias = jnp.swapaxes(jnp.asarray(bias), 2, 3)
        bias = jnp.repeat(bias, repeats, axis=1) if bias.shape[1] == k.shape[2] != 1 else bias
        added = added + bias
    y, total = block_sparse_attention(
        jnp.repeat(k, repeats, axis=2),
        q,
        x,
        mask=None if mask is None else Transposed(mask),
        segment_ids=segment_ids,
        bias=added,
        return_lse=True,
        **options,
    )
    return (y * jnp.exp(total)[..., None]).astype(y.dtype)


def _without_blocks(q: ArrayLike, k: ArrayLike, options: dict[str, Any]) -> Arguments:
    if options.get("blocks") is not None:
        raise ValueError("blocks are not taken here: say what they allow in mask")
    return normal_form(q, k, k, **options)


def _scores(args: Arguments, k: jax.Array, x: Extras, j: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scores of all queries and of the keys `k` (B, C, G, D) with indices `j`, and what is allowed: (B, G, R, N, C)."""
    batch, queries, heads, size = args.q.shape
    groups = k.shape[2]
    q = args.q.reshape(batch, queries, groups, heads // groups, size)
    products = jnp.einsum("bngrd,bmgd->bgrnm", q, k, precision=args.precision, preferred_element_type=args.accumulator)
    at = scores.of(batch, groups, heads // groups, jnp.arange(queries), j)
    s = scores.modified(args.rules, products, x, at)
    return s, jnp.broadcast_to(scores.allowed_by_heads(args.rules.mask, x, at), s.shape)


def _per_group(reduce: Any, num_groups: int, s: jax.Array, ids: jax.Array) -> jax.Array:
    """(G, R, N, M) reduced over keys to (G, R, N, S)."""
    return jnp.moveaxis(reduce(jnp.moveaxis(s, -1, 0), ids, num_segments=num_groups + 1)[:num_groups], 0, -1)
