"""The specification of the selective scan: the recurrence, token by token. Short and obviously right, not fast."""

import jax
import jax.numpy as jnp

from pallas_kernels.selective_scan.arguments import Arguments, decays, finish, per_channel, step_sizes


def supports(args: Arguments) -> str | None:
    """Why the reference cannot take `args`; None when it can."""
    if args.chunk_size is not None:
        return f"it has no chunks, so chunk_size must be None, got {args.chunk_size}"
    return None


def run(args: Arguments) -> tuple[jax.Array, jax.Array | None]:
    """y (B, N, C) and, if asked for, the state; the state is emptied where a segment starts."""
    dtype, channels = args.accumulator, args.x.shape[2]
    delta = step_sizes(args.delta.astype(dtype), args.delta_bias, args.softplus)
    x, b, c = (each.astype(dtype) for each in (args.x, args.b, args.c))
    b, c = per_channel(b, channels), per_channel(c, channels)
    starts = jnp.zeros(x.shape[:2], bool) if args.starts is None else args.starts
    state = jnp.zeros_like(x[:, 0, :, None] * b[:, 0] * args.a)  # sharded as the inputs are
    state = state if args.initial_state is None else state + args.initial_state

    def advance(state, inputs):
        start, *token_inputs = inputs
        return token(jnp.where(start[:, None, None], 0, state), args.a, *token_inputs)

    state, y = jax.lax.scan(advance, state, [jnp.moveaxis(each, 1, 0) for each in (starts, x, delta, b, c)])
    y = finish(jnp.moveaxis(y, 0, 1), args.x, args.skip, args.gate, args.x.dtype)
    return y, state if args.return_state else None


def token(state: jax.Array, a: jax.Array, x: jax.Array, delta: jax.Array, b: jax.Array, c: jax.Array):
    """One token: h' = exp(δ a) h + δ x b, y = Σ_s c h'.

    Args:
      state: (B, C, S).
      a: (C, S).
      x: (B, C).
      delta: the step size, (B, C).
      b: (B, C, S).
      c: (B, C, S).

    Returns:
      The state after the token, and y (B, C), without skip and gate.
    """
    state = decays(delta[..., None] * a) * state + (delta * x)[..., None] * b
    return state, jnp.sum(c * state, axis=-1)
