"""What several edits of attention share."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def move_mass(weights: ArrayLike, sources: ArrayLike, targets: ArrayLike, *, kept: ArrayLike) -> jax.Array:
    """Attention moved from some keys to others, in proportion to what these have; rows keep their sums.

        A'_k = kept A_k for k ∈ S,    A'_k = A_k (1 + (1 - kept) Σ_S A / Σ_T A) for k ∈ T ∖ S,    else A'_k = A_k

    A row with nothing on T is left as it is.

    Args:
      weights: `(B, H, N, M)`, at least 0.
      sources: boolean, broadcastable to them: S.
      targets: boolean, broadcastable to them: T.
      kept: what sources keep of their weight.
    """
    weights, sources = jnp.asarray(weights), jnp.asarray(sources, bool)
    targets = jnp.asarray(targets, bool) & ~sources
    freed = (1 - jnp.asarray(kept, weights.dtype)) * jnp.where(sources, weights, 0).sum(-1, keepdims=True)
    mass = jnp.where(targets, weights, 0).sum(-1, keepdims=True)
    factor = jnp.where(targets, 1 + freed / jnp.where(mass > 0, mass, 1), 1)
    factor = jnp.where(sources, jnp.asarray(kept, weights.dtype), factor)
    return weights * jnp.where(mass > 0, factor, 1)
