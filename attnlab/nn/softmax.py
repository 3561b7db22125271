"""Softmax attention of any number of query and key heads, as a pure function on arrays.

    y_i = Σ_j a_ij v_j,   a_i = softmax_j(scale · q_i·k_j + bias_ij)

Query head h reads key head h // (H / G): G = H is multi-head, G = 1 multi-query (arXiv:1911.02150), between them
grouped-query attention (arXiv:2305.13245); keys and values are never repeated. With `block_size` the scores exist for
one block of queries at a time, in the backward pass too (arXiv:2112.05682), and keys that a rule on indices hides from
a whole run of queries are left out.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnlab.nn.masking import (
    SegmentIds,
    both,
    by_run,
    full_mask,
    index_mask,
    masked_softmax,
    segment_orders,
    segment_pair,
)
from pallas_kernels import dispatch
from pallas_kernels.block_lists import lower
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.integers import integers
from pallas_kernels.masks import Causal, Mask

LONG = 1024
"""Queries and keys from which on a CPU blocks are faster than all scores at once."""
BLOCK_BYTES = 1 << 25
"""Of the float32 scores of a block; a core's share of the caches."""
LEAST_BLOCK, MOST_BLOCK = 64, 256
MOST_SPANS = 4
"""Runs of queries with keys of their own: each is compiled."""
KEY_BLOCK = 128
"""Keys that are left out together."""


