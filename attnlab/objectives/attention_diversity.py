"""How alike the attention of branches is, of ACMIL (Zhang et al., ECCV 2024, arXiv:2311.07125).

    loss = mean over pairs of branches i < j of  p_i · p_j / (|p_i| |p_j|),     p = softmax of the scores

averaged over heads where there are any. Code: dazhangyu123/ACMIL.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnlab.nn.masking import masked_softmax
from attnlab.nn.norms import unit_norm
from attnlab.pooling.acmil import PAPER, REPOSITORY
from attnlab.registry import Cost, Example, Kind, Source, register


def _example() -> Example:
    return Example(attention_diversity, (np.random.default_rng(0).standard_normal((2, 3, 6)).astype(np.float32),))


@register(
    "acmil.loss",
    kind=Kind.OBJECTIVE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=Cost(time="O(K²·N)", memory="O(K·N)"),
    summary="mean cosine of the attention of all pairs of branches, which training makes small",
    small=_example,
)
def attention_diversity(
    scores: ArrayLike, *, mask: ArrayLike | None = None, weight: ArrayLike | None = None
) -> jax.Array:
    """The mean cosine of pairs; (B,) float32, 0 for one branch.

    Args:
      scores: of the instances before the softmax, `(B, K, N)`, or with heads `(B, H, K, N)`.
      mask: `(B, N)` boolean, which instances exist; a bag without any gives 0.
      weight: of the examples, `(B,)`; 1 when None.

    Raises:
      ValueError: for scores of another rank.
    """
    scores = jnp.asarray(scores, jnp.float32)
    if scores.ndim not in (3, 4):
        raise ValueError(f"scores must be (B, K, N) or (B, H, K, N), got {scores.shape}")
    there = None if mask is None else jnp.asarray(mask).reshape(scores.shape[0], *(1,) * (scores.ndim - 2), -1)
    unit = unit_norm(masked_softmax(scores, there))
    branches = scores.shape[-2]
    cosines = jnp.einsum("...in,...jn->...ij", unit, unit, precision=jax.lax.Precision.HIGHEST)
    pairs = np.triu(np.ones((branches, branches), np.float32), 1)
    loss = (cosines * pairs).sum((-2, -1)) / max(pairs.sum(), 1)
    loss = loss if scores.ndim == 3 else loss.mean(1)
    return loss if weight is None else loss * jnp.asarray(weight, jnp.float32)
