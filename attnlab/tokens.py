"""The tokens between two blocks as one value, so that an intervention can leave some of them out of later blocks."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """The value of the point `tokens`: what a block hands to the next one. What is not there is None.

    Attributes:
      x: the stream, `(B, N, C)`.
      positions: `(B, N)` int32, where the tokens are; they stay what they were when others are left out.
      mask: `(B, N)` boolean, False at padding.
      segment_ids: `(B, N)` integers.
      labels: `(B, N)` integers, see `attnlab.contract.View`.
      order: `(B, N)`, see `attnlab.points.At`.
    """

    x: jax.Array
    positions: jax.Array | None = None
    mask: jax.Array | None = None
    segment_ids: jax.Array | None = None
    labels: jax.Array | None = None
    order: jax.Array | None = None

    def take(self, index: ArrayLike) -> Self:
        """The tokens at `index` `(B, K)`, ascending in each row so that their order is kept.

        A sequence that is to be continued needs its last token.
        """
        index = jnp.asarray(index)

        def some(array: jax.Array) -> jax.Array:
            return jnp.take_along_axis(array, index.reshape(*index.shape, *(1,) * (array.ndim - 2)), axis=1)

        return jax.tree.map(some, self)

    def take_highest(self, scores: ArrayLike, count: int) -> Self:
        """The `count` tokens with the highest scores `(B, N)`, in their order; of equal ones the earlier."""
        index = jax.lax.top_k(jnp.asarray(scores), count)[1]
        return self.take(jnp.sort(index, axis=1))
