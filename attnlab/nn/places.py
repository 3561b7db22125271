"""Places of tokens among those that take part, and tokens moved to the front of a row."""

from typing import Any

import jax
import jax.numpy as jnp


def places_among(part: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """How many tokens before each one, in its segment, take part.

    Args:
      part: `(…, N)` boolean.
      segment_ids: integers that broadcast to it, one for each run; one segment when None.

    Returns:
      `(…, N)` int32; of tokens that do not take part the place of the one before, -1 if there is none.
    """
    count = jnp.cumsum(part, axis=-1, dtype=jnp.int32)
    if segment_ids is None:
        return count - 1
    ids = jnp.broadcast_to(segment_ids, part.shape)
    starts = jnp.concatenate([jnp.ones_like(ids[..., :1], bool), ids[..., 1:] != ids[..., :-1]], axis=-1)
    index = jnp.arange(part.shape[-1], dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(starts, index, 0), axis=part.ndim - 1)
    return count - jnp.take_along_axis(count - part, start, axis=-1) - 1


def front(part: jax.Array, count: int | None = None) -> jax.Array:
    """Indices `(…, count)` of those that take part, ascending, then of the others; all of `(…, N)` when None."""
    order = jnp.argsort(~part, axis=-1, stable=True).astype(jnp.int32)
    return order if count is None else order[..., :count]


def rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Tokens `(B, …, *T)` of `(B, N, *T)` by indices `(B, …)`."""
    return jax.vmap(lambda each, at: each[at])(x, jnp.broadcast_to(index, (x.shape[0], *index.shape[1:])))


def back(y: jax.Array, order: Any, part: jax.Array) -> jax.Array:
    """The inverse of `rows(x, order)`, `order` a permutation `(B, N)`; zeros where `part` `(B, N)` is False."""
    y = rows(y, jnp.argsort(order, axis=-1))
    return jnp.where(part.reshape(*part.shape, *(1,) * (y.ndim - 2)), y, jnp.zeros_like(y))
