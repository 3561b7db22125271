"""Attention to the keys of the largest bias, gathered: O(N·w).

The equations are those of `attnlab.attention.sparse.dynamic_mask_attention`.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.nn.masking import segment_positions
from attnlab.nn.places import rows
from attnlab.nn.routing import top_k_mask
from attnlab.nn.running_top import newest_top, running_top
from pallas_kernels.array_masks import ArrayMask, Chosen
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.masks import Causal, Full, Mask

MaskType = Literal["topk", "relu"]


def kept_keys(
    bias: ArrayLike,
    allowed: ArrayLike | None,
    window: int,
    *,
    mask_type: MaskType = "topk",
    block_size: int | None = None,
    whole_blocks: bool = False,
) -> jax.Array:
    """Which keys each query keeps, for all pairs.

    Args:
      bias: importance of keys, `(B, G, N|1, M)`.
      allowed: boolean, broadcastable to `(B, G, N, M)`; all pairs when None.
      window: w.
      mask_type: "topk", the w largest of those allowed, of equal ones the later; or "relu", all that are positive.
      block_size: where given, blocks of so many keys are kept, those of which more than half is kept, and no others.
      whole_blocks: whether such a block is kept with keys that are not allowed, as in the authors' reference.

    Returns:
      Boolean `(B, G, N|1, M)`.
    """
    bias = jax.lax.stop_gradient(jnp.asarray(bias))
    if allowed is not None:
        bias, allowed = jnp.broadcast_arrays(bias, jnp.asarray(allowed))
    keys = bias.shape[-1]
    if mask_type == "relu":
        kept = bias > 0
        kept = kept if allowed is None else kept & allowed
    elif keys > window:
        there = None if allowed is None else allowed[..., ::-1]
        kept = top_k_mask(bias[..., ::-1], window, where=there)[..., ::-1]
    else:
        kept = jnp.ones(bias.shape, bool) if allowed is None else allowed
    if block_size is None or block_size == 1:
        return kept
    blocks = jnp.arange(keys) // block_size
    sizes = jnp.minimum(block_size, keys - jnp.arange(-(-keys // block_size)) * block_size)
    padded = jnp.pad(kept, [(0, 0)] * (kept.ndim - 1) + [(0, -keys % block_size)])
    number = padded.reshape(*kept.shape[:-1], -1, block_size).sum(-1, dtype=jnp.int32)
    kept = (2 * number > sizes)[..., blocks]
    return kept if whole_blocks or allowed is None else kept & allowed


def dynamic_mask_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    bias: ArrayLike,
    *,
    window: int,
    causal: bool = False,
    mask_type: MaskType = "topk",
    block_size: int | None = None,
    whole_blocks: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention to the keys of largest bias, which is added to their scores.

    Args:
      q: queries `(B, N, H, D)`.
      k: keys `(B, M, G, D)`, H a multiple of G.
      v: values `(B, M, G, E)`.
      bias: importance of keys `(B, G, N|1, M)`. With one row for all queries and no blocks the cost is O(N·w).
      window: keys w that a query keeps.
      causal: query i sees keys j ≤ i + M - N.
      mask_type: "topk", the w largest of those allowed, of equal ones the later; or "relu", all that are positive.
      block_size: where given, blocks of so many keys are kept, those of which more than half is kept, and no others.
      whole_blocks: whether such a block is kept with keys that are not allowed, as in the authors' reference.
      scale: of q·k; D^-1/2 when None.
      implementation: of `block_sparse_attention`; the best one when None.

    Returns:
      `(B, N, H, E)` in the dtype of q; zeros for a query that keeps nothing.

    Raises:
      ValueError: for options out of range, or shapes that do not fit.
    """
    check_options(window, mask_type, block_size)
    q, k, v, bias = (jnp.asarray(a) for a in (q, k, v, bias))
    (batch, queries), (keys, groups) = q.shape[:2], k.shape[1:3]
    if bias.ndim != 4 or bias.shape[:2] != (batch, groups) or bias.shape[2] not in (1, queries):
        raise ValueError(f"bias must be (B, G, N|1, M) = {(batch, groups, queries, keys)}, got {bias.shape}")
    given: dict[str, Any] = {"scale": scale, "implementation": implementation}
    if bias.shape[2] == 1 and (block_size or 1) == 1 and not (causal and queries > keys):
        importance = jnp.swapaxes(bias[:, :, 0], 1, 2)
        if mask_type == "topk" and causal:
            slots = jnp.broadcast_to(jnp.arange(queries) + keys - queries, (batch, queries))
            return causal_attention(q, k, v, importance, slots, window, past=keys - queries, **given)
        if mask_type == "topk":
            return noncausal_attention(q, k, v, importance, window, None, **given)
        rule: Mask = Causal(keys - queries) if causal else Full()
        return biased_attention(q, k, v, importance, rule & ArrayMask(positive, keys=(bias[:, :, 0],)), **given)
    allowed = jnp.tri(queries, keys, keys - queries, dtype=bool)[None, None] if causal else None
    kept = kept_keys(bias, allowed, window, mask_type=mask_type, block_size=block_size, whole_blocks=whole_blocks)
    kept = jnp.broadcast_to(kept, (batch, groups, queries, keys))
    return block_sparse_attention(q, k, v, mask=Chosen(kept, 1), bias=bias, **given)


