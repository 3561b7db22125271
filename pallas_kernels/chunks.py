"""A sweep over chunks of tokens with a state at hand, and its derivative in memory linear in the number of tokens.

An op gives the function of one chunk; `sweep` walks over all of them. Its backward pass goes from the last chunk to the
first with the cotangent of the state at hand, and differentiates one chunk at a time, by those of its inputs whose
gradient is asked for. It keeps the inputs, and the state before every chunk; where the states would be large beside the
tokens (`KEPT`), before every second, third, … chunk, and rebuilds those between when it gets there.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.promotion import numpy_ranks
from pallas_kernels.symbolic_zeros import cotangent

Tokens = dict[str, jax.Array]
KEPT = 0.25  # bytes of the kept states at most, as a part of those of tokens, outputs, and the gradients of both


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

    def count(self, tokens: Tokens) -> int:
        """Chunks of the tokens, T."""
        return jax.tree.leaves(tokens)[0].shape[1] // self.size

    def every(self, tokens: Tokens, state: jax.Array) -> int:
        """Chunks from one kept state to the next."""
        arrays = (*tokens.values(), jax.eval_shape(self.empty, tokens))
        room = KEPT * 2 * sum(x.size * x.dtype.itemsize for x in arrays)
        states = self.count(tokens) * state.size * state.dtype.itemsize
        return max(1, min(self.count(tokens), math.ceil(states / room)))


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
    inputs, state = (shared, tokens), state.value
    wanted = jax.tree.map(lambda x: x.value if x.perturbed else None, inputs)
    others = jax.tree.map(lambda x: None if x.perturbed else x.value, inputs)
    shared, tokens = _joined(wanted, others)
    y, last, kept = _walk(plan, shared, tokens, state, plan.every(tokens, state))
    return (y, last), (wanted, others, kept)


@numpy_ranks()
def _sweep_backward(plan: Plan, residuals, cotangents):
    (wanted, others, kept), (dy, dlast) = residuals, map(cotangent, cotangents)
    shared, tokens = _joined(wanted, others)
    dy = plan.empty(tokens) if dy is None else dy
    dlast = jnp.zeros_like(kept[0]) if dlast is None else dlast
    count, every = plan.count(tokens), plan.every(tokens, kept[0])

    def backward(t, start, carry):
        (dshared, dtokens), dstate = carry
        rest = others[0], _slice(plan, others[1], t)
        _, pullback = jax.vjp(
            lambda wanted, state: plan.chunk(*_joined(wanted, rest), state),
            (wanted[0], _slice(plan, wanted[1], t)),
            start,
        )
        (dshared_t, dtokens_t), dstate = pullback((_slice(plan, dy, t), dstate))
        return (jax.tree.map(jnp.add, dshared, dshared_t), _write(plan, dtokens, dtokens_t, t)), dstate

    def span(number, carry):  # the chunks from one kept state to the next, the last span first
        number = kept.shape[0] - 1 - number
        first = number * every
        last = jnp.minimum(first + every, count) - 1

        def rebuild(t, starts):
            state = plan.chunk(shared, _slice(plan, tokens, t), starts[t - first])[1]
            return jax.lax.dynamic_update_index_in_dim(starts, state, t - first + 1, 0)

        def step(back, carry):
            return backward(last - back, starts[last - back - first], carry)

        if every == 1:
            return backward(number, kept[number], carry)
        starts = jnp.zeros_like(jnp.broadcast_to(kept[:1], (every, *kept.shape[1:]))).at[0].set(kept[number])
        starts = jax.lax.fori_loop(first, last, rebuild, starts)
        return jax.lax.fori_loop(0, last - first + 1, step, carry)

    carry = jax.tree.map(jnp.zeros_like, wanted), dlast
    (dshared, dtokens), dstate = jax.lax.fori_loop(0, kept.shape[0], span, carry)
    return dshared, dtokens, dstate


sweep.defvjp(_sweep_forward, _sweep_backward, symbolic_zeros=True)


def _walk(plan: Plan, shared: Any, tokens: Tokens, state: jax.Array, every: int | None):
    """Outputs, last state, and the state before each `every`-th chunk (None when `every` is)."""
    count = plan.count(tokens)

    def chunk(t, carry):
        state, y = carry
        y_chunk, state = plan.chunk(shared, _slice(plan, tokens, t), state)
        return state, _write(plan, y, y_chunk, t)

    def span(number, carry):
        (state, y), kept = carry
        kept = jax.lax.dynamic_update_index_in_dim(kept, state, number, 0)
        if every == 1:
            return chunk(number, (state, y)), kept
        first = number * every
        return jax.lax.fori_loop(first, jnp.minimum(first + every, count), chunk, (state, y)), kept

    start = state, plan.empty(tokens)
    if every is None:
        state, y = jax.lax.fori_loop(0, count, chunk, start)
        return y, state, None
    spans = math.ceil(count / every)
    kept = jnp.zeros_like(jnp.broadcast_to(state, (spans, *state.shape)))
    (state, y), kept = jax.lax.fori_loop(0, spans, span, (start, kept))
    return y, state, kept


def _joined(wanted, others):
    """Two trees, each with None where the other has an array, as one."""
    return jax.tree.map(lambda a, b: b if a is None else a, wanted, others, is_leaf=lambda x: x is None)


def _slice(plan: Plan, tree, t):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, t * plan.size, plan.size, 1), tree)


def _write(plan: Plan, tree, chunk, t):
    return jax.tree.map(lambda x, c: jax.lax.dynamic_update_slice_in_dim(x, c, t * plan.size, 1), tree, chunk)


# ---- for the functions of chunks


def product_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """One pass of the matrix unit holds half-precision inputs exactly; wider ones need all passes."""
    return jax.lax.Precision.DEFAULT if jnp.dtype(dtype).itemsize < 4 else jax.lax.Precision.HIGHEST


def tokens_per_chunk(length: int, asked: int | None, default: int) -> int:
    """Tokens per chunk: the asked number, or at most `default` with chunks of about equal length."""
    if asked is not None:
        return min(asked, length)
    count = math.ceil(length / default)
    return length if count == 1 else min(default, 16 * math.ceil(length / (16 * count)))


def grouped(x: jax.Array, groups: int, axis: int = 2) -> jax.Array:
    """Splits heads H at `axis` into (G, H / G); an axis of 1 becomes (1, 1)."""
    if x.shape[axis] == groups or x.shape[axis] == 1:
        return jnp.expand_dims(x, axis + 1)
    return x.reshape(*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])


def merged(x: jax.Array, axis: int) -> jax.Array:
    """Inverse of `grouped`: joins `axis` and the next one."""
    if x.shape[axis + 1] == 1:
        return jnp.squeeze(x, axis + 1)
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
