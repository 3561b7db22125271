"""Chunked delta rule attention in plain JAX: every platform, linear time and memory, forward and backward.

In a chunk of tokens, with G the cumulated log decay inside it and S the state before it, what token i writes along its
key is u_i = β_i (v_i - S̃_iᵀ k_i), and S̃_i is S and the earlier writes, decayed. So the writes U (c, E) solve a unit
lower triangular system (the WY representation of arXiv:2406.06484, with the decay of arXiv:2412.06464),

    (I + L) U = β ∘ (v - exp(G) (k S))           L_ij = β_i (k_i·k_j) exp(G_i - G_j), i > j

and with them the chunk is one of linear attention that adds U in place of v:

    y  = ((q kᵀ) ∘ P) U + exp(G) (q S)           P_ij = exp(G_i - G_j), i ≥ j
    S' = exp(G_end) S + (exp(G_end - G) k)ᵀ U

The papers multiply the inverse with v and with k ahead of the sweep, to have the chunks in parallel; here they come one
after the other anyway, and one product with the inverse is less work than two.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_decay import constant_decay, decay_of_chunk, decayed, scalar_decay
from pallas_kernels.chunks import Plan, Tokens, grouped, merged, product_precision, sweep, tokens_per_chunk
from pallas_kernels.delta_rule_attention.arguments import Arguments
from pallas_kernels.partition import same_manual_axes
from pallas_kernels.promotion import numpy_ranks
from pallas_kernels.recurrence import decay_of_segments

CHUNK = 64  # measured on CPU, see README.md
BLOCK = 16  # tokens whose triangle is inverted row by row


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """The function of one chunk; a value, so that equal plans compile once.

    Attributes:
      dtype: of the outputs.
    """

    dtype: jnp.dtype

    @property
    def precision(self) -> jax.lax.Precision:
        """Of products with a state, or what is written to it: with β up to 2 nothing forgets that it was rounded."""
        return jax.lax.Precision.HIGH if jnp.dtype(self.dtype).itemsize < 4 else jax.lax.Precision.HIGHEST

    def __call__(self, shared, tokens: Tokens, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Outputs (B, c, H, E) of a chunk, and the state (B, G, R, D, E) after it; R = H / G.

        `shared` is a pair: a decay per head, its logs (B, G, R) and their weights, or None; and the scale, or None.
        """
        decay, scale = shared
        dtype, groups, size = state.dtype, tokens["k"].shape[2], tokens["k"].shape[1]
        product = functools.partial(jnp.einsum, precision=self.precision)
        pairs = functools.partial(jnp.einsum, precision=product_precision(self.dtype))
        q = jnp.transpose(grouped(tokens["q"].astype(dtype), groups), (0, 2, 3, 1, 4))
        k, v = (jnp.swapaxes(tokens[name].astype(dtype), 1, 2)[:, :, None] for name in "kv")
        beta = grouped(jnp.swapaxes(tokens["beta"], 1, 2), groups, axis=1)[..., None]
        if "g" in tokens:
            decay = scalar_decay(grouped(jnp.swapaxes(tokens["g"], 1, 2), groups, axis=1))
        elif decay is not None:
            decay = decay_of_chunk(size, *decay)
        since_start = until_end = whole = 1
        if decay is not None:
            since_start, until_end = decay.since_start[..., None], decay.until_end[..., None]
            whole = decay.whole[..., None, None]

        overlap = decayed(pairs("bgrid,bgrjd->bgrij", k, k), decay)
        predicted = since_start * product("bgsjd,bgrde->bgrje", k, state)
        writes = _solve(self.precision, jnp.tril(beta * overlap, -1), beta * (v - predicted))
        scores = decayed(pairs("bgrid,bgsjd->bgrij", q, k), decay)
        y = product("bgrij,bgrje->bgrie", scores, writes) + since_start * product("bgrid,bgrde->bgrie", q, state)
        y = y if scale is None else scale * y
        k = jnp.broadcast_to(k * until_end, q.shape)
        state = whole * state + product("bgrjd,bgrje->bgrde", k, writes)
        return merged(jnp.transpose(y, (0, 3, 1, 2, 4)), 2).astype(self.dtype), state


def supports(args: Arguments) -> str | None:
    """Why this implementation cannot take `args`: it takes all."""
    return None


