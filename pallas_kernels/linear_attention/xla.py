"""Chunked linear attention in plain JAX: every platform, linear time and memory, forward and backward.

Causal attention walks over chunks of tokens with the state S at hand (Lightning Attention-2, arXiv:2401.04658; decay
per channel as in gated linear attention, arXiv:2312.06635). For a chunk, with G the cumulated log decay inside it,

    y  = ((q kᵀ) ∘ P) v + exp(G) (q S)           P_ij = exp(G_i - G_j), i ≥ j
    S' = exp(G_end) S + (exp(G_end - G) k)ᵀ v

`chunks.sweep` walks, and back from the last chunk to the first with dS at hand. It keeps the inputs and the state
before every chunk, or before some of them where all would be large beside the inputs.

No exponent is positive, see `chunk_decay`. Decay per channel halves the chunk again and again, see `_channel_scores`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import chunks, dispatch, partition
from pallas_kernels.chunk_decay import Decay, constant_decay, decay_of_chunk, decayed, scalar_decay
from pallas_kernels.chunks import grouped, merged, product_precision, tokens_per_chunk
from pallas_kernels.linear_attention.arguments import in_order_of_ids
from pallas_kernels.promotion import numpy_ranks
from pallas_kernels.recurrence import (
    Arguments,
    State,
    decay_of_segments,
    finish,
    pack_state,
    unpack_state,
    with_ones,
)

# Tokens per chunk. A CPU is bound by operations, and small chunks have the fewest (measured, see README.md); elsewhere
# every chunk is a few launches.
CPU_CHUNK = 32
SCALAR_CHUNK = 128
CHANNEL_CHUNK = 32


def supports(args: Arguments) -> str | None:
    """Why this implementation cannot take `args`; None when it can."""
    if args.chunk_size is not None and not args.causal and args.query_ids is None:
        return f"without causality and segments it has no chunks, so chunk_size must be None, got {args.chunk_size}"
    return None


def run(args: Arguments) -> tuple[jax.Array, State | None]:
    """y (B, N, H, E) and, if asked for, the state."""
    return _run(CPU_CHUNK if dispatch.current_platform() == "cpu" else SCALAR_CHUNK, args)


@functools.partial(jax.jit, static_argnums=0)
def _run(default_chunk: int, args: Arguments) -> tuple[jax.Array, State | None]:
    causal = functools.partial(_causal, default_chunk, args)
    v = with_ones(args.v) if args.normalize else args.v
    initial = None if args.initial_state is None else pack_state(args.initial_state)
    if args.causal:
        y, state = causal(args.q, args.k, v, initial, args.query_ids)
    elif args.query_ids is None:
        y, state = _full(args, v, initial)
    else:
        y = in_order_of_ids(lambda q, k, v, ids: causal(q, k, v, None, ids)[0], args, v)
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
    product = functools.partial(jnp.einsum, precision=product_precision(args.k.dtype))
    k, v = args.k.astype(args.accumulator), v.astype(args.accumulator)
    if weights is None:
        state = product("bjgd,bjge->bgde", k, v)[:, :, None]
        return merged(jnp.broadcast_to(state, (batch, groups, heads // groups, *state.shape[3:])), 1)
    weights = grouped(weights, groups)
    weights = weights if weights.ndim == 5 else weights[..., None]
    return merged(product("bjgrd,bjge->bgrde", k[:, :, :, None] * weights, v), 1)


def read(args: Arguments, state: jax.Array) -> jax.Array:
    """q_i S for every query, (B, N, H, E) in the accumulator dtype."""
    return jnp.einsum("bihd,bhde->bihe", args.q.astype(state.dtype), state, precision=product_precision(args.q.dtype))


def _causal(default_chunk: int, args: Arguments, q, k, v, initial: jax.Array | None, ids: jax.Array | None):
    """Causal attention: chooses chunks and the form of the decay, fills N up to whole chunks, and sweeps.

    The padding stands in front: empty tokens behind the last one would add and subtract the same undecayed numbers in
    the gradient of a strong decay, and drown it in their rounding. Where it would decay an initial state, as its decay
    is that of every token, the first tokens are a smaller chunk of their own instead.
    """
    dtype, n, decay, groups = args.accumulator, q.shape[1], args.log_decay, k.shape[2]
    per_channel = decay is not None and decay.ndim == 4
    size = tokens_per_chunk(n, args.chunk_size, CHANNEL_CHUNK if per_channel else default_chunk)
    if ids is not None:
        decay = decay_of_segments(args, ids)
    constant = decay is not None and decay.ndim == 1
    tokens = {"q": q, "k": k, "v": v} | ({} if decay is None or constant else {"g": decay})
    first, padding = (n % size, 0) if constant and initial is not None else (0, -n % size)
    if padding:
        tokens = {name: jnp.pad(x, ((0, 0), (padding, 0), *((0, 0),) * (x.ndim - 2))) for name, x in tokens.items()}
    # Typed as the inputs are: under shard_map and explicit sharding a constant would be no valid loop carry.
    state = jnp.zeros_like(grouped(q[:, 0], groups, axis=1)[..., None] * v[:, 0, :, None, None, :], dtype=dtype)
    state = state if initial is None else state + grouped(initial, groups, axis=1)
    tokens, decay, state = partition.same_manual_axes((tokens, decay if constant else None, state))

    def shared(size: int):
        if not constant:
            return None
        each = jnp.broadcast_to(decay.reshape(1, groups, -1), state.shape[:3])
        return each, constant_decay(decay, size, groups)

    out_dtype = dtype if args.normalize else q.dtype
    chunk = functools.partial(_chunk, product_precision(q.dtype), out_dtype)
    outputs = []
    if first:
        y, state = chunk(shared(first), {name: x[:, :first] for name, x in tokens.items()}, state)
        outputs.append(y)
        tokens = {name: x[:, first:] for name, x in tokens.items()}
    plan = chunks.Plan(size, chunk, functools.partial(_empty, out_dtype))
    y, state = chunks.sweep(plan, shared(size), tokens, state)
    outputs.append(y[:, padding:])
    return jnp.concatenate(outputs, axis=1) if first else outputs[0], merged(state, 1)


def _empty(dtype: jnp.dtype, tokens: dict[str, jax.Array]) -> jax.Array:
    q, v = tokens["q"], tokens["v"]
    return merged(jnp.zeros_like(grouped(q, v.shape[2])[..., :1] * v[:, :, :, None], dtype=dtype), 2)


# ---- one chunk


def _chunk(precision: jax.lax.Precision, out_dtype: jnp.dtype, shared, tokens: dict[str, jax.Array], state: jax.Array):
    """One chunk of c tokens.

    Args:
      precision: of the products.
      out_dtype: dtype of the outputs.
      shared: None, or a decay per head: its logs (B, G, R), R = H / G, and their weights.
      tokens: q, k, v and, for decay per token or channel, g.
      state: the state before it, (B, G, R, D, E).

    Returns:
      Outputs (B, c, H, E), and the state after it.
    """
    dtype, (size, groups) = state.dtype, tokens["k"].shape[1:3]
    q = jnp.transpose(grouped(tokens["q"].astype(dtype), groups), (0, 2, 3, 1, 4))
    k, v = (jnp.swapaxes(tokens[name].astype(dtype), 1, 2) for name in "kv")
    if "g" in tokens and tokens["g"].ndim == 4:
        g = jnp.transpose(grouped(tokens["g"], groups), (0, 2, 3, 1, 4))
        y, state = _channel_chunk(precision, q, k, v, g, state)
    else:
        decay = None
        if "g" in tokens:
            decay = scalar_decay(grouped(jnp.swapaxes(tokens["g"], 1, 2), groups, axis=1))
        elif shared is not None:
            decay = decay_of_chunk(size, *shared)
        y, state = _scalar_chunk(precision, q, k, v, decay, state)
    return merged(jnp.transpose(y, (0, 3, 1, 2, 4)), 2).astype(out_dtype), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scalar_chunk(precision: jax.lax.Precision, q, k, v, decay: Decay | None, state: jax.Array):
    """One chunk whose decay is a number per token: outputs (B, G, R, c, E) and the state after it.

    Args:
      precision: of the products.
      q: (B, G, R, c, D).
      k: (B, G, c, D).
      v: (B, G, c, E).
      decay: weights for every B, G and R, or None without a decay.
      state: (B, G, R, D, E).
    """
    product = functools.partial(jnp.einsum, precision=precision)
    scores = decayed(product("bgrid,bgjd->bgrij", q, k), decay)
    inter = product("bgrid,bgrde->bgrie", q, state)
    values = v[:, :, None]
    if decay is not None:
        inter = inter * decay.since_start[..., None]
        state = state * decay.whole[..., None, None]
        values = values * decay.until_end[..., None]
    y = product("bgrij,bgje->bgrie", scores, v) + inter
    keys, values = (jnp.broadcast_to(x, (*q.shape[:4], x.shape[-1])) for x in (k[:, :, None], values))
    return y, state + product("bgrjd,bgrje->bgrde", keys, values)


def _scalar_chunk_forward(precision: jax.lax.Precision, *arrays):
    return _scalar_chunk(precision, *arrays), arrays


@numpy_ranks()
def _scalar_chunk_backward(precision: jax.lax.Precision, residuals, cotangents):
    """With A the undecayed scores, dA = dy vᵀ and S, dS' the state before the chunk and the cotangent of that after it,

        dq = (P ∘ dA) k + exp(G) (dy Sᵀ)          dk = (P ∘ dA)ᵀ q + exp(G_end - G) (v dS'ᵀ)
        dS = exp(G_end) dS' + (exp(G) q)ᵀ dy      dv = (P ∘ A)ᵀ dy + exp(G_end - G) (k dS')

    and the cotangents of the weights are A ∘ dA, q·(dy Sᵀ), k·(v dS'ᵀ) and <S, dS'>.
    """
    (q, k, v, decay, state), (dy, dstate) = residuals, cotangents
    product = functools.partial(jnp.einsum, precision=precision)
    scores, dscores = product("bgrid,bgjd->bgrij", q, k), product("bgrie,bgje->bgrij", dy, v)
    weighted, dweighted = decayed(scores, decay), decayed(dscores, decay)
    dq, dk = product("bgrie,bgrde->bgrid", dy, state), product("bgje,bgrde->bgrjd", v, dstate)
    dv = product("bgjd,bgrde->bgrje", k, dstate)
    ddecay, queries, dbefore = None, q, dstate
    if decay is not None:
        ddecay = Decay(
            scores * dscores, _row_sums(q * dq), _row_sums(k[:, :, None] * dk), jnp.sum(state * dstate, axis=(-2, -1))
        )
        since_start, until_end = decay.since_start[..., None], decay.until_end[..., None]
        dq, dk, dv, queries = dq * since_start, dk * until_end, dv * until_end, q * since_start
        dbefore = dstate * decay.whole[..., None, None]
    dq = dq + product("bgrij,bgjd->bgrid", dweighted, k)
    dk = jnp.sum(dk, axis=2) + product("bgrij,bgrid->bgjd", dweighted, q)
    dv = jnp.sum(dv, axis=2) + product("bgrij,bgrie->bgje", weighted, dy)
    return dq, dk, dv, ddecay, dbefore + product("bgrid,bgrie->bgrde", queries, dy)


_scalar_chunk.defvjp(_scalar_chunk_forward, _scalar_chunk_backward)


def _row_sums(x: jax.Array) -> jax.Array:
    """Sums over the last axis, as a product, which on a CPU takes a third of the time."""
    return jnp.einsum("...d,d->...", x, jnp.ones(x.shape[-1:], x.dtype), precision="highest")


def _channel_chunk(precision: jax.lax.Precision, q, k, v, g: jax.Array, state: jax.Array):
    """As `_scalar_chunk`, with log decays (B, G, R, c, D); differentiated by JAX."""
    product = functools.partial(jnp.einsum, precision=precision)
    scores, since_start, until_end = _channel_scores(product, q, k[:, :, None], g)
    inter = product("bgrid,bgrde->bgrie", q * since_start, state)
    y = product("bgrij,bgje->bgrie", scores, v) + inter
    keys, values = k[:, :, None] * until_end, jnp.broadcast_to(v[:, :, None], (*q.shape[:4], v.shape[-1]))
    return y, state * since_start[..., -1, :, None] + product("bgrjd,bgrje->bgrde", keys, values)


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
