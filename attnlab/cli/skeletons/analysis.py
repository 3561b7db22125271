"""SKELETON made by `attnlab new`: replace this toy by the mechanism, and take this line out.

    entropy_bh = mean_i -Σ_j a_ij log a_ij

Say here what the paper and the authors' code measure, and where they differ.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.registry import Cost, Example, Kind, Paper, Source, register

PAPER = Paper("Title of the paper", "First et al.", 2026)


class Skeleton(NamedTuple):
    """Measures of attention: `entropy` (B, H) in nats."""

    entropy: jax.Array


def _example() -> Example:
    attention = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 3, 4, 4)))
    return Example(skeleton, (attention,), {"mask": jnp.arange(4) < jnp.asarray([[4], [3]])}, batched=(0, "mask"))


@register(
    "skeleton",
    kind=Kind.ANALYSIS,
    paper=PAPER,
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N·M·H)", memory="O(N·H)"),
    summary="entropy of each head's attention (a toy)",
    small=_example,
)
def skeleton(attention: ArrayLike, *, mask: ArrayLike | None = None) -> Skeleton:
    """Measures attention.

    Args:
      attention: weights (B, H, N, M), each row summing to 1.
      mask: (B, N), which queries count; all when None.

    Returns:
      float32, a row of weight 0 counting as entropy 0.
    """
    weights = jnp.asarray(attention, jnp.float32)
    entropy = -jnp.sum(weights * jnp.log(jnp.where(weights > 0, weights, 1)), axis=-1)
    counts = jnp.ones((weights.shape[0], weights.shape[2]), bool) if mask is None else jnp.asarray(mask)
    return Skeleton((entropy * counts[:, None]).sum(-1) / jnp.maximum(counts.sum(-1), 1)[:, None])
