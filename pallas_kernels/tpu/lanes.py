"""Steps on values of one group of heads, for TPU kernels.

A group has p heads side by side in lanes. Written (c, p·D) is one token a row, head a in lanes [a·D, (a + 1)·D); a
state is kept as (E, p·D), transposed, so that a row of decays per key channel multiplies it in place. Stacked, heads
stand below each other with the other heads' lanes at zero: products with a stacked operand are block-diagonal, and
work on all heads at once with unsliced lanes.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.chips import LANES

WIDE = jnp.float32


def rows_and_lanes(shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Row and lane number of each element, int32."""
    return lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)


def head_of_lane(shape: tuple[int, int], size: int) -> jax.Array:
    """Head of each lane, where a head has `size` lanes, a power of two."""
    return lax.broadcasted_iota(jnp.int32, shape, 1) >> (size.bit_length() - 1)


def stack(x: jax.Array, pack: int, size: int) -> jax.Array:
    """(r, p·size) to (p·r, p·size): head a in rows [a·r, (a + 1)·r) and in its own lanes, zeros elsewhere."""
    if pack == 1:
        return x
    head = head_of_lane(x.shape, size)
    return jnp.concatenate([jnp.where(head == a, x, jnp.zeros_like(x)) for a in range(pack)], axis=0)


def fold(x: jax.Array, pack: int, size: int) -> jax.Array:
    """(p·r, p·size) to (r, p·size): the diagonal blocks side by side; the transpose of `stack`."""
    if pack == 1:
        return x
    rows = x.shape[0] // pack
    head = head_of_lane((rows, x.shape[1]), size)
    folded = jnp.zeros_like(x[:rows])
    for a in range(pack):
        folded = jnp.where(head == a, x[a * rows : (a + 1) * rows], folded)
    return folded


def spread(columns: list[jax.Array], size: int) -> jax.Array:
    """A number per row and head, p of (r, 1), over the lanes of the heads: (r, p·size), or (r, 1) where p is 1."""
    if len(columns) == 1:
        return columns[0]
    shape = (columns[0].shape[0], len(columns) * size)
    if size % LANES == 0:
        return jnp.concatenate([jnp.broadcast_to(x, (shape[0], size)) for x in columns], axis=1)
    head = head_of_lane(shape, size)
    result = jnp.broadcast_to(columns[0], shape)
    for a, column in enumerate(columns[1:], 1):
        result = jnp.where(head == a, column, result)
    return result


def spread_scalars(scalars: list[jax.Array], size: int) -> jax.Array:
    """A scalar per head over the lanes of the heads: (1, p·size), or the scalar itself where p is 1."""
    return scalars[0] if len(scalars) == 1 else spread([jnp.full((1, 1), x, WIDE) for x in scalars], size)


def sums(x: jax.Array, pack: int, size: int) -> list[jax.Array]:
    """Sums over the lanes of each head, (r, p·size) to p of (r, 1)."""
    if pack == 1:
        return [jnp.sum(x, axis=1, keepdims=True)]
    if size % LANES == 0:
        return [jnp.sum(x[:, a * size : (a + 1) * size], axis=1, keepdims=True) for a in range(pack)]
    head = head_of_lane(x.shape, size)
    return [jnp.sum(jnp.where(head == a, x, 0), axis=1, keepdims=True) for a in range(pack)]
