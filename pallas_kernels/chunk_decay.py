"""Weights of the tokens of a chunk, from their log decays, for the XLA paths of recurrences.

No exponent is positive. A sum of decays between two tokens is not the rounded difference of two long sums: `Decay`
cumulates a coarse part, exact in the accumulator, and a small rest, so that one strong decay early in a chunk leaves
the later ones accurate.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.recurrence import decay_floor


class Decay(NamedTuple):
    """Weights of the tokens of a chunk of c tokens; leading axes (B, G, H / G), each of which may be 1.

    Attributes:
      between: exp(G_i - G_j) for i ≥ j, else 0, (..., c, c).
      since_start: exp(G_i), (..., c).
      until_end: exp(G_end - G_j), (..., c).
      whole: exp(G_end), (...,).
    """

    between: jax.Array
    since_start: jax.Array
    until_end: jax.Array
    whole: jax.Array


def decayed(scores: jax.Array, decay: Decay | None) -> jax.Array:
    """Scores (B, G, R, c, c) with the weight of each pair of tokens, 0 for i < j."""
    return jnp.tril(scores) if decay is None else scores * decay.between


def constant_decay(log_decay: jax.Array, size: int, groups: int) -> Decay:
    """Weights of a decay (H,) that is the same for every token, computed once for all chunks; not differentiated."""
    g = jax.lax.stop_gradient(log_decay).reshape(1, groups, -1, 1)
    apart, since_start, until_end = _distances(size, g.dtype)
    return Decay(
        between=jnp.tril(jnp.exp(g[..., None] * apart)),
        since_start=jnp.exp(g * since_start),
        until_end=jnp.exp(g * until_end),
        whole=jnp.exp(g[..., 0] * size),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def decay_of_chunk(size: int, log_decay: jax.Array, weights: Decay) -> Decay:
    """The weights, as a function of the log decays (B, G, R).

    Through exp, a chunk would give the gradient of every weight, summed over the batch: (c, c) numbers per head to add
    up, and to sum over devices that share out the batch. This way it gives one number per batch element and head.
    """
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (log_decay.shape[0], *x.shape[1:])), weights)


def _decay_of_chunk_backward(size: int, residuals: tuple[jax.Array, Decay], dweights: Decay):
    log_decay, shared = residuals
    weights = decay_of_chunk(size, log_decay, shared)  # a function of the log decays here too: for second derivatives
    times = *_distances(size, weights.between.dtype), size
    parts = [jnp.sum(d * (w * t), axis=range(3, d.ndim)) for d, w, t in zip(dweights, weights, times, strict=True)]
    return sum(parts), jax.tree.map(jnp.zeros_like, shared)


decay_of_chunk.defvjp(
    lambda size, log_decay, weights: (decay_of_chunk(size, log_decay, weights), (log_decay, weights)),
    _decay_of_chunk_backward,
)


def _distances(size: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How often a token's decay acts in `Decay.between` (c, c), `since_start` (c,) and `until_end` (c,)."""
    place = jnp.arange(size, dtype=dtype)
    return jnp.maximum(place[:, None] - place[None, :], 0), place + 1, size - 1 - place


def scalar_decay(g: jax.Array) -> Decay:
    """Weights of log decays (..., c)."""
    size, dtype = g.shape[-1], g.dtype
    floor = decay_floor(dtype)
    g = jnp.where(g < -floor, -floor, g)  # exp is 0 there already
    # Multiples of `step` up to size·floor are exact in `dtype`, and so are all their sums; the rests stay below `step`.
    step = 2.0 ** (math.ceil(math.log2(size * floor)) - jnp.finfo(dtype).nmant - 1)
    coarse = jax.lax.stop_gradient(jnp.ceil(g / step) * step)
    lower = jnp.tril(jnp.ones((size, size), dtype))
    total, rest = (jnp.einsum("...j,ij->...i", x, lower, precision="highest") for x in (coarse, g - coarse))

    def weight(later, earlier, mask=None):
        exponent = (later[0] - earlier[0]) + (later[1] - earlier[1])
        exponent = exponent - jax.lax.stop_gradient(jnp.maximum(exponent, 0))  # rounding may leave +1e-9
        return jnp.exp(exponent if mask is None else jnp.where(mask, exponent, 0))

    end = total[..., -1:], rest[..., -1:]
    # A token's weight in itself is 1 whatever the decay: without a mask its gradient would be a difference of sums.
    below, before_end = jnp.tril(jnp.ones((size, size), bool), -1), jnp.arange(size) < size - 1
    rows, columns = (total[..., :, None], rest[..., :, None]), (total[..., None, :], rest[..., None, :])
    since_start = weight((total, rest), (0.0, 0.0))
    return Decay(
        between=weight(rows, columns, below) * lower,
        since_start=since_start,
        until_end=weight(end, (total, rest), before_end),
        whole=since_start[..., -1],
    )
