"""The cloze objective: masked items are to be told from what stands around them (BERT4Rec, 2019, arXiv:1904.06690).

    loss = Σ_p w_p CE(logits_p, target_p) / (Σ_p w_p + ε)

over the masked places p, those that only fill a row having w = 0. In the authors' code (FeiSun/BERT4Rec) ε is 1e-5 and
both sums are over the whole batch: that is `batch_cloze_loss`. `cloze_loss` is of each example alone.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.models.bert4rec import PAPER, REPOSITORY
from attnlab.registry import Cost, Example, Kind, Source, register

EPS = 1e-5


def _example() -> Example:
    logits = jax.random.normal(jax.random.key(0), (2, 3, 7))
    arrays = (logits, jnp.array([[1, 6, 0], [2, 2, 5]]))
    return Example(cloze_loss, arrays, {"weight": jnp.array([[1.0, 1, 0], [1, 1, 1]])}, (0, 1, "weight"), (0,))


@register(
    "bert4rec.cloze",
    kind=Kind.OBJECTIVE,
    paper=PAPER,
    source=Source.THIRD_PARTY,
    repository=REPOSITORY,
    cost=Cost(time="O(P·V)", memory="O(P·V)"),
    summary="cross-entropy of masked items, over as many places as are masked",
    small=_example,
)
def cloze_loss(logits: ArrayLike, target: ArrayLike, *, weight: ArrayLike | None = None, eps: float = EPS) -> jax.Array:
    """The loss of each example over its own masked places; `(B,)` float32.

    Args:
      logits: `(B, P, V)` at the masked places.
      target: `(B, P)` integers, the items that stood there.
      weight: `(B, P)`, 0 for places that only fill a row; 1 when None.
      eps: added to the sum of weights; 0 gives the mean, and 0 for an example without any place.

    Raises:
      ValueError: for shapes that do not fit, or a negative `eps`.
    """
    total, count = _sums(logits, target, weight, eps)
    return total / jnp.where(count + eps > 0, count + eps, 1)


def batch_cloze_loss(
    logits: ArrayLike, target: ArrayLike, *, weight: ArrayLike | None = None, eps: float = EPS
) -> jax.Array:
    """The authors' loss, a scalar, over all masked places of the batch; arguments and errors as `cloze_loss`."""
    total, count = (part.sum() for part in _sums(logits, target, weight, eps))
    return total / jnp.where(count + eps > 0, count + eps, 1)


def _sums(logits: ArrayLike, target: ArrayLike, weight: ArrayLike | None, eps: float) -> tuple[jax.Array, jax.Array]:
    """Weighted losses and weights of each example, `(B,)` each."""
    scores, items = jnp.asarray(logits, jnp.float32), jnp.asarray(target)
    if scores.ndim != 3 or items.shape != scores.shape[:2]:
        raise ValueError(f"logits must be (B, P, V) and target (B, P), got {scores.shape} and {items.shape}")
    if not jnp.issubdtype(items.dtype, jnp.integer):
        raise ValueError(f"target must be integers, got {items.dtype}")
    if eps < 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    w = jnp.ones(items.shape, jnp.float32) if weight is None else jnp.asarray(weight, jnp.float32)
    if w.shape != items.shape:
        raise ValueError(f"weight must be (B, P) = {items.shape}, got {w.shape}")
    own = jnp.take_along_axis(scores, items[..., None], axis=-1, mode="fill")[..., 0]
    losses = jax.nn.logsumexp(scores, axis=-1) - own
    return jnp.where(w > 0, w * losses, 0).sum(-1), w.sum(-1)
