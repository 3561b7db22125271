"""Decays in a chunk, for the kernels of `mosaic_gpu`.

Every exponent is at most 0; a token's weight in itself, and the last one's up to the end, are exactly 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

LOG2_E = math.log2(math.e)
FLOOR = -128.0  # exp of a log decay below it is 0


class Weights(NamedTuple):
    """Decays in a chunk; None where they are 1.

    Attributes:
      between: function that gives those between rows i and columns j, to be computed where they are used.
      border: of each token, between it and the border of the chunk where S stands.
      value: of each token, between it and the border where S' stands.
      whole: scalar, of the chunk.
    """

    between: Callable[[], jax.Array] | None = None
    border: jax.Array | None = None
    value: jax.Array | None = None
    whole: jax.Array | None = None


def per_head(
    reverse: bool, log_decay: jax.Array, valid: jax.Array, token: jax.Array, distance: Callable[[], jax.Array]
) -> Weights:
    """Weights of a constant decay.

    Args:
      reverse: whether tokens are visited from the last to the first.
      log_decay: scalar.
      valid: tokens of the chunk that there are, int32.
      token: numbers of the tokens in the chunk, int32.
      distance: function that gives the tokens from column j to row i, or from i to j in reverse, int32.
    """
    g = jnp.maximum(log_decay, FLOOR) * LOG2_E
    since_start = jnp.exp2((token + 1).astype(jnp.float32) * g)
    until_end = jnp.exp2(jnp.maximum(valid - 1 - token, 0).astype(jnp.float32) * g)
    whole = jnp.exp2(valid.astype(jnp.float32) * g)

    def between() -> jax.Array:
        return jnp.exp2(jnp.maximum(distance(), 0).astype(jnp.float32) * g)

    return _ordered(reverse, between, since_start, until_end, whole)


def per_token(reverse: bool, total: jax.Array, end: jax.Array, difference: Callable[[], jax.Array]) -> Weights:
    """Weights of a decay per token.

    Args:
      reverse: whether tokens are visited from the last to the first.
      total: base-2 log decays of the tokens, cumulated from the start of the chunk.
      end: that of the last token.
      difference: function that gives that of row i less that of column j.
    """
    since_start, until_end = jnp.exp2(total), jnp.exp2(jnp.minimum(end - total, 0.0))
    whole = jnp.exp2(end)

    def between() -> jax.Array:
        return jnp.exp2(jnp.minimum(-difference() if reverse else difference(), 0.0))

    return _ordered(reverse, between, since_start, until_end, whole)


def _ordered(reverse: bool, between, since_start, until_end, whole) -> Weights:
    if reverse:
        return Weights(between, until_end, since_start, whole)
    return Weights(between, since_start, until_end, whole)