@jax.jit
def run(args: Arguments) -> tuple[jax.Array, jax.Array | None]:
    """y (B, N, H, E) and, if asked for, the state.

    Whole chunks are filled up in front, with tokens that write nothing: behind the last token they would add and
    subtract the same undecayed numbers in the gradient of a strong decay, and drown it in their rounding.
    """
    dtype, (_, n, heads, _), groups = args.accumulator, args.q.shape, args.k.shape[2]
    size = tokens_per_chunk(n, args.chunk_size, CHUNK)
    padding = -n % size
    decay = args.log_decay if args.query_ids is None else decay_of_segments(args, args.query_ids)
    if decay is not None and decay.ndim == 1 and padding and args.initial_state is not None:
        decay = jnp.broadcast_to(decay, (1, n, heads))  # not the same for every token: padding must not decay the state
    tokens = {"q": args.q, "k": args.k, "v": args.v, "beta": args.beta}
    constant = decay if decay is not None and decay.ndim == 1 else None
    if decay is not None and decay.ndim > 1:
        tokens["g"] = decay
    if padding:
        tokens = {name: jnp.pad(x, ((0, 0), (padding, 0), *((0, 0),) * (x.ndim - 2))) for name, x in tokens.items()}
    # Typed as the inputs are: under shard_map and explicit sharding a constant would be no valid loop carry.
    first = grouped(args.q[:, 0], groups, axis=1)[..., None] * args.v[:, 0, :, None, None, :]
    state = jnp.zeros_like(first, dtype=dtype)
    state = state if args.initial_state is None else state + grouped(args.initial_state, groups, axis=1)
    tokens, constant, scale, state = same_manual_axes((tokens, constant, args.scale, state))
    if constant is not None:
        each = jnp.broadcast_to(constant.reshape(1, groups, -1), state.shape[:3])
        constant = each, constant_decay(constant, size, groups)
    plan = Plan(size, _Chunk(args.q.dtype), _empty)
    y, state = sweep(plan, (constant, scale), tokens, state)
    return y[:, padding:], merged(state, 1) if args.return_state else None


def _empty(tokens: Tokens) -> jax.Array:
    q, v = tokens["q"], tokens["v"]
    return merged(jnp.zeros_like(grouped(q, v.shape[2])[..., :1] * v[:, :, :, None]), 2)


# ---- the triangular system


def _solve(precision: jax.lax.Precision, lower: jax.Array, right: jax.Array) -> jax.Array:
    """X of (I + L) X = R, for strictly lower triangular L (..., c, c) and R (..., c, E)."""
    size = lower.shape[-1]
    if fill := -size % BLOCK:
        rows = ((0, 0),) * (lower.ndim - 2) + ((0, fill),)
        lower, right = jnp.pad(lower, (*rows, (0, fill))), jnp.pad(right, (*rows, (0, 0)))
    return _solve_blocks(precision, lower, right)[..., :size, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve_blocks(precision: jax.lax.Precision, lower: jax.Array, right: jax.Array) -> jax.Array:
    return _solve_forward(precision, lower, right)[0]


def _solve_forward(precision: jax.lax.Precision, lower: jax.Array, right: jax.Array):
    inverses = _inverses(lower)
    solution = _substitute(precision, lower, inverses, right)
    return solution, (lower, inverses, solution)


@numpy_ranks()
def _solve_backward(precision: jax.lax.Precision, residuals, dsolution: jax.Array):
    """dR = (I + L)⁻ᵀ dX and dL = -dR Xᵀ below the diagonal."""
    lower, inverses, solution = residuals
    # Reversed in both axes, a transposed lower triangle is a lower triangle again.
    turned = jnp.swapaxes(lower, -1, -2)[..., ::-1, ::-1], jnp.swapaxes(inverses, -1, -2)[..., ::-1, ::-1, ::-1]
    dright = _substitute(precision, *turned, dsolution[..., ::-1, :])[..., ::-1, :]
    return jnp.tril(-jnp.matmul(dright, jnp.swapaxes(solution, -1, -2), precision=precision), -1), dright


_solve_blocks.defvjp(_solve_forward, _solve_backward)


def _substitute(precision, lower: jax.Array, inverses: jax.Array, right: jax.Array) -> jax.Array:
    """(I + L)⁻¹ R, block by block, each with the solution of those before it at hand.

    A product with the inverse of the whole chunk has errors that no later token sees; an error in substitution is
    corrected by the tokens after it. With strong reflections (β near 2 and keys alike) that is worth a digit.
    """
    solution = []
    for number, start in enumerate(range(0, lower.shape[-1], BLOCK)):
        rest = right[..., start : start + BLOCK, :]
        if solution:
            done = jnp.concatenate(solution, axis=-2)
            rest = rest - jnp.matmul(lower[..., start : start + BLOCK, :start], done, precision=precision)
        solution.append(jnp.matmul(inverses[..., number, :, :], rest, precision=precision))
    return jnp.concatenate(solution, axis=-2)


def _inverses(lower: jax.Array) -> jax.Array:
    """Inverses of the diagonal blocks of I + L, row by row: (..., c, c) -> (..., c / BLOCK, BLOCK, BLOCK)."""
    starts = range(0, lower.shape[-1], BLOCK)
    blocks = jnp.stack([lower[..., start : start + BLOCK, start : start + BLOCK] for start in starts], axis=-3)

    def clear(column, inverse):
        below = jax.lax.dynamic_slice_in_dim(blocks, column, 1, axis=-1)
        return inverse - below * jax.lax.dynamic_slice_in_dim(inverse, column, 1, axis=-2)

    return jax.lax.fori_loop(0, BLOCK - 1, clear, jnp.zeros_like(blocks) + jnp.eye(BLOCK, dtype=blocks.dtype))
