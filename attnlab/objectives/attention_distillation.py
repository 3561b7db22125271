"""Attention distillation: train a linear attention to imitate a softmax attention.

Hedgehog (Zhang et al., 2024, arXiv:2402.04347) minimises the cross-entropy of the student's weights under the
teacher's; LoLCATs (Zhang et al., 2024, arXiv:2410.10254; code: HazyResearch/lolcats) adds the squared error of the
outputs and averages over layers:

    loss = xent_factor · mean_l CE(log student_l, teacher_l) + mse_factor · mean_l mean (y_student - y_teacher)²

where CE(z, t) = -mean over queries of Σ_j t_j log_softmax(z)_j: for weights that sum to 1, that of the paper.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def weights_cross_entropy(student: ArrayLike, teacher: ArrayLike, *, eps: float = 1e-12) -> jax.Array:
    """-Σ_j teacher_j log_softmax(log student)_j, averaged over all queries; a float32 scalar.

    Args:
      student: weights, (…, N, M), at least 0; those below `eps` count as `eps`.
      teacher: weights, (…, N, M), each row summing to 1.
      eps: least weight of the student.
    """
    log_student = jax.nn.log_softmax(jnp.log(jnp.maximum(jnp.asarray(student, jnp.float32), eps)), axis=-1)
    return -jnp.mean(jnp.sum(jnp.asarray(teacher, jnp.float32) * log_student, axis=-1))


def attention_distillation(
    student_weights: Sequence[ArrayLike],
    teacher_weights: Sequence[ArrayLike],
    student_outputs: Sequence[ArrayLike],
    teacher_outputs: Sequence[ArrayLike],
    *,
    xent_factor: float = 0.0,
    mse_factor: float = 1000.0,
) -> jax.Array:
    """The loss of LoLCATs over layers; a float32 scalar.

    Args:
      student_weights: per layer, (B, H, N, M).
      teacher_weights: per layer, (B, H, N, M).
      student_outputs: per layer, of any shape.
      teacher_outputs: per layer, of the same shapes.
      xent_factor: weight of the cross-entropy of weights; 0 leaves it out.
      mse_factor: weight of the squared error of outputs; 0 leaves it out.

    Raises:
      ValueError: if the four do not have one entry per layer each.
    """
    counts = [len(part) for part in (student_weights, teacher_weights, student_outputs, teacher_outputs)]
    if len(set(counts)) != 1 or not counts[0]:
        raise ValueError(f"weights and outputs must have one entry per layer each, got {counts}")
    xent = mse = jnp.zeros((), jnp.float32)
    if xent_factor:
        pairs = zip(student_weights, teacher_weights, strict=True)
        xent = sum(weights_cross_entropy(student, teacher) for student, teacher in pairs) / counts[0]
    if mse_factor:
        pairs = zip(student_outputs, teacher_outputs, strict=True)
        wide = ((jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)) for a, b in pairs)
        mse = sum(jnp.mean(jnp.square(student - teacher)) for student, teacher in wide) / counts[0]
    return xent_factor * xent + mse_factor * mse
