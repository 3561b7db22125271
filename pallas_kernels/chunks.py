"""A sweep over chunks of tokens with a state at hand, and its derivative in memory linear in the number of tokens.

An op gives the function of one chunk; `sweep` walks over all of them. Its backward pass goes from the last chunk to the
first with the cotangent of the state at hand. It keeps the inputs and about √T states of the T chunks, rebuilds the
states between two kept ones when it gets there, and differentiates one chunk at a time.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tokens = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in a sweep.

    Attributes:
      size: tokens per chunk, c.
      chunk: (shared, tokens of a chunk, state) -> (outputs (B, c, ...), state); differentiated by JAX.
      empty: tokens -> zeros like the outputs (B, N, ...), varying over the same mesh axes as the tokens do.
    """

    size: int
    chunk: Callable[[Any, Tokens, jax.Array], tuple[jax.Array, jax.Array]]
    empty: Callable[[Tokens], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sweep(plan: Plan, shared: Any, tokens: Tokens, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All chunks in order.

    Args:
      plan: the op.
      shared: arrays that every chunk reads.
      tokens: arrays (B, N, ...), N a multiple of the chunk.
      state: state before the first chunk.

    Returns:
      Outputs (B, N, ...) and the last state.
    """
    y, state, _ = _walk(plan, shared, tokens, state, every=None)
    return y, state


def _sweep_forward(plan: Plan, shared: Any, tokens: Tokens, state: jax.Array):
    every = math.ceil(math.sqrt(_count(plan, tokens)))
    y, last, kept = _walk(plan, shared, tokens, state, every)
    return (y, last), (shared, tokens, kept)


def _sweep_backward(plan: Plan, residuals, cotangents):
    (shared, tokens, kept), (dy, dstate) = residuals, cotangents
    count = _count(plan, tokens)
    every = math.ceil(math.sqrt(count))

    def span(number, carry):  # the chunks between two kept states, the last span first
        number = kept.shape[0] - 1 - number
        first = number * every
        last = jnp.minimum(first + every, count)

        def rebuild(t, carry):
            state, starts = carry
            starts = jax.lax.dynamic_update_index_in_dim(starts, state, t - first, 0)
            return plan.chunk(shared, _slice(plan, tokens, t), state)[1], starts

        def backward(step, carry):
            dshared, dtokens, dstate = carry
            t = last - 1 - step
            _, pullback = jax.vjp(plan.chunk, shared, _slice(plan, tokens, t), starts[t - first])
            dshared_t, dtokens_t, dstate = pullback((_slice(plan, dy, t), dstate))
            dshared = jax.tree.map(jnp.add, dshared, dshared_t)
            return dshared, _write(plan, dtokens, dtokens_t, t), dstate

        empty = jnp.zeros_like(jnp.broadcast_to(kept[:1], (every, *kept.shape[1:])))
        _, starts = jax.lax.fori_loop(first, last, rebuild, (kept[number], empty))
        return jax.lax.fori_loop(0, last - first, backward, carry)

    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return jax.lax.fori_loop(0, kept.shape[0], span, (zeros(shared), zeros(tokens), dstate))


sweep.defvjp(_sweep_forward, _sweep_backward)


def _walk(plan: Plan, shared: Any, tokens: Tokens, state: jax.Array, every: int | None):
    """Outputs, last state, and the state before each `every`-th chunk (None when `every` is)."""
    count = _count(plan, tokens)
    spans = 0 if every is None else math.ceil(count / every)
    kept = jnp.zeros_like(jnp.broadcast_to(state, (spans + 1, *state.shape))).at[0].set(state)

    def body(t, carry):
        state, y, kept = carry
        y_chunk, state = plan.chunk(shared, _slice(plan, tokens, t), state)
        if every is not None:  # the last chunk of a span writes last
            kept = jax.lax.dynamic_update_index_in_dim(kept, state, t // every + 1, 0)
        return state, _write(plan, y, y_chunk, t), kept

    state, y, kept = jax.lax.fori_loop(0, count, body, (state, plan.empty(tokens), kept))
    return y, state, kept[:spans]


def _count(plan: Plan, tokens: Tokens) -> int:
    return jax.tree.leaves(tokens)[0].shape[1] // plan.size


def _slice(plan: Plan, tree, t):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, t * plan.size, plan.size, 1), tree)


def _write(plan: Plan, tree, chunk, t):
    return jax.tree.map(lambda x, c: jax.lax.dynamic_update_slice_in_dim(x, c, t * plan.size, 1), tree, chunk)
