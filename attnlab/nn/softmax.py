"""Softmax attention of any number of query and key heads, as a pure function on arrays.

    y_i = Σ_j a_ij v_j,   a_i = softmax_j(scale · q_i·k_j + bias_ij)

Query head h reads key head h // (H / G): G = H is multi-head, G = 1 multi-query (arXiv:1911.02150), between them
grouped-query attention (arXiv:2305.13245); keys and values are never repeated. With `block_size` the scores exist for
one block of keys at a time, in the backward pass too (online softmax, arXiv:2112.05682, arXiv:2205.14135).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
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
from pallas_kernels.integers import integers
from pallas_kernels.masks import Mask


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
      block_size: keys per block, for memory linear in M; None computes all scores at once. Reverse-mode gradients only.
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
    if v.ndim != 4 or v.shape[:3] != terms.k.shape[:3]:
        raise ValueError(f"v must be (B, M, G, E) with the keys' {terms.k.shape[:3]}, got {v.shape}")
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), got {dropout_rate}")
    if dropout_rate and dropout_key is None:
        raise ValueError("dropout_key is needed for a dropout_rate above 0")
    if block_size is not None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if dropout_rate or return_weights:
            raise ValueError("block_size does not go with dropout or return_weights: the weights never exist together")
        if block_size < v.shape[1]:
            return _merge_heads(_blocked(rules, block_size, terms, v, scale, batch)).astype(terms.q.dtype)
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
    return _merge_heads(_sum_values(weights.reshape(b, groups, h // groups, n, m), v)).astype(v.dtype)


class _Terms(NamedTuple):
    """What the scores are made of: q (B, N, G, R, D), k (B, M, G, D), bias (B|1, G|1, R|1, N|1, M|1)."""

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
    scale = jnp.asarray(d**-0.5 if scale is None else scale, jnp.promote_types(q.dtype, jnp.float32))
    if scale.ndim:
        raise ValueError(f"scale must be a scalar, got shape {scale.shape}")
    bias = None if bias is None else _group("bias", jnp.asarray(bias), (b, h, n, m), g)
    if mask is not None:
        mask = jnp.asarray(mask)
        mask = full_mask(mask if mask.ndim == 2 else mask.reshape((1,) * (4 - mask.ndim) + mask.shape))
        mask = _group("mask", mask, (b, h, n, m), g)
    batch = _Batch(mask, q_ids, k_ids, q_idx, k_idx)
    return _Terms(q.reshape(b, n, g, h // g, d), k, bias), _Rules(structural_mask, causal, softcap), scale, batch


def _indices(name: str, index: ArrayLike | None, order: jax.Array | None, batch: int, tokens: int) -> jax.Array:
    if index is None:
        return jnp.arange(tokens)[None] if order is None else order
    index = jnp.atleast_2d(integers(name, index))
    if index.shape not in ((1, tokens), (batch, tokens)):
        raise ValueError(f"{name} must be ({tokens},) or ({batch}, {tokens}), got {index.shape}")
    return index


def _group(name: str, a: jax.Array, full: tuple[int, ...], groups: int) -> jax.Array:
    """`(B|1, H|1, N|1, M|1)` to `(B|1, G|1, R|1, N|1, M|1)`."""
    shape = (1,) * (4 - a.ndim) + a.shape
    if len(shape) > 4 or any(have not in (1, need) for have, need in zip(shape, full, strict=True)):
        raise ValueError(f"{name} must be broadcastable to (B, H, N, M) = {full}, got {a.shape}")
    heads = (1, 1) if shape[1] == 1 else (groups, full[1] // groups)
    return a.reshape(shape[0], *heads, *shape[2:])


def _scores(rules: _Rules, terms: _Terms, scale: jax.Array) -> jax.Array:
    """`(B, G, R, N, M)` in float32 (or wider)."""
    scores = jnp.einsum("bngrd,bmgd->bgrnm", terms.q, terms.k, preferred_element_type=scale.dtype) * scale
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
    return jnp.einsum("bgrnm,bmge->bgrne", weights.astype(v.dtype), v, preferred_element_type=weights.dtype)


def _merge_heads(y: jax.Array) -> jax.Array:
    b, g, r, n, e = y.shape
    return jnp.moveaxis(y, 3, 1).reshape(b, n, g * r, e)


def _flatten_heads(weights: jax.Array) -> jax.Array:
    b, g, r, n, m = weights.shape
    return weights.reshape(b, g * r, n, m)


# One block of keys at a time


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(rules: _Rules, block_size: int, terms: _Terms, v: jax.Array, scale: jax.Array, batch: _Batch) -> jax.Array:
    """`(B, G, R, N, E)` in float32 (or wider)."""
    return _blocked_forward(rules, block_size, terms, v, scale, batch)[0]


def _blocked_forward(rules, block_size, terms, v, scale, batch):
    padded_terms, padded_v, padded_batch, count = _pad(block_size, terms, v, batch)
    b, n, g, r, _ = terms.q.shape
    least = jnp.finfo(scale.dtype).min

    def block(carry, index):
        y, top, total = carry
        some_terms, some_v, some = _slice(index * block_size, block_size, padded_terms, padded_v, padded_batch)
        allowed = _allowed(rules, some)
        scores = _scores(rules, some_terms, scale)
        scores = scores if allowed is None else jnp.where(allowed, scores, least)
        higher = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - higher[..., None])
        weights = weights if allowed is None else jnp.where(allowed, weights, 0)
        shrink = jnp.exp(top - higher)
        y = y * shrink[..., None] + _sum_values(weights, some_v)
        return (y, higher, total * shrink + weights.sum(-1)), None

    rows = (b, g, r, n)
    start = (
        jnp.zeros((*rows, v.shape[-1]), scale.dtype),
        jnp.full(rows, least, scale.dtype),
        jnp.zeros(rows, scale.dtype),
    )
    (y, top, total), _ = jax.lax.scan(block, start, jnp.arange(count))
    empty = total == 0
    total = jnp.where(empty, 1, total)
    y = y / total[..., None]
    return y, (terms, v, scale, batch, y, jnp.where(empty, 0, top + jnp.log(total)))


def _blocked_backward(rules, block_size, saved, dy):
    terms, v, scale, batch, y, log_total = saved
    padded_terms, padded_v, padded_batch, count = _pad(block_size, terms, v, batch)
    shared = (dy * y).sum(-1)

    def surrogate(q, k, bias, v, scale, some):
        """Has, at this point, the gradient of the whole: ds = weights · (dy·v - dy·y)."""
        allowed = _allowed(rules, some)
        scores = _scores(rules, _Terms(q, k, bias), scale)
        scores = scores if allowed is None else jnp.where(allowed, scores, jnp.finfo(scale.dtype).min)
        weights = jnp.exp(scores - log_total[..., None])
        weights = weights if allowed is None else jnp.where(allowed, weights, 0)
        return (dy * _sum_values(weights, v)).sum() - (weights.sum(-1) * shared).sum()

    per_key = terms.bias is not None and padded_terms.bias.shape[-1] > 1

    def block(carry, index):
        dq, dbias, dscale = carry
        some_terms, some_v, some = _slice(index * block_size, block_size, padded_terms, padded_v, padded_batch)
        arguments = (0, 1, 3, 4) if terms.bias is None else (0, 1, 3, 4, 2)
        more_q, dk, dv, more_scale, *more_bias = jax.grad(surrogate, arguments)(*some_terms, some_v, scale, some)
        if more_bias and not per_key:
            dbias = dbias + more_bias[0].astype(scale.dtype)
        blocks = (dk, dv, more_bias[0] if per_key else None)
        return (dq + more_q.astype(scale.dtype), dbias, dscale + more_scale), blocks

    dbias = None if terms.bias is None or per_key else jnp.zeros(padded_terms.bias.shape, scale.dtype)
    start = (jnp.zeros(terms.q.shape, scale.dtype), dbias, jnp.zeros_like(scale))
    (dq, dbias, dscale), (dk, dv, dbiases) = jax.lax.scan(block, start, jnp.arange(count))
    if per_key:
        dbias = _join(dbiases, -1, terms.k.shape[1])
    dbias = None if dbias is None else dbias.astype(terms.bias.dtype)
    grads = _Terms(dq.astype(terms.q.dtype), _join(dk, 1, terms.k.shape[1]), dbias)
    return grads, _join(dv, 1, v.shape[1]), dscale, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _pad(block_size: int, terms: _Terms, v: jax.Array, batch: _Batch) -> tuple[_Terms, jax.Array, _Batch, int]:
    """Keys up to a multiple of the block, masked where there are none, and the number of blocks."""
    keys = v.shape[1]
    extra = -keys % block_size
    count = (keys + extra) // block_size
    if not extra:
        return terms, v, batch, count

    def pad(a, axis, fill=0):
        if a is None or a.shape[axis] == 1:
            return a
        return jnp.pad(a, [(0, extra if i == axis % a.ndim else 0) for i in range(a.ndim)], constant_values=fill)

    real = (jnp.arange(keys + extra) < keys)[None, None, None, None]
    mask = real if batch.mask is None else pad(batch.mask, -1) & real
    batch = batch._replace(mask=mask, k_ids=pad(batch.k_ids, 1), k_idx=pad(batch.k_idx, 1))
    return terms._replace(k=pad(terms.k, 1), bias=pad(terms.bias, -1)), pad(v, 1), batch, count


def _slice(start: jax.Array, size: int, terms: _Terms, v: jax.Array, batch: _Batch) -> tuple[_Terms, jax.Array, _Batch]:
    def take(a, axis):
        if a is None or a.shape[axis] == 1:
            return a
        return jax.lax.dynamic_slice_in_dim(a, start, size, axis)

    terms = terms._replace(k=take(terms.k, 1), bias=take(terms.bias, -1))
    batch = batch._replace(mask=take(batch.mask, -1), k_ids=take(batch.k_ids, 1), k_idx=take(batch.k_idx, 1))
    return terms, take(v, 1), batch


def _join(blocks: jax.Array, axis: int, keys: int) -> jax.Array:
    """Blocks stacked in front to one axis of keys, without padding."""
    axis = axis % (blocks.ndim - 1)
    moved = jnp.moveaxis(blocks, 0, axis)
    joined = moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])
    return jax.lax.slice_in_dim(joined, 0, keys, axis=axis)
