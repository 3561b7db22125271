"""The loss of a model with several exits: each against the labels, the early ones against the last one's logits, too.

    loss = Σ_k w_k CE(exit_k, labels) + α Σ_{k < last} KL(softmax(last / T) ‖ softmax(exit_k / T)) T²

Nothing flows into the last exit through the second term. Dynamic Perceiver (Han et al., 2023, arXiv:2306.11248; code:
LeapLabTHU/Dynamic_Perceiver) weighs its four by 1/4, 1/4, 1/4 and 1/2, with α = 1/2 and T = 4 where it distils. The
paths of a transformer (`attnlab.models.path_ensemble`) are taught alike, by the mean: `prefix_distillation`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.attention.cross.dyn_perceiver import SOURCE
from attnlab.objectives.logit_distillation import exit_distillation
from attnlab.registry import Cost, Example, Kind, register


def label_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """-Σ_c labels_c log softmax(logits)_c; (B,) float32.

    Args:
      logits: (B, classes).
      labels: integers (B,), or probabilities (B, classes).

    Raises:
      ValueError: for labels of another shape.
    """
    logits, labels = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        labels = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    if labels.shape != logits.shape:
        raise ValueError(f"labels must be integers (B,) or probabilities {logits.shape}, got {labels.shape}")
    return -(labels.astype(jnp.float32) * jax.nn.log_softmax(logits)).sum(-1)


def _example() -> Example:
    logits = [jax.random.normal(key, (3, 5)) for key in jax.random.split(jax.random.key(0), 4)]
    return Example(exit_loss, (logits, jnp.array([0, 4, 2])), {"distillation": 0.5}, (0, 1), (0,))


@register(
    "dyn_perceiver.loss",
    kind=Kind.OBJECTIVE,
    cost=Cost(time="O(exits·classes)", memory="O(exits·classes)"),
    summary="several exits against the labels, and the early ones against the logits of the last",
    small=_example,
    **SOURCE,
)
def exit_loss(
    exits: Sequence[ArrayLike],
    labels: ArrayLike,
    *,
    factors: Sequence[float] = (0.25, 0.25, 0.25, 0.5),
    distillation: float = 0.0,
    temperature: float = 4.0,
) -> jax.Array:
    """The weighted sum of all terms, of each example; (B,) float32.

    Args:
      exits: logits (B, classes) of each exit, the one that teaches last.
      labels: integers (B,), or probabilities (B, classes).
      factors: w, one for each exit.
      distillation: α, of the divergences of all exits but the last from the last; 0 leaves them out.
      temperature: T.

    Raises:
      ValueError: for another number of factors than exits, distillation of a single one, or shapes that do not fit.
    """
    if not exits or len(factors) != len(exits):
        raise ValueError(f"factors must be one for each of {len(exits)} exits, got {len(factors)}")
    losses = [factor * label_cross_entropy(one, labels) for factor, one in zip(factors, exits, strict=True)]
    loss = jnp.stack(losses).sum(0)
    if not distillation:
        return loss
    return loss + distillation * exit_distillation(exits[:-1], exits[-1], temperature=temperature)


def prefix_distillation(
    prefixes: Sequence[ArrayLike],
    whole: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: float = 1.0,
    temperature: float = 1.0,
) -> jax.Array:
    """CE(whole, labels) + α mean_k KL(softmax(whole / T) ‖ softmax(prefix_k / T)) T², of each example; (B,) float32.

    Nothing flows into the whole through the second term. From the abstract of arXiv:2308.06548; α and T are proposed.

    Args:
      prefixes: logits (B, classes) of the ensembles of the first paths, such as `PathEnsembleViT.prefix_logits` gives.
      whole: logits of all paths.
      labels: integers (B,), or probabilities (B, classes).
      alpha: α.
      temperature: T.

    Raises:
      ValueError: without prefixes, or for shapes that do not fit.
    """
    taught = exit_distillation(prefixes, whole, temperature=temperature) / len(prefixes)
    return label_cross_entropy(whole, labels) + alpha * taught
