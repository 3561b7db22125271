"""Chunked linear attention in plain JAX: every platform, linear time and memory, forward and backward.

Causal attention walks over chunks of tokens with the state S at hand (Lightning Attention-2, arXiv:2401.04658; decay
per channel as in gated linear attention, arXiv:2312.06635). For a chunk, with G the cumulated log decay inside it,

    y  = ((q kᵀ) ∘ P) v + exp(G) (q S)           P_ij = exp(G_i - G_j), i ≥ j
    S' = exp(G_end) S + (exp(G_end - G) k)ᵀ v

The backward pass (`_sweep_backward`) walks from the last chunk to the first with dS at hand. It keeps the inputs and
about √T states of the T chunks, rebuilds the states between two kept ones when it gets there, and differentiates one
chunk at a time.

No exponent is positive. A sum of decays between two tokens is not the rounded difference of two long sums: `_Decay`
cumulates a coarse part, exact in the accumulator, and a small rest, so that one strong decay early in a chunk leaves
the later ones accurate. Decay per channel halves the chunk again and again, see `_channel_scores`.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_attention.arguments import (
    Arguments,
    State,
    decay_floor,
    decay_of_segments,
    finish,
    in_order_of_ids,
    pack_state,
    unpack_state,
    with_ones,
)

SCALAR_CHUNK = 128  # measured on CPU, see README.md
CHANNEL_CHUNK = 32


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static in a sweep: tokens per chunk, dtype of the outputs, and precision of the products."""

    size: int
    out_dtype: jnp.dtype
    precision: jax.lax.Precision


class _Decay(NamedTuple):
    """Weights of the tokens of a chunk of c tokens; leading axes (B, G, H / G), each of which may be 1.

    Attributes:
      between: exp(G_i - G_j) for i ≥ j, else 0, (..., c, c).
      since_start: exp(G_i), (..., c), or None for 1.
      until_end: exp(G_end - G_j), (..., c), or None for 1.
      whole: exp(G_end), (...,), or None for 1.
    """

    between: jax.Array
    since_start: jax.Array | None = None
    until_end: jax.Array | None = None
    whole: jax.Array | None = None


def supports(args: Arguments) -> str | None:
    """Why this implementation cannot take `args`; None when it can."""
    if args.chunk_size is not None and not args.causal and args.query_ids is None:
        return f"without causality and segments it has no chunks, so chunk_size must be None, got {args.chunk_size}"
    return None


@jax.jit
def run(args: Arguments) -> tuple[jax.Array, State | None]:
    """y (B, N, H, E) and, if asked for, the state."""
    v = with_ones(args.v) if args.normalize else args.v
    initial = None if args.initial_state is None else pack_state(args.initial_state)
    if args.causal:
        y, state = _causal(args, args.q, args.k, v, initial, args.query_ids)
    elif args.query_ids is None:
        y, state = _full(args, v, initial)
    else:
        y = in_order_of_ids(lambda q, k, v, ids: _causal(args, q, k, v, None, ids)[0], args, v)
        state = None
    y = finish(y, args.scale, args.normalize, args.q.dtype)
    return y, unpack_state(state, args.normalize) if args.return_state else None


