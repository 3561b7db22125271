"""A cut in the backward pass: the cotangent of a residual stream is computed once, not again in every layer below.

In a deep pre-norm model the stream's cotangent is a sum that grows by a term per layer. XLA's CPU backend fuses such
sums of elementwise terms into each of their readers, and so computes all the terms of the layers above again in every
layer; an `optimization_barrier` is gone before it fuses. A loop stays: what comes out of one is read from memory.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch


def cut_cotangent(x: jax.Array) -> jax.Array:
    """`x` itself; on a CPU its cotangent (and its tangent) is handed on through a loop that computes nothing."""
    return _cut(x) if dispatch.current_platform() == "cpu" else x


@jax.custom_jvp
def _cut(x: jax.Array) -> jax.Array:
    return x


@_cut.defjvp
def _cut_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # Two values change places twice: a loop of one turn, or one that changes nothing, XLA would dissolve.
    pair = (tangents[0], jnp.zeros_like(tangents[0]))
    (tangent, _), _ = jax.lax.scan(lambda pair, _: (pair[::-1], None), pair, None, length=2)
    return primals[0], tangent
