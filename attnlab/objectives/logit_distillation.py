"""Distillation by logits: a student's prediction against a teacher's at one temperature (arXiv:1503.02531).

KL(softmax(teacher / T) ‖ softmax(student / T)) · T²
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def logit_distillation(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    temperature: float = 1.0,
    weight: ArrayLike | None = None,
) -> jax.Array:
    """The divergence, averaged over the places of each example; (B,) float32. The teacher gets no gradient.

    Args:
      student: logits (B, …, classes).
      teacher: logits of the same shape.
      temperature: T.
      weight: of the places, (B, …), for example 1 at tokens that count and 0 at padding; 1 when None. An example whose
        weights are all 0 gives 0.

    Raises:
      ValueError: for a temperature that is not positive, or shapes that do not fit.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if jnp.shape(student) != jnp.shape(teacher):
        raise ValueError(f"student and teacher must have one shape, got {jnp.shape(student)} and {jnp.shape(teacher)}")
    log_q = jax.nn.log_softmax(jnp.asarray(student, jnp.float32) / temperature)
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(jnp.asarray(teacher, jnp.float32)) / temperature)
    divergence = (jnp.exp(log_p) * (log_p - log_q)).sum(-1) * temperature**2
    places = tuple(range(1, divergence.ndim))
    if weight is None:
        return divergence.mean(places)
    weight = jnp.asarray(weight, jnp.float32)
    if weight.shape != divergence.shape:
        raise ValueError(f"weight must be of the places {divergence.shape}, got {weight.shape}")
    total = weight.sum(places)
    return (divergence * weight).sum(places) / jnp.where(total == 0, 1, total)


def exit_distillation(
    exits: Sequence[ArrayLike],
    teacher: ArrayLike,
    *,
    temperature: float = 1.0,
    weight: ArrayLike | None = None,
) -> jax.Array:
    """`logit_distillation` of several exits against one teacher, in sum; (B,) float32. Arguments as there.

    Raises:
      ValueError: without any exit.
    """
    if not exits:
        raise ValueError("exits must be at least one, got none")
    losses = [logit_distillation(one, teacher, temperature=temperature, weight=weight) for one in exits]
    return jnp.stack(losses).sum(0)