def check_options(window: int, mask_type: str = "topk", block_size: int | None = None) -> None:
    """Raises `ValueError` for options out of range."""
    if window < 1 or (block_size is not None and block_size < 1):
        raise ValueError(f"window and block_size must be at least 1, got {window} and {block_size}")
    if mask_type not in get_args(MaskType):
        raise ValueError(f"mask_type must be one of {', '.join(get_args(MaskType))}, got {mask_type!r}")


def positive(i: Any, j: Any, bias: Any) -> Any:
    """The rule of an `ArrayMask` that keeps keys of positive values."""
    return bias > 0


def before_slot(i: Any, j: Any, slot: Any) -> Any:
    """The rule of an `ArrayMask` that lets queries see keys up to their own slots."""
    return j <= slot


def _there(i: Any, j: Any, index: Any) -> Any:
    return index >= 0


def _kept(i: Any, j: Any, last: Any, segment: Any, rank: Any, of: Any) -> Any:
    return (rank <= last) & (segment == of)


def biased_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, importance: jax.Array, mask: Mask, **given: Any
) -> jax.Array:
    """Attention under a mask with the importance `(B, M, G)` of keys as a bias; `given` are options of the op."""
    bias = jnp.moveaxis(importance, 1, 2)[:, :, None]
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    return block_sparse_attention(q, k, v, mask=mask, bias=bias, **given)


def _by_group(x: jax.Array, index: jax.Array) -> jax.Array:
    """Of `(B, M, G, …)` what stands at `(B, T, G, C)`, as `(B·T, C, G, …)`."""
    take = jax.vmap(lambda each, at: each[at], in_axes=(1, 1), out_axes=2)  # of one example, group by group
    found = jax.vmap(take)(x, jnp.maximum(index, 0))
    return found.reshape(-1, *found.shape[2:])


