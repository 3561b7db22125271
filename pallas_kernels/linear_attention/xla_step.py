"""Decoding steps of linear attention in plain JAX: one token by sums over the state, several as one chunk."""

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention import xla
from pallas_kernels.recurrence import Arguments, State, finish, pack_state, unpack_state, with_ones


def supports(args: Arguments) -> str | None:
    """Why this implementation cannot take `args`: it always can."""
    return None


def run(args: Arguments) -> tuple[jax.Array, State]:
    """y (B, T, H, E) and the state after the last token; `initial_state` is the one before the first."""
    if args.q.shape[1] > 1:
        return xla.run(args)
    dtype, group = args.accumulator, args.q.shape[2] // args.k.shape[2]
    q, k, v = (x[:, 0].astype(dtype) for x in (args.q, args.k, args.v))
    v = with_ones(v) if args.normalize else v
    k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
    state = pack_state(args.initial_state)
    if args.log_decay is not None:
        g = args.log_decay if args.log_decay.ndim == 1 else args.log_decay[:, 0]
        state = state * jnp.exp(g[..., None] if g.ndim == 3 else g[..., None, None])
    state = state + k[..., :, None] * v[..., None, :]
    # A product of one row is bound by reading the state: a sum keeps full float32 on every platform.
    y = jnp.sum(q[..., :, None] * state, axis=-2)
    y = finish(y, args.scale, args.normalize, args.q.dtype)
    return y[:, None], unpack_state(state, args.normalize)
