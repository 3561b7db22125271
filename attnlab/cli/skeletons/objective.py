"""SKELETON made by `attnlab new`: replace this toy by the mechanism, and take this line out.

    loss_b = Σ_n w_bn ‖p_bn - t_bn‖² / Σ_n w_bn

Say here what the paper and the authors' code compute, and where they differ.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.registry import Cost, Example, Kind, Paper, Source, register

PAPER = Paper("Title of the paper", "First et al.", 2026)


def _example() -> Example:
    prediction, target = (jax.random.normal(jax.random.key(seed), (2, 5, 4)) for seed in (0, 1))
    weight = jnp.ones((2, 5)).at[1, 3:].set(0)
    return Example(skeleton, (prediction, target), {"weight": weight}, batched=(0, 1, "weight"))


@register(
    "skeleton",
    kind=Kind.OBJECTIVE,
    paper=PAPER,
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N·C)", memory="O(N)"),
    summary="squared error of tokens, as a mean over those with weight (a toy)",
    small=_example,
)
def skeleton(prediction: ArrayLike, target: ArrayLike, *, weight: ArrayLike | None = None) -> jax.Array:
    """Weighted squared error of each example.

    Args:
      prediction: (B, N, C).
      target: (B, N, C).
      weight: of the tokens, (B, N), at least 0; 1 for all when None. An example without weight has loss 0.

    Returns:
      (B,) float32, not reduced over the batch.
    """
    error = jnp.square(jnp.asarray(prediction, jnp.float32) - jnp.asarray(target, jnp.float32)).sum(-1)
    weights = jnp.ones_like(error) if weight is None else jnp.asarray(weight, jnp.float32)
    total = weights.sum(-1)
    return (weights * error).sum(-1) / jnp.where(total > 0, total, 1)