def noncausal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    importance: jax.Array,
    window: int,
    real: jax.Array | None,
    **given: Any,
) -> jax.Array:
    """Without causality: one choice for all queries, gathered; `real` `(B, M)` says which keys exist."""
    values = jnp.moveaxis(importance, 1, 2)
    values = values if real is None else jnp.where(real[:, None], values, -jnp.inf)
    if k.shape[1] <= window and real is None:
        return biased_attention(q, k, v, importance, Full(), **given)
    index = newest_top(values, min(window, k.shape[1]))
    parts = (_by_group(x, index[:, None]) for x in (k, v, importance))
    return biased_attention(q, *parts, ArrayMask(_there, keys=(index,)), **given)


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    importance: jax.Array,
    slots: jax.Array,
    window: int,
    *,
    past: int = 0,
    length: jax.Array | None = None,
    real: jax.Array | None = None,
    ids: jax.Array | None = None,
    **given: Any,
) -> jax.Array:
    """The w most important keys up to each query, gathered for blocks of queries.

    Args:
      q: of N new tokens, `(B, N, H, D)`.
      k: of all tokens, the new ones among them, `(B, M, G, D)`.
      v: `(B, M, G, E)`.
      importance: `(B, M, G)`.
      slots: where the new tokens are among all, `(B, N)`, ascending.
      window: w.
      past: keys in front of the first new token.
      length: `(B,)` the same, where it is known at run time alone.
      real: `(B, N)` boolean, which of the new tokens exist.
      ids: of segments, one for each run, `(B, N)`; only where all tokens are new.
      **given: options of `block_sparse_attention`.
    """
    (batch, count, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    if keys <= window and ids is None and real is None:
        rule: Mask = Causal(past) if length is None else ArrayMask(before_slot, (slots[:, None],))
        return biased_attention(q, k, v, importance, rule, **given)
    width, block = min(window, keys), min(window, count)
    values = jnp.moveaxis(jax.lax.stop_gradient(importance), 1, 2)
    if length is None and past == 0:
        before = jnp.full((batch, groups, width), -1, jnp.int32)
    else:
        known = jnp.arange(keys) < (jnp.full((batch,), past) if length is None else length)[:, None]
        before = newest_top(jnp.where(known[:, None], values, -jnp.inf), width)
    held = jnp.take_along_axis(values, jnp.maximum(before, 0), -1)
    new = rows(importance, jnp.clip(slots, 0, keys - 1))
    top = running_top(new, slots, before, held, window=window, block=block, real=real, segment_ids=ids)
    tiles = top.slots.shape[1]
    flat_k, flat_v, flat_bias = (_by_group(x, top.slots) for x in (k, v, importance))

    def by_block(x: jax.Array) -> jax.Array:
        """`(B, N, …)` to `(B·T, b, …)`."""
        x = jnp.pad(x, [(0, 0), (0, tiles * block - count), *((0, 0),) * (x.ndim - 2)])
        return x.reshape(batch * tiles, block, *x.shape[2:])

    def merged(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    if ids is None:
        segment, of = jnp.zeros((1, 1, block), jnp.int32), jnp.zeros((1, 1, width + block), jnp.int32)
    else:
        segment = by_block(ids)[:, None]
        of = jnp.moveaxis(_by_group(jnp.broadcast_to(ids[..., None], (*ids.shape, groups)), top.slots), 1, 2)
    mask = Causal(width) & ArrayMask(_kept, (merged(top.last), segment), (merged(top.ranks), of))
    y = biased_attention(by_block(q), flat_k, flat_v, flat_bias, mask, **given)
    return jnp.asarray(y).reshape(batch, tiles * block, heads, -1)[:, :count]


def packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    importance: jax.Array,
    window: int,
    real: jax.Array | None,
    ids: jax.Array,
    **given: Any,
) -> jax.Array:
    """Without causality, packed: keys are masked by their rank in their segment, and none is gathered."""
    count = importance.shape[1]
    values = jnp.moveaxis(jax.lax.stop_gradient(importance), 1, 2)
    values = values if real is None else jnp.where(real[:, None], values, -jnp.inf)
    index = jnp.broadcast_to(jnp.arange(count), values.shape)
    order = jnp.lexsort((-index, -values, jnp.broadcast_to(ids[:, None], values.shape)))
    start = jnp.arange(count) - segment_positions(ids)
    rank = jnp.argsort(order, -1) - start[:, None]
    rank = jnp.where((rank < window) & (values > -jnp.inf), rank, -1).astype(jnp.int32)
    mask = ArrayMask(_there, keys=(rank,))
    return biased_attention(q, k, v, importance, mask, segment_ids=ids, **given)
