"""What attentive poolings share: means, sizes, and the queries that a caller brings."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.dtypes import at_least_float32


def wide(x: jax.Array) -> jax.Array:
    """`x` in float32, or in its own dtype where that is wider."""
    return x.astype(at_least_float32(x.dtype))


def mean(x: jax.Array, axis: int | tuple[int, ...], *, keepdims: bool = False) -> jax.Array:
    """Mean over `axis`, summed in float32 (or wider), in the dtype of `x`."""
    return wide(x).mean(axis, keepdims=keepdims).astype(x.dtype)


def token_mean(x: jax.Array, mask: jax.Array | None, *, keepdims: bool = False) -> jax.Array:
    """Mean (B, C) of the tokens (B, N, C) that exist, summed in float32; zeros where none does."""
    if mask is None:
        return mean(x, 1, keepdims=keepdims)
    total = jnp.where(mask[..., None], wide(x), 0).sum(1, keepdims=keepdims)
    count = mask.sum(1).reshape(-1, *(1,) * (total.ndim - 1))
    return (total / jnp.maximum(count, 1)).astype(x.dtype)


def head_size(features: int, num_heads: int) -> int:
    """D = features / num_heads.

    Raises:
      ValueError: if the heads do not divide the channels.
    """
    if features % num_heads:
        raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
    return features // num_heads


def given_queries(queries: ArrayLike, x: jax.Array, count: int | None = None) -> jax.Array:
    """Queries that the caller brings, (B, Q, C), in the dtype of the tokens.

    Args:
      queries: what came.
      x: tokens (B, N, C).
      count: the Q that is wanted, None for any.

    Raises:
      ValueError: if the shape is another.
    """
    shape = jnp.shape(queries)
    if len(shape) != 3 or shape[0] != x.shape[0] or shape[2] != x.shape[2] or count not in (None, shape[1]):
        wanted = f"({x.shape[0]}, {'Q' if count is None else count}, {x.shape[2]})"
        raise ValueError(f"queries must have shape {wanted}, got {shape}")
    return jnp.asarray(queries, x.dtype)