def _full(args: Arguments, v: jax.Array, initial: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Non-causal attention without segments: one sum over all keys."""
    state = sum_of_keys(args, v)
    state = state if initial is None else state + initial
    return read(args, state), state


def sum_of_keys(args: Arguments, v: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Σ_j w_j k_j v_jᵀ, (B, H, D, E) in the accumulator dtype: every key at once, in one product.

    Args:
      args: arguments, for their keys.
      v: values to sum, (B, M, G, E).
      weights: w, (B | 1, M, H) or (B, M, H, D), or None for 1.
    """
    heads, (batch, _, groups, _) = args.q.shape[2], args.k.shape
    product = functools.partial(jnp.einsum, precision=_precision(args.k.dtype), preferred_element_type=args.accumulator)
    if weights is None:
        state = product("bjgd,bjge->bgde", args.k, v)[:, :, None]
        return _merged(jnp.broadcast_to(state, (batch, groups, heads // groups, *state.shape[3:])), 1)
    weights = _grouped(weights, groups)
    weights = weights if weights.ndim == 5 else weights[..., None]
    k = (args.k[:, :, :, None] * weights).astype(args.k.dtype)
    return _merged(product("bjgrd,bjge->bgrde", k, v), 1)


def read(args: Arguments, state: jax.Array) -> jax.Array:
    """q_i S for every query, (B, N, H, E) in the accumulator dtype."""
    return jnp.einsum("bihd,bhde->bihe", args.q.astype(state.dtype), state, precision=_precision(args.q.dtype))


def _causal(args: Arguments, q, k, v, initial: jax.Array | None, ids: jax.Array | None):
    """Causal attention: chooses chunks and the form of the decay, pads N to whole chunks, and sweeps.

    The padding stands in front: empty tokens behind the last one would add and subtract the same undecayed numbers in
    the gradient of a strong decay, and drown it in their rounding.
    """
    dtype, n, heads, decay = args.accumulator, q.shape[1], q.shape[2], args.log_decay
    per_channel = decay is not None and decay.ndim == 4
    size = _chunk_size(n, args.chunk_size, CHANNEL_CHUNK if per_channel else SCALAR_CHUNK)
    padding = -n % size
    if ids is not None:
        decay = decay_of_segments(args, ids)
    elif decay is not None and decay.ndim == 1 and padding and initial is not None:
        decay = jnp.broadcast_to(decay, (1, n, heads))  # not the same for every token: padding must not decay the state
    tokens = {"q": q, "k": k, "v": v}
    shared = None
    if decay is not None and decay.ndim == 1:
        shared = decay
    elif decay is not None:
        tokens["g"] = decay
    if padding:
        tokens = {name: jnp.pad(x, ((0, 0), (padding, 0), *((0, 0),) * (x.ndim - 2))) for name, x in tokens.items()}
    # Typed as the inputs are: under shard_map and explicit sharding a constant would be no valid loop carry.
    groups = k.shape[2]
    state = jnp.zeros_like(_grouped(q[:, 0], groups, axis=1)[..., None] * v[:, 0, :, None, None, :], dtype=dtype)
    state = state if initial is None else state + _grouped(initial, groups, axis=1)
    tokens, shared, state = _same_manual_axes((tokens, shared, state))
    shared = None if shared is None else _constant_decay(shared, size, groups)
    plan = _Plan(size, dtype if args.normalize else q.dtype, _precision(q.dtype))
    y, state = _sweep(plan, shared, tokens, state)
    return y[:, padding:], _merged(state, 1)


# ---- the sweep over chunks, and its hand-written derivative


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sweep(plan: _Plan, shared: _Decay | None, tokens: dict[str, jax.Array], state: jax.Array):
    """All chunks in order: outputs (B, N, H, E) and the last state (B, G, H / G, D, E)."""
    y, state, _ = _walk(plan, shared, tokens, state, every=None)
    return y, state


def _sweep_forward(plan: _Plan, shared: _Decay | None, tokens: dict[str, jax.Array], state: jax.Array):
    every = math.ceil(math.sqrt(_count(plan, tokens)))
    y, last, kept = _walk(plan, shared, tokens, state, every)
    return (y, last), (shared, tokens, kept)


def _sweep_backward(plan: _Plan, residuals, cotangents):
    (shared, tokens, kept), (dy, dstate) = residuals, cotangents
    count = _count(plan, tokens)
    every = math.ceil(math.sqrt(count))
    chunk = functools.partial(_chunk, plan)

    def span(number, carry):  # the chunks between two kept states, the last span first
        number = kept.shape[0] - 1 - number
        first = number * every
        last = jnp.minimum(first + every, count)

        def rebuild(t, carry):
            state, starts = carry
            starts = jax.lax.dynamic_update_index_in_dim(starts, state, t - first, 0)
            return chunk(shared, _slice(plan, tokens, t), state)[1], starts

        def backward(step, carry):
            dshared, dtokens, dstate = carry
            t = last - 1 - step
            _, pullback = jax.vjp(chunk, shared, _slice(plan, tokens, t), starts[t - first])
            dshared_t, dtokens_t, dstate = pullback((_slice(plan, dy, t), dstate))
            dshared = jax.tree.map(jnp.add, dshared, dshared_t)
            return dshared, _write(plan, dtokens, dtokens_t, t), dstate

        empty = jnp.zeros_like(jnp.broadcast_to(kept[:1], (every, *kept.shape[1:])))
        _, starts = jax.lax.fori_loop(first, last, rebuild, (kept[number], empty))
        return jax.lax.fori_loop(0, last - first, backward, carry)

    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return jax.lax.fori_loop(0, kept.shape[0], span, (zeros(shared), zeros(tokens), dstate))


_sweep.defvjp(_sweep_forward, _sweep_backward)


def _walk(plan: _Plan, shared: _Decay | None, tokens: dict[str, jax.Array], state: jax.Array, every: int | None):
    """Outputs, last state, and the state before each `every`-th chunk (None when `every` is)."""
    count = _count(plan, tokens)
    q, v = tokens["q"], tokens["v"]
    y = _merged(jnp.zeros_like(_grouped(q, v.shape[2])[..., :1] * v[:, :, :, None], dtype=plan.out_dtype), 2)
    spans = 0 if every is None else math.ceil(count / every)
    kept = jnp.zeros_like(jnp.broadcast_to(state, (spans + 1, *state.shape))).at[0].set(state)

    def body(t, carry):
        state, y, kept = carry
        y_chunk, state = _chunk(plan, shared, _slice(plan, tokens, t), state)
        if every is not None:  # the last chunk of a span writes last
            kept = jax.lax.dynamic_update_index_in_dim(kept, state, t // every + 1, 0)
        return state, _write(plan, y, y_chunk, t), kept

    state, y, kept = jax.lax.fori_loop(0, count, body, (state, y, kept))
    return y, state, kept[:spans]


def _count(plan: _Plan, tokens: dict[str, jax.Array]) -> int:
    return tokens["q"].shape[1] // plan.size


def _slice(plan: _Plan, tree, t):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, t * plan.size, plan.size, 1), tree)


def _write(plan: _Plan, tree, chunk, t):
    return jax.tree.map(lambda x, c: jax.lax.dynamic_update_slice_in_dim(x, c, t * plan.size, 1), tree, chunk)


# ---- one chunk


def _chunk(plan: _Plan, shared: _Decay | None, tokens: dict[str, jax.Array], state: jax.Array):
    """Outputs (B, c, H, E) of one chunk in the plan's dtype, and the state (B, G, R, D, E) after it; R = H / G."""
    dtype, groups = state.dtype, tokens["k"].shape[2]
    product = functools.partial(jnp.einsum, precision=plan.precision)
    q = jnp.transpose(_grouped(tokens["q"].astype(dtype), groups), (0, 2, 3, 1, 4))
    k, v = (jnp.swapaxes(tokens[name].astype(dtype), 1, 2) for name in "kv")
    if "g" in tokens and tokens["g"].ndim == 4:
        g = jnp.transpose(_grouped(tokens["g"], groups), (0, 2, 3, 1, 4))
        scores, since_start, until_end = _channel_scores(product, q, k[:, :, None], g)
        y = product("bgrij,bgje->bgrie", scores, v) + product("bgrid,bgrde->bgrie", q * since_start, state)
        k = k[:, :, None] * until_end
        state = state * since_start[..., -1, :, None]
    else:
        decay = shared
        if "g" in tokens:
            decay = _scalar_decay(_grouped(jnp.swapaxes(tokens["g"], 1, 2), groups, axis=1))
        elif shared is None:
            decay = _Decay(jnp.tril(jnp.ones((plan.size, plan.size), dtype)))
        scores = product("bgrid,bgjd->bgrij", q, k) * decay.between
        inter = product("bgrid,bgrde->bgrie", q, state)
        if decay.whole is not None:
            inter = inter * decay.since_start[..., None]
            state = state * decay.whole[..., None, None]
        y = product("bgrij,bgje->bgrie", scores, v) + inter
        k = k[:, :, None] if decay.until_end is None else k[:, :, None] * decay.until_end[..., None]
    k = jnp.broadcast_to(k, q.shape)
    state = state + product("bgrjd,bgje->bgrde", k, v)
    return _merged(jnp.transpose(y, (0, 3, 1, 2, 4)), 2).astype(plan.out_dtype), state


def _constant_decay(log_decay: jax.Array, size: int, groups: int) -> _Decay:
    """Weights of a decay (H,) that is the same for every token, computed once for all chunks."""
    g = log_decay.reshape(1, groups, -1, 1)
    place = jnp.arange(size, dtype=g.dtype)
    apart = jnp.maximum(place[:, None] - place[None, :], 0)
    return _Decay(
        between=jnp.tril(jnp.exp(g[..., None] * apart)),
        since_start=jnp.exp(g * (place + 1)),
        until_end=jnp.exp(g * (size - 1 - place)),
        whole=jnp.exp(g[..., 0] * size),
    )


def _scalar_decay(g: jax.Array) -> _Decay:
    """Weights of log decays (..., c)."""
    size, dtype = g.shape[-1], g.dtype
    floor = decay_floor(dtype)
    g = jnp.where(g < -floor, -floor, g)  # exp is 0 there already
    # Multiples of `step` up to size·floor are exact in `dtype`, and so are all their sums; the rests stay below `step`.
    step = 2.0 ** (math.ceil(math.log2(size * floor)) - jnp.finfo(dtype).nmant - 1)
    coarse = jax.lax.stop_gradient(jnp.ceil(g / step) * step)
    lower = jnp.tril(jnp.ones((size, size), dtype))
    total, rest = (jnp.einsum("...j,ij->...i", x, lower, precision="highest") for x in (coarse, g - coarse))

    def weight(later, earlier, mask=None):
        exponent = (later[0] - earlier[0]) + (later[1] - earlier[1])
        exponent = exponent - jax.lax.stop_gradient(jnp.maximum(exponent, 0))  # rounding may leave +1e-9
        return jnp.exp(exponent if mask is None else jnp.where(mask, exponent, 0))

    end = total[..., -1:], rest[..., -1:]
    # A token's weight in itself is 1 whatever the decay: without a mask its gradient would be a difference of sums.
    below, before_end = jnp.tril(jnp.ones((size, size), bool), -1), jnp.arange(size) < size - 1
    rows, columns = (total[..., :, None], rest[..., :, None]), (total[..., None, :], rest[..., None, :])
    since_start = weight((total, rest), (0.0, 0.0))
    return _Decay(
        between=weight(rows, columns, below) * lower,
        since_start=since_start,
        until_end=weight(end, (total, rest), before_end),
        whole=since_start[..., -1],
    )


def _channel_scores(product, q: jax.Array, k: jax.Array, g: jax.Array):
    """Scores Σ_d q_id k_jd exp(G_id - G_jd), i ≥ j, of a chunk, with exp(G) and exp(G_end - G).

    The chunk is halved again and again. Two different tokens part at one level, where i stands right and j left of a
    border: their decay is that of i since the border times that of j until the border, two exponents that are at most
    0 and plain sums of log decays. So a level is one matrix product, under the mask of the pairs that part there.

    Args:
      product: einsum.
      q: (B, G, R, c, D).
      k: (B, G, 1, c, D).
      g: log decays, shaped as q.

    Returns:
      scores (B, G, R, c, c), exp(G) and exp(G_end - G) (B, G, R, c, D).
    """
    size = q.shape[-2]
    to_border, parts = _levels(size)
    exponents = jnp.einsum("lij,bgrjd->lbgrid", to_border.astype(g.dtype), g, precision="highest")
    *weights, since_start, until_end = jnp.exp(exponents)
    scores = jnp.eye(size, dtype=q.dtype) * jnp.sum(q * k, axis=-1)[..., None]
    for weight, part in zip(weights, parts, strict=True):
        scores = scores + part * product("bgrid,bgrjd->bgrij", q * weight, k * weight)
    return scores, since_start, until_end


def _levels(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Constants of `_channel_scores` for chunks of `size` tokens and L levels.

    Returns:
      (L + 2, c, c): ones where token j lies between token i and its border of a level; last, up to i, and after i.
      (L, c, c): ones where tokens i ≥ j part at a level.
    """
    row, column = np.arange(size)[:, None], np.arange(size)[None, :]
    to_border, parts = [], []
    for half in (2**level for level in range((size - 1).bit_length())):
        same, right = row // (2 * half) == column // (2 * half), row // half % 2 == 1
        same_half = row // half == column // half
        to_border.append(same_half & np.where(right, column <= row, column > row))
        parts.append(same & right & (column // half % 2 == 0))
    to_border += [column <= row, column > row]
    return np.array(to_border, np.float32), np.array(parts, np.float32).reshape(-1, size, size)


# ---- small things


def _precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """One pass of the matrix unit holds half-precision inputs exactly; wider ones need all passes."""
    return jax.lax.Precision.DEFAULT if jnp.dtype(dtype).itemsize < 4 else jax.lax.Precision.HIGHEST


def _chunk_size(length: int, asked: int | None, default: int) -> int:
    """Tokens per chunk: the asked number, or at most `default` with chunks of about equal length."""
    if asked is not None:
        return min(asked, length)
    count = math.ceil(length / default)
    return length if count == 1 else min(default, 16 * math.ceil(length / (16 * count)))


def _grouped(x: jax.Array, groups: int, axis: int = 2) -> jax.Array:
    """Splits heads H at `axis` into (G, H / G); an axis of 1 becomes (1, 1)."""
    if x.shape[axis] == groups or x.shape[axis] == 1:
        return jnp.expand_dims(x, axis + 1)
    return x.reshape(*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])


def _merged(x: jax.Array, axis: int) -> jax.Array:
    """Inverse of `_grouped`: joins `axis` and the next one."""
    if x.shape[axis + 1] == 1:
        return jnp.squeeze(x, axis + 1)
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def _same_manual_axes(tree):
    """Makes all arrays vary over the same manual mesh axes, so that a loop inside shard_map may carry any of them."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))

    def cast(x):
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)
