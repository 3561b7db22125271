"""How high the true item is ranked among candidates: hit ratio, NDCG, reciprocal rank (BERT4Rec, arXiv:1904.06690).

With r the number of candidates in front of the true one, and one relevant item:

    HR@k = [r < k];    NDCG@k = [r < k] / log2(r + 2);    MRR = 1 / (r + 1)

Among equal scores the candidate that comes first counts as higher, as a stable sort has it (code: FeiSun/BERT4Rec,
whose true item comes first). What is reported is the mean over users; here all are of each example.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.models.bert4rec import PAPER, REPOSITORY
from attnlab.registry import Cost, Example, Kind, Source, register


class Ranking(NamedTuple):
    """Measures of a ranking, float32 but for the rank.

    Attributes:
      rank: `(B,)` int32, candidates in front of the true one.
      hit_ratio: `(B, K)`, at each of the K cut-offs.
      ndcg: `(B, K)`.
      reciprocal_rank: `(B,)`.
    """

    rank: jax.Array
    hit_ratio: jax.Array
    ndcg: jax.Array
    reciprocal_rank: jax.Array


def _example() -> Example:
    return Example(ranking_metrics, (jax.random.normal(jax.random.key(0), (3, 12)),), {}, (0,), ())


@register(
    "bert4rec.ranking",
    kind=Kind.ANALYSIS,
    paper=PAPER,
    source=Source.PAPER_TEXT,
    repository=REPOSITORY,
    cost=Cost(time="O(M)", memory="O(M)"),
    summary="hit ratio, NDCG and reciprocal rank of the true item among candidates",
    small=_example,
)
def ranking_metrics(
    scores: ArrayLike,
    true: ArrayLike | None = None,
    *,
    cutoffs: Sequence[int] = (1, 5, 10),
    mask: ArrayLike | None = None,
) -> Ranking:
    """Ranks the true item.

    Args:
      scores: `(B, M)` of the candidates, the higher the better.
      true: `(B,)` integers, which candidate is the true one; the first when None.
      cutoffs: k of the hit ratios and gains.
      mask: `(B, M)` boolean, which candidates there are; all when None. The true one always is.

    Raises:
      ValueError: for shapes that do not fit, or cut-offs below 1.
    """
    s = jnp.asarray(scores)
    if s.ndim != 2:
        raise ValueError(f"scores must be (B, M), got {s.shape}")
    if not cutoffs or min(cutoffs) < 1:
        raise ValueError(f"cutoffs must be at least 1, got {tuple(cutoffs)}")
    at = jnp.zeros(s.shape[:1], jnp.int32) if true is None else jnp.asarray(true)
    if at.shape != s.shape[:1] or not jnp.issubdtype(at.dtype, jnp.integer):
        raise ValueError(f"true must be integers (B,) = {s.shape[:1]}, got {at.dtype} {at.shape}")
    own, place = jnp.take_along_axis(s, at[:, None], axis=1), jnp.arange(s.shape[1])
    front = (s > own) | ((s == own) & (place < at[:, None]))
    if mask is not None:
        there = jnp.asarray(mask)
        if there.shape != s.shape or there.dtype != jnp.bool_:
            raise ValueError(f"mask must be boolean (B, M) = {s.shape}, got {there.dtype} {there.shape}")
        front &= there
    rank = front.sum(1, dtype=jnp.int32)
    real = rank.astype(jnp.float32)
    hit = (rank[:, None] < jnp.asarray(tuple(cutoffs))).astype(jnp.float32)
    return Ranking(rank, hit, hit / jnp.log2(real + 2)[:, None], 1 / (real + 1))