def softmax_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    segment_ids: SegmentIds | None = None,
    structural_mask: Mask | None = None,
    causal: bool = False,
    q_idx: ArrayLike | None = None,
    k_idx: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    block_size: int | None = None,
    return_weights: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention.

    Scores, softmax and sums are float32 (or wider). A query that may attend to nothing gives zeros and zero gradients.

    Args:
      q: queries `(B, N, H, D)`.
      k: keys `(B, M, G, D)`, H a multiple of G.
      v: values `(B, M, G, E)`.
      bias: added to the scores, broadcastable to `(B, H, N, M)`; -inf masks.
      mask: boolean, True where attention is allowed: `(B, M)` keys, or broadcastable to `(B, H, N, M)`.
      segment_ids: integers `(B, N)`: tokens attend inside their run of equal ids; or a pair `(B, N)`, `(B, M)`: they
        attend to the keys of their id, wherever those stand.
      structural_mask: a rule on indices, see `pallas_kernels.masks`.
      causal: query i sees keys j ≤ i; both count from 0, whether or not N = M.
      q_idx: `(N,)` or `(B, N)`, the indices of queries for `causal` and `structural_mask`; 0..N-1 when None, counted
        within each segment.
      k_idx: `(M,)` or `(B, M)`, those of keys.
      scale: factor of q·k, a scalar; D^-1/2 when None.
      softcap: scores become softcap · tanh(score / softcap), before bias and masks (Gemma 2, arXiv:2408.00118).
      dropout_rate: probability that a weight is dropped; 0 for none.
      dropout_key: random key, needed for dropout.
      block_size: queries per block, for memory linear in N and M; at least N for all at once. When None, all at once,
        but on a CPU in blocks from about a thousand queries and keys on, unless there is dropout.
      return_weights: also return the weights, before dropout.

    Returns:
      `(B, N, H, E)` in the dtype of `q`; with `return_weights`, also the weights `(B, H, N, M)` in float32.

    Raises:
      ValueError: for shapes that do not fit, or options that exclude each other.
    """
    terms, rules, scale, batch = _normal_form(
        q, k, bias, mask, segment_ids, structural_mask, causal, q_idx, k_idx, scale, softcap
    )
    v = jnp.asarray(v)
    if v.ndim != 4 or v.shape[:3] != jnp.shape(k)[:3]:
        raise ValueError(f"v must be (B, M, G, E) with the keys' {jnp.shape(k)[:3]}, got {v.shape}")
    v = jnp.moveaxis(v, 1, 2)
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), got {dropout_rate}")
    if dropout_rate and dropout_key is None:
        raise ValueError("dropout_key is needed for a dropout_rate above 0")
    if block_size is not None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if dropout_rate or return_weights:
            raise ValueError("block_size does not go with dropout or return_weights: the weights never exist together")
    elif not dropout_rate and not return_weights:
        block_size = _own_block_size(terms, v)
    if block_size is not None and block_size < terms.q.shape[3]:
        plain = segment_ids is None and counts(q_idx) and counts(k_idx)
        y = _by_blocks(rules, block_size, terms, v, scale, batch, plain)
        return _merge_heads(y).astype(terms.q.dtype)
    weights = _weights(rules, terms, scale, batch)
    used = weights
    if dropout_rate:
        kept = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights.shape)
        used = jnp.where(kept, weights / (1 - dropout_rate), 0)
    y = _merge_heads(_sum_values(used, v)).astype(terms.q.dtype)
    return (y, _flatten_heads(weights)) if return_weights else y


def attention_weights(
    q: ArrayLike,
    k: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    segment_ids: SegmentIds | None = None,
    structural_mask: Mask | None = None,
    causal: bool = False,
    q_idx: ArrayLike | None = None,
    k_idx: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """The weights `(B, H, N, M)` in float32 of `softmax_attention`; arguments as there."""
    terms, rules, scale, batch = _normal_form(
        q, k, bias, mask, segment_ids, structural_mask, causal, q_idx, k_idx, scale, softcap
    )
    return _flatten_heads(_weights(rules, terms, scale, batch))


def attention_scores(
    q: ArrayLike,
    k: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """The scores `(B, H, N, M)` in float32 (or wider) of `softmax_attention`, before masks; arguments as there."""
    terms, rules, scale, _ = _normal_form(q, k, bias, None, None, None, False, None, None, scale, softcap)
    return _flatten_heads(_scores(rules, terms, scale))


def weighted_values(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Σ_j weights_ij v_j: weights `(B, H, N, M)` and values `(B, M, G, E)` to `(B, N, H, E)` in the values' dtype."""
    b, h, n, m = weights.shape
    groups = v.shape[2]
    weights = weights.reshape(b, groups, h // groups, n, m)
    return _merge_heads(_sum_values(weights, jnp.moveaxis(v, 1, 2))).astype(v.dtype)


def scaled_product(equation: str, q: jax.Array, k: jax.Array, scale: ArrayLike) -> jax.Array:
    """`scale · einsum(equation, q, k)` in float32 (or wider), where q is the smaller one, or as large as k.

    A factor of the scores is another pass over all of them, so it is one of q, unless q is narrower: that would round.
    """
    wide = at_least_float32(q.dtype)
    scale = jnp.asarray(scale, wide)
    if q.dtype == wide:
        return jnp.einsum(equation, q * scale, k, preferred_element_type=wide)
    return jnp.einsum(equation, q, k, preferred_element_type=wide) * scale


class _Terms(NamedTuple):
    """What the scores are made of: q (B, G, R, N, D), k (B, G, M, D), bias (B|1, G|1, R|1, N|1, M|1)."""

    q: jax.Array
    k: jax.Array
    bias: jax.Array | None


class _Batch(NamedTuple):
    """What masks are made of: mask (B|1, G|1, R|1, N|1, M|1), ids (B, N|M), indices (B|1, N|M)."""

    mask: jax.Array | None
    q_ids: jax.Array | None
    k_ids: jax.Array | None
    q_idx: jax.Array
    k_idx: jax.Array


class _Rules(NamedTuple):
    """What is known when tracing."""

    structural_mask: Mask | None
    causal: bool
    softcap: float | None


def _normal_form(q, k, bias, mask, segment_ids, structural_mask, causal, q_idx, k_idx, scale, softcap):
    q, k = jnp.asarray(q), jnp.asarray(k)
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q must be (B, N, H, D) and k (B, M, G, D), got {q.shape} and {k.shape}")
    (b, n, h, d), (_, m, g, _) = q.shape, k.shape
    if h % g:
        raise ValueError(f"the {h} heads of q must be a multiple of the {g} heads of k")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    q_ids = k_ids = q_order = k_order = None
    if segment_ids is not None:
        segment_ids = by_run(segment_ids)
        q_ids, k_ids = segment_pair(segment_ids)
        q_order, k_order = segment_orders(segment_ids)
    if q_ids is not None and (q_ids.shape != (b, n) or k_ids.shape != (b, m)):
        raise ValueError(f"segment_ids must be {(b, n)} and {(b, m)}, got {q_ids.shape} and {k_ids.shape}")
    q_idx = _indices("q_idx", q_idx, q_order, b, n)
    k_idx = _indices("k_idx", k_idx, k_order, b, m)
    scale = jnp.asarray(d**-0.5 if scale is None else scale, at_least_float32(q.dtype))
    if scale.ndim:
        raise ValueError(f"scale must be a scalar, got shape {scale.shape}")
    bias = None if bias is None else _group("bias", jnp.asarray(bias), (b, h, n, m), g)
    if mask is not None:
        mask = jnp.asarray(mask)
        mask = full_mask(mask if mask.ndim == 2 else mask.reshape((1,) * (4 - mask.ndim) + mask.shape))
        mask = _group("mask", mask, (b, h, n, m), g)
    batch = _Batch(mask, q_ids, k_ids, q_idx, k_idx)
    terms = _Terms(jnp.moveaxis(q.reshape(b, n, g, h // g, d), 1, 3), jnp.moveaxis(k, 1, 2), bias)
    return terms, _Rules(structural_mask, causal, softcap), scale, batch


def _indices(name: str, index: ArrayLike | None, order: jax.Array | None, batch: int, tokens: int) -> jax.Array:
    if index is None:
        return jnp.arange(tokens)[None] if order is None else order
    index = jnp.atleast_2d(integers(name, index))
    if index.shape not in ((1, tokens), (batch, tokens)):
        raise ValueError(f"{name} must be ({tokens},) or ({batch}, {tokens}), got {index.shape}")
    return index


def counts(index: ArrayLike | None) -> bool:
    """Whether indices are known when tracing, and 0, 1, 2, …"""
    if index is None:
        return True
    return isinstance(index, np.ndarray) and bool((index == np.arange(index.shape[-1])).all())


def _group(name: str, a: jax.Array, full: tuple[int, ...], groups: int) -> jax.Array:
    """`(B|1, H|1, N|1, M|1)` to `(B|1, G|1, R|1, N|1, M|1)`."""
    shape = (1,) * (4 - a.ndim) + a.shape
    if len(shape) > 4 or any(have not in (1, need) for have, need in zip(shape, full, strict=True)):
        raise ValueError(f"{name} must be broadcastable to (B, H, N, M) = {full}, got {a.shape}")
    heads = (1, 1) if shape[1] == 1 else (groups, full[1] // groups)
    return a.reshape(shape[0], *heads, *shape[2:])


def _scores(rules: _Rules, terms: _Terms, scale: jax.Array) -> jax.Array:
    """`(B, G, R, N, M)` in float32 (or wider)."""
    scores = scaled_product("bgrnd,bgmd->bgrnm", terms.q, terms.k, scale)
    if rules.softcap is not None:
        scores = rules.softcap * jnp.tanh(scores / rules.softcap)
    return scores if terms.bias is None else scores + terms.bias.astype(scores.dtype)


def _allowed(rules: _Rules, batch: _Batch) -> jax.Array | None:
    """Broadcastable to `(B, G, R, N, M)`, or None."""
    same = None if batch.q_ids is None else batch.q_ids[:, None, :, None] == batch.k_ids[:, None, None, :]
    by_index = index_mask(batch.q_idx, batch.k_idx, causal=rules.causal, structural_mask=rules.structural_mask)
    rest = both(same, by_index)
    return both(batch.mask, None if rest is None else rest[:, None])


def _weights(rules: _Rules, terms: _Terms, scale: jax.Array, batch: _Batch) -> jax.Array:
    return masked_softmax(_scores(rules, terms, scale), _allowed(rules, batch))


def _sum_values(weights: jax.Array, v: jax.Array) -> jax.Array:
    """`(B, G, R, N, E)` in the weights' dtype, of values `(B, G, M, E)`."""
    return jnp.einsum("bgrnm,bgme->bgrne", weights.astype(v.dtype), v, preferred_element_type=weights.dtype)


def _merge_heads(y: jax.Array) -> jax.Array:
    b, g, r, n, e = y.shape
    return jnp.moveaxis(y, 3, 1).reshape(b, n, g * r, e)


def _flatten_heads(weights: jax.Array) -> jax.Array:
    b, g, r, n, m = weights.shape
    return weights.reshape(b, g * r, n, m)


# One block of queries at a time


@dataclasses.dataclass(frozen=True)
class _Span:
    """A run of queries, and the keys that any of them may see: all between two of them, or a list."""

    queries: slice
    keys: slice | tuple[int, ...]


def _own_block_size(terms: _Terms, v: jax.Array) -> int | None:
    """On a CPU, the queries of a block for which scores stay in its caches; None where all scores together are few."""
    b, g, r, n, _ = terms.q.shape
    m = v.shape[2]
    if n * m < LONG**2 or dispatch.current_platform() != "cpu":
        return None
    block = BLOCK_BYTES // (4 * b * g * r * m)
    return 1 << (max(LEAST_BLOCK, min(MOST_BLOCK, block)).bit_length() - 1)


def _by_blocks(
    rules: _Rules, block_size: int, terms: _Terms, v: jax.Array, scale: jax.Array, batch: _Batch, plain: bool
) -> jax.Array:
    """`(B, G, R, N, E)` in float32 (or wider); `plain` says that indices count from 0, so that rules are static."""
    rule = rules.structural_mask
    if rules.causal:
        rule = Causal() if rule is None else Causal() & rule
    n, m = terms.q.shape[3], v.shape[2]
    parts = []
    for span in _spans(rule if plain else None, n, m, block_size):
        some_terms, some_v, some = _keys_of(span.keys, m, terms, v, batch)
        parts.append(_scan_queries(rules, block_size, span.queries, n, some_terms, some_v, scale, some))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)


def _spans(rule: Mask | None, n: int, m: int, block_size: int) -> list[_Span]:
    """A few runs of at least two blocks of queries each, with the keys that the rule leaves to each run."""
    if rule is None or rule.heads > 1 or not rule.static:
        return [_Span(slice(0, n), slice(0, m))]
    runs = max(1, min(MOST_SPANS, n // (2 * block_size)))
    rows = block_size * -(-n // (runs * block_size))
    columns = min(rows, KEY_BLOCK)
    lists = lower(rule, n, m, rows, columns)
    spans: list[_Span] = []
    for i in range(lists.num_q_blocks):
        blocks = lists.visited(i)
        first, last = (int(blocks[0]), int(blocks[-1]) + 1) if blocks.size else (0, 0)
        if last - first == blocks.size:
            keys = slice(first * columns, min(m, last * columns))
        else:
            keys = tuple(j for block in blocks.tolist() for j in range(block * columns, min(m, (block + 1) * columns)))
        queries = slice(i * rows, min(n, (i + 1) * rows))
        if spans and spans[-1].keys == keys:
            queries = slice(spans.pop().queries.start, queries.stop)
        spans.append(_Span(queries, keys))
    return spans


def _keys_of(
    keys: slice | tuple[int, ...], m: int, terms: _Terms, v: jax.Array, batch: _Batch
) -> tuple[_Terms, jax.Array, _Batch]:
    if keys == slice(0, m):
        return terms, v, batch

    def take(a: jax.Array | None, axis: int) -> Any:
        if a is None or a.shape[axis] == 1:
            return a
        if isinstance(keys, slice):
            return jax.lax.slice_in_dim(a, keys.start, keys.stop, axis=axis % a.ndim)
        return jnp.take(a, np.array(keys), axis=axis)

    terms = terms._replace(k=take(terms.k, 2), bias=take(terms.bias, -1))
    batch = batch._replace(mask=take(batch.mask, -1), k_ids=take(batch.k_ids, 1), k_idx=take(batch.k_idx, 1))
    return terms, take(v, 2), batch


def _scan_queries(
    rules: _Rules, block_size: int, queries: slice, n: int, terms: _Terms, v: jax.Array, scale: jax.Array, batch: _Batch
) -> jax.Array:
    """The result for a run of queries, in a loop over blocks whose scores are computed again in the backward pass."""
    rows = queries.stop - queries.start
    if v.shape[2] == 0:
        return jnp.zeros((*terms.q.shape[:3], rows, v.shape[-1]), scale.dtype)
    count = -(-rows // block_size)

    def blocks(a: jax.Array | None, axis: int) -> Any:
        """`(count, ..., block_size, ...)`; what all queries share stays out of the loop."""
        if a is None or a.shape[axis] != n or n == 1:
            return None
        axis = axis % a.ndim
        a = jax.lax.slice_in_dim(a, queries.start, queries.stop, axis=axis)
        widths = [(0, count * block_size - rows if i == axis else 0) for i in range(a.ndim)]
        a = jnp.pad(a, widths)
        return jnp.moveaxis(a.reshape(*a.shape[:axis], count, block_size, *a.shape[axis + 1 :]), axis, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(k: jax.Array, v: jax.Array, scale: jax.Array, bias: Any, some: Any) -> jax.Array:
        q, own_bias, mask, q_ids, q_idx = some
        here = batch._replace(
            mask=batch.mask if mask is None else mask,
            q_ids=batch.q_ids if q_ids is None else q_ids,
            q_idx=batch.q_idx if q_idx is None else q_idx,
        )
        weights = _weights(rules, _Terms(q, k, bias if own_bias is None else own_bias), scale, here)
        return _sum_values(weights, v)

    per_query = (
        blocks(terms.q, 3),
        blocks(terms.bias, -2),
        blocks(batch.mask, -2),
        blocks(batch.q_ids, 1),
        blocks(batch.q_idx, 1),
    )
    shared_bias = terms.bias if per_query[1] is None else None

    def body(_: None, some: Any) -> tuple[None, jax.Array]:
        return None, block(terms.k, v, scale, shared_bias, some)

    _, y = jax.lax.scan(body, None, per_query)
    y = jnp.moveaxis(y, 0, 3)
    return y.reshape(*y.shape[:3], count * block_size, y.shape[-1])[:, :, :, :rows]
