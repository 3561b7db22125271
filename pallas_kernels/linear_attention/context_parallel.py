"""Linear attention of one sequence that is cut over devices: they exchange states, never tokens.

Each shard of N / n tokens stands for a map of states, S -> A S + C, with A the decay of all its tokens and C what they
add to an empty state. Maps in a row are one map, (A₂, C₂) ∘ (A₁, C₁) = (A₂ A₁, A₂ C₁ + C₂), so that

    1. each shard computes its (A, C), C = Σ_j exp(g_{j+1} + … + g_end) k_j v_jᵀ: one product, without looking back;
    2. ⌈log₂ n⌉ exchanges with the shards 1, 2, 4, … before give each one the state before its first token
       (Hillis and Steele, "Data parallel algorithms", 1986);
    3. each shard runs the op from that state.

Every exchange is one state (B, H, D, E) and its decay, whatever N is; the gradient makes the same exchanges backwards.
Sequence parallelism of linear attention in this manner: LASP (arXiv:2404.02882), and LASP-2 (arXiv:2502.07563), which
gathers all states at once instead. Non-causal attention is one sum of states over the devices.

Sums of decays are taken from the shard's end: near it, where weights are not small, the sums are short and exact.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, partition
from pallas_kernels.linear_attention import xla
from pallas_kernels.recurrence import (
    Arguments,
    State,
    decay_floor,
    decay_of_segments,
    finish,
    pack_state,
    unpack_state,
    with_ones,
)

Run = Callable[[Arguments], tuple[jax.Array, State | None]]


def run(
    args: Arguments, axis_name: str, local: Run, implementation: str | None = None
) -> tuple[jax.Array, State | None]:
    """y (B, N / n, H, E) of this shard and, if asked for, the state after the whole sequence.

    Args:
      args: this shard's tokens; `initial_state` is that before the whole sequence.
      axis_name: axis over which the tokens are cut, in order.
      local: the op on one device; it gets causal calls with `initial_state` and without `return_state`.
      implementation: the name that the caller asked for.

    Raises:
      TypeError: if `axis_name` is no string.
      ValueError: if no `jax.shard_map` around the call has that axis, or for segment ids of a non-causal call.
      dispatch.UnsupportedError: for a non-causal call of an implementation other than "xla".
    """
    if not isinstance(axis_name, str):
        raise TypeError(f"axis_name must be the name of one axis or None, got {axis_name!r}")
    try:
        jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(f"axis_name={axis_name!r} must be an axis of a jax.shard_map around the call") from None
    if args.causal:
        return _causal(args, axis_name, local)
    if args.query_ids is not None:
        raise ValueError(
            "segment_ids must be None when causal=False with axis_name: keys of an id may stand on every shard, each id"
            " with a state of its own"
        )
    if implementation not in (None, "xla"):
        raise dispatch.UnsupportedError(
            f"implementation={implementation!r} refuses causal=False with axis_name: it is two products of XLA's"
        )
    return _full(args, axis_name)


def _causal(args: Arguments, axis_name: str, local: Run) -> tuple[jax.Array, State | None]:
    # Before anything else: JAX then sums the gradient of what shards have in common, a decay per head, as it came.
    args, index = partition.same_manual_axes((args, jax.lax.axis_index(axis_name)))
    count = jax.lax.axis_size(axis_name)
    v = with_ones(args.v) if args.normalize else args.v
    initial = None if args.initial_state is None else pack_state(args.initial_state)
    new_run = None  # whether a segment starts with this shard, (B, 1, 1, 1)
    if args.query_ids is not None:
        last = _from_before(args.query_ids[:, -1], 1, axis_name)
        new_run = ((args.query_ids[:, 0] != last) & (index > 0))[:, None, None, None]
    own, decay = _map_of_shard(args, v)
    if new_run is not None:
        decay = jnp.where(new_run, 0, decay)

    state = _from_before(own, 1, axis_name)
    state = state if initial is None else jnp.where(index == 0, initial, state)
    # Without segments these decays are the same on every shard and need no exchange.
    everywhere = new_run is None and (args.log_decay is None or args.log_decay.ndim == 1)
    before = decay if everywhere else _from_before(decay, 1, axis_name)
    distance = 1
    while distance < count:
        state = before * _from_before(state, distance, axis_name) + state
        before = before * (before if everywhere else _from_before(before, distance, axis_name))
        distance *= 2

    last_state = None
    if args.return_state:
        last_state = jnp.where(index == count - 1, decay * state + own, 0)
        last_state = unpack_state(jax.lax.psum(last_state, axis_name), args.normalize)
    if new_run is not None:
        state = jnp.where(new_run, 0, state)
    from_there = dataclasses.replace(args, initial_state=unpack_state(state, args.normalize), return_state=False)
    y, _ = local(from_there)
    return y, last_state


def _full(args: Arguments, axis_name: str) -> tuple[jax.Array, State | None]:
    v = with_ones(args.v) if args.normalize else args.v
    state = jax.lax.psum(xla.sum_of_keys(args, v), axis_name)
    if args.initial_state is not None:
        state = state + pack_state(args.initial_state)
    y = finish(xla.read(args, state), args.scale, args.normalize, args.q.dtype)
    return y, unpack_state(state, args.normalize) if args.return_state else None


def _map_of_shard(args: Arguments, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the tokens make of an empty state, (B, H, D, E), and their whole decay, shaped to multiply a state."""
    log_decay, length, dtype = args.log_decay, args.k.shape[1], args.accumulator
    if args.query_ids is not None:
        log_decay = decay_of_segments(args, args.query_ids)
    if log_decay is None:
        return xla.sum_of_keys(args, v), jnp.ones((1, 1, 1, 1), dtype)
    floor = decay_floor(dtype)
    log_decay = jnp.where(log_decay < -floor, -floor, log_decay)  # exp is 0 there already, and -inf has no sum
    if log_decay.ndim == 1:
        after = (length - 1 - jnp.arange(length, dtype=dtype))[:, None] * log_decay
        return xla.sum_of_keys(args, v, jnp.exp(after)[None]), jnp.exp(length * log_decay)[None, :, None, None]
    until_end = jax.lax.cumsum(log_decay, axis=1, reverse=True)
    after = jnp.concatenate([until_end[:, 1:], jnp.zeros_like(until_end[:, :1])], axis=1)
    whole = jnp.exp(until_end[:, 0])
    whole = whole[..., None] if whole.ndim == 3 else whole[..., None, None]
    return xla.sum_of_keys(args, v, jnp.exp(after)), whole


def _from_before(x: jax.Array, distance: int, axis_name: str) -> jax.Array:
    """The value of the shard `distance` before this one; zeros where there is none."""
    count = jax.lax.axis_size(axis_name)
    return jax.lax.ppermute(x, axis_name, [(i, i + distance) for i in range(count - distance)])
