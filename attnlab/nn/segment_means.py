"""Landmarks of a sequence: means of runs of tokens that are equally long, or longer by one at the end.

n tokens in m segments: the first m·(⌊n/m⌋ + 1) - n hold ⌊n/m⌋ tokens, the others one more (as in the code of
Nyströmformer, mlpen/Nystromformer). Fewer tokens than segments stand alone, behind segments that are empty.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


class Segments(NamedTuple):
    """Which tokens a landmark is the mean of.

    Attributes:
      weights: `(B|1, m, N)` float32; rows sum to 1, or to 0 for a segment without tokens.
      exist: `(B|1, m)` boolean, segments that hold any token.
      few: `(B|1,)` boolean, whether each token is a segment of its own.
    """

    weights: jax.Array
    exist: jax.Array
    few: jax.Array


def segment_means(num_tokens: int, num_segments: int, real: ArrayLike | None = None) -> Segments:
    """The segments of a sequence.

    Args:
      num_tokens: N.
      num_segments: m; no more than N are made.
      real: `(B, N)` boolean, tokens that are there; segments are made of them alone. All when None.

    Raises:
      ValueError: for less than one segment.
    """
    if num_segments < 1:
        raise ValueError(f"there must be at least 1 segment, got {num_segments}")
    count = min(num_segments, num_tokens)
    there = jnp.ones((1, num_tokens), bool) if real is None else jnp.asarray(real)
    total = there.sum(1, keepdims=True, dtype=jnp.int32)
    rank = jnp.cumsum(there, axis=1, dtype=jnp.int32) - 1
    length = total // count
    shorter = (length + 1) * count - total
    border = shorter * length
    index = jnp.where(
        rank < border, rank // jnp.maximum(length, 1), shorter + (rank - border) // (length + 1)
    )  # (B, N)
    member = there[:, None] & (index[:, None] == jnp.arange(count)[:, None])
    sizes = member.sum(-1, keepdims=True, dtype=jnp.int32)
    weights = member.astype(jnp.float32) / jnp.maximum(sizes, 1).astype(jnp.float32)
    return Segments(weights, sizes[..., 0] > 0, total[:, 0] <= count)
