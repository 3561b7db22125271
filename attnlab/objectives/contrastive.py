"""Contrastive prediction of what comes next, among sampled negatives (2025; IBM/multi-variate-parallel-transformer).

Of predictions p_t and embeddings e_t of a series, with K negatives n_k for each place:

    loss = - mean_t log( exp(cos(p_t, e_{t+1}) / τ) / (exp(cos(p_t, e_{t+1}) / τ) + Σ_k exp(cos(p_t, n_k) / τ)) )

A negative that is the positive itself, up to 1e-5 of its length, does not count. Negatives are embeddings at other
places of the batch, without gradients. The authors' code draws them from all but the last example's share of the
places, and takes the mean over the batch; here they are drawn from all other places, and losses are per example.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.attention.dense.mvpa import PAPER, REPOSITORY
from attnlab.nn.norms import unit_norm
from attnlab.registry import Cost, Example, Kind, Source, register


def sample_negatives(embeddings: ArrayLike, key: jax.Array, num_negatives: int = 30) -> jax.Array:
    """Embeddings at other places of the batch, drawn with replacement; no gradient flows into them.

    Args:
      embeddings: `(B, *S, E)`.
      key: of the draw.
      num_negatives: K.

    Returns:
      `(B, *S, K, E)`.

    Raises:
      ValueError: for fewer than two places.
    """
    rows = jax.lax.stop_gradient(jnp.asarray(embeddings))
    shape, rows = rows.shape, rows.reshape(-1, rows.shape[-1])
    if rows.shape[0] < 2:
        raise ValueError(f"embeddings must have two places to draw from, got shape {shape}")
    other = jax.random.randint(key, (rows.shape[0], num_negatives), 0, rows.shape[0] - 1)
    other = other + (other >= jnp.arange(rows.shape[0])[:, None]).astype(other.dtype)
    return rows[other].reshape(*shape[:-1], num_negatives, shape[-1])


def _example() -> Example:
    shapes = (2, 4, 3, 5), (2, 4, 3, 5), (2, 4, 3, 6, 5)
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return Example(contrastive_loss, arrays, {}, (0, 1, 2), (0, 1))


@register(
    "mvpa.contrastive",
    kind=Kind.OBJECTIVE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=Cost(time="O(T·C·K·E)", memory="O(T·C·K·E)"),
    summary="the next segment's embedding is told from sampled ones by its cosine with the prediction",
    small=_example,
)
def contrastive_loss(
    prediction: ArrayLike, target: ArrayLike, negatives: ArrayLike, *, temperature: float = 0.1
) -> jax.Array:
    """The loss of each example, averaged over its predictions; `(B,)` float32.

    Args:
      prediction: `(B, T, *S, E)`; that at t is compared with the embedding at t + 1, the last with none.
      target: embeddings, in the same shape.
      negatives: `(B, T, *S, K, E)`, for the positive at the same place: those of the first time are not used.
      temperature: τ.

    Raises:
      ValueError: for shapes that do not fit, fewer than two times, or a temperature that is not positive.
    """
    p, e, n = (jnp.asarray(part, jnp.float32) for part in (prediction, target, negatives))
    if p.shape != e.shape or p.ndim < 3 or p.shape[1] < 2:
        raise ValueError(
            f"prediction and target must be (B, T, *S, E) alike with T at least 2, got {p.shape}, {e.shape}"
        )
    if n.shape[:-2] != p.shape[:-1] or n.shape[-1] != p.shape[-1]:
        raise ValueError(f"negatives must be (B, T, *S, K, E) for predictions {p.shape}, got {n.shape}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    p, e, n = p[:, :-1, ..., None, :], e[:, 1:, ..., None, :], n[:, 1:]
    far = jnp.linalg.norm(jax.lax.stop_gradient(n - e), axis=-1)
    same = far < 1e-8 + 1e-5 * jnp.linalg.norm(jax.lax.stop_gradient(e), axis=-1)
    cosines = jnp.sum(unit_norm(p) * unit_norm(jnp.concatenate([e, n], axis=-2)), axis=-1) / temperature
    counts = jnp.concatenate([jnp.ones_like(same[..., :1]), ~same], axis=-1)
    cosines = jnp.where(counts, cosines, -jnp.inf)
    losses = jax.nn.logsumexp(cosines, axis=-1) - cosines[..., 0]
    return losses.reshape(losses.shape[0], -1).mean(-1)
