"""SKELETON made by `attnlab new`: replace this toy by the mechanism, and take this line out.

    y = sign(x) max(|x| - t, 0)

Say here what the paper and the authors' code compute, where they differ, and the cost.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.registry import Cost, Example, Kind, Paper, Source, register

PAPER = Paper("Title of the paper", "First et al.", 2026)


def _example() -> Example:
    return Example(skeleton, (jnp.linspace(-2, 2, 12).reshape(2, 6),), {"threshold": 0.3})


@register(
    "skeleton",
    kind=Kind.FUNCTION,
    paper=PAPER,
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N)", memory="O(N)"),
    summary="values nearer to 0 by a threshold (a toy)",
    small=_example,
)
def skeleton(x: ArrayLike, *, threshold: float = 0.5) -> jax.Array:
    """Soft threshold.

    Args:
      x: of any shape.
      threshold: t, at least 0.

    Returns:
      An array of the shape and dtype of `x`.
    """
    x = jnp.asarray(x)
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0)
