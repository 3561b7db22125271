"""The specification of linear attention: the recurrence, token by token, and its parallel form.

Short and obviously right, not fast. `run` follows the recurrence when causal and builds the N×M weights when not;
`quadratic` is also the parallel form of the causal op, the thing that chunked implementations are timed against.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.recurrence import Arguments, State, finish, pack_state, run_starts, unpack_state, with_ones


def supports(args: Arguments) -> str | None:
    """Why the reference cannot take `args`; None when it can."""
    if args.chunk_size is not None:
        return f"it has no chunks, so chunk_size must be None, got {args.chunk_size}"
    return None


def run(args: Arguments) -> tuple[jax.Array, State | None]:
    """y (B, N, H, E) and, if asked for, the state. Memory grows with N·M when non-causal."""
    return recurrent(args) if args.causal else quadratic(args)


def recurrent(args: Arguments) -> tuple[jax.Array, State | None]:
    """S_i = exp(g_i) S_{i-1} + k_i v_iᵀ, y_i = q_i S_i, over i; the state is emptied where a segment starts."""
    q, k, v, g = _repeated(args)
    g = jnp.broadcast_to(0.0 if g is None else g[..., None] if g.ndim < 4 else g, q.shape)
    starts = jnp.zeros(q.shape[:2], bool) if args.query_ids is None else run_starts(args.query_ids)

    def token(state, inputs):
        q, k, v, g, start = inputs
        kept = jnp.where(start[:, None, None, None], 0, jnp.exp(g)[..., None] * state)
        state = kept + k[..., None] * v[..., None, :]
        return state, jnp.sum(q[..., None] * state, axis=-2)

    time_first = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, starts)]
    state, y = jax.lax.scan(token, _initial(args, q, k, v), time_first)
    return _result(args, jnp.moveaxis(y, 0, 1), state)


def quadratic(args: Arguments) -> tuple[jax.Array, State | None]:
    """y = (q kᵀ ∘ W) v with the weights W, (B, H, N, M), built from decays and masks.

    When causal it starts from nothing and returns no state, and takes no decay per channel.

    Raises:
      ValueError: for a causal call with a state or a decay per channel.
    """
    q, k, v, g = _repeated(args)
    if args.causal and (args.return_state or args.initial_state is not None or (g is not None and g.ndim == 4)):
        raise ValueError("the causal parallel form takes no initial_state, return_state or log_decay per channel")
    weights = jnp.ones((q.shape[1], k.shape[1]), q.dtype)
    if g is not None:
        total = jnp.moveaxis(jnp.cumsum(jnp.broadcast_to(g, q.shape[:3]), axis=1), 1, 2)
        weights = jnp.exp(jnp.tril(total[..., :, None] - total[..., None, :]))
    if args.causal:
        weights = jnp.tril(weights)
    if args.query_ids is not None:
        own, other = args.query_ids, args.key_ids
        if args.causal:  # a segment is one run of equal ids: number the runs
            own = other = jnp.cumsum(run_starts(own), axis=1)
        weights = weights * (own[:, None, :, None] == other[:, None, None, :])
    scores = jnp.einsum("bihd,bjhd->bhij", q, k, precision="highest") * weights
    y = jnp.einsum("bhij,bjhe->bihe", scores, v, precision="highest")
    if args.causal:
        return _result(args, y, None)
    initial = _initial(args, q, k, v)
    y = y + jnp.einsum("bihd,bhde->bihe", q, initial, precision="highest")
    return _result(args, y, initial + jnp.einsum("bjhd,bjhe->bhde", k, v, precision="highest"))


def _repeated(args: Arguments):
    """q, k, v, log_decay in the accumulator dtype, key heads repeated to H, values extended by ones if normalising."""
    dtype, group = args.accumulator, args.q.shape[2] // args.k.shape[2]
    q, k, v = (x.astype(dtype) for x in (args.q, args.k, args.v))
    v = with_ones(v) if args.normalize else v
    return q, jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2), args.log_decay


def _initial(args: Arguments, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    zeros = jnp.zeros_like((q[:, 0] * k[:, 0])[..., None] * v[:, 0, :, None, :])  # sharded as the inputs are
    return zeros if args.initial_state is None else zeros + pack_state(args.initial_state)


def _result(args: Arguments, y: jax.Array, state: jax.Array | None):
    state = unpack_state(state, args.normalize) if args.return_state else None
    return finish(y, args.scale, args.normalize, args.q.dtype), state
