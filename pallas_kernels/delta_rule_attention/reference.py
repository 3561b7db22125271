"""The specification of delta rule attention: the recurrence, token by token. Short and obviously right, not fast."""

import jax
import jax.numpy as jnp

from pallas_kernels.delta_rule_attention.arguments import Arguments, per_head
from pallas_kernels.recurrence import finish, run_starts


def supports(args: Arguments) -> str | None:
    """Why the reference cannot take `args`; None when it can."""
    if args.chunk_size is not None:
        return f"it has no chunks, so chunk_size must be None, got {args.chunk_size}"
    return None


def run(args: Arguments) -> tuple[jax.Array, jax.Array | None]:
    """y (B, N, H, E) and, if asked for, the state; the state is emptied where a segment starts."""
    dtype, heads = args.accumulator, args.q.shape[2]
    q, k, v = (x.astype(dtype) for x in (args.q, per_head(args.k, heads), per_head(args.v, heads)))
    g = jnp.broadcast_to(0.0 if args.log_decay is None else args.log_decay, args.beta.shape).astype(dtype)
    starts = jnp.zeros(g.shape[:2], bool) if args.query_ids is None else run_starts(args.query_ids)
    state = jnp.zeros_like((q[:, 0] * k[:, 0])[..., None] * v[:, 0, :, None, :])  # sharded as the inputs are
    state = state if args.initial_state is None else state + args.initial_state

    def advance(state, inputs):
        *inputs, start = inputs
        return token(jnp.where(start[:, None, None, None], 0, state), *inputs)

    state, y = jax.lax.scan(advance, state, [jnp.moveaxis(x, 1, 0) for x in (q, k, v, args.beta, g, starts)])
    y = finish(jnp.moveaxis(y, 0, 1), args.scale, normalize=False, dtype=args.q.dtype)
    return y, state if args.return_state else None


def token(state: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: jax.Array):
    """One token: S̃ = exp(g) S, S' = S̃ + β k (v - S̃ᵀk)ᵀ, y = q S'.

    Args:
      state: (B, H, D, E).
      q: (B, H, D).
      k: (B, H, D).
      v: (B, H, E).
      beta: (B, H).
      log_decay: (B, H).

    Returns:
      The state after the token, and y (B, H, E), unscaled.
    """
    state = jnp.exp(log_decay)[..., None, None] * state
    # Products of one row are bound by reading the state: sums keep full precision on every platform.
    error = v - jnp.sum(k[..., None] * state, axis=-2)
    state = state + (beta[..., None] * k)[..., None] * error[..., None, :]
    return state, jnp.sum(q[..., None] * state, axis=-2)
