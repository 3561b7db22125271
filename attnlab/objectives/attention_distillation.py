"""Attention distillation: train a linear attention to imitate a softmax attention.

Hedgehog (Zhang et al., 2024, arXiv:2402.04347) minimises the cross-entropy of the student's weights under the
teacher's; LoLCATs (Zhang et al., 2024, arXiv:2410.10254; code: HazyResearch/lolcats) adds the squared error of the
outputs and averages over layers:

    loss = xent_factor · mean_l CE(log student_l, teacher_l) + mse_factor · mean_l mean (y_student - y_teacher)²

where CE(z, t) = -mean over queries of Σ_j t_j log_softmax(z)_j: for weights that sum to 1, that of the paper. All
means are inside an example here; their code's loss is the mean over the batch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.registry import Cost, Example, Kind, Paper, Source, register


def weights_cross_entropy(student: ArrayLike, teacher: ArrayLike, *, eps: float = 1e-12) -> jax.Array:
    """-Σ_j teacher_j log_softmax(log student)_j, averaged over the queries of each example; (B,) float32.

    Args:
      student: weights, (B, …, N, M), at least 0; those below `eps` count as `eps`.
      teacher: weights, (B, …, N, M), each row summing to 1.
      eps: least weight of the student.
    """
    log_student = jax.nn.log_softmax(jnp.log(jnp.maximum(jnp.asarray(student, jnp.float32), eps)), axis=-1)
    entropy = -jnp.sum(jnp.asarray(teacher, jnp.float32) * log_student, axis=-1)
    return entropy.mean(range(1, entropy.ndim))


def _example() -> Example:
    keys = jax.random.split(jax.random.key(0), 4)
    weights = [[jax.nn.softmax(jax.random.normal(key, (3, 2, 5, 5)))] * 2 for key in keys[:2]]
    outputs = [[jax.random.normal(key, (3, 5, 2, 4))] * 2 for key in keys[2:]]
    options = {"xent_factor": 1.0, "mse_factor": 10.0}
    return Example(attention_distillation, (*weights, *outputs), options, (0, 1, 2, 3), (0, 2))


@register(
    "hedgehog.distillation",
    kind=Kind.OBJECTIVE,
    paper=Paper("LoLCATs: On Low-Rank Linearizing of Large Language Models", "Zhang et al.", 2024, arxiv="2410.10254"),
    source=Source.AUTHORS_CODE,
    repository="HazyResearch/lolcats",
    cost=Cost(time="O(H·N·M)", memory="O(H·N·M)"),
    summary="a linear attention's weights and outputs against those of the softmax attention that it replaces",
    small=_example,
)
def attention_distillation(
    student_weights: Sequence[ArrayLike],
    teacher_weights: Sequence[ArrayLike],
    student_outputs: Sequence[ArrayLike],
    teacher_outputs: Sequence[ArrayLike],
    *,
    xent_factor: float = 0.0,
    mse_factor: float = 1000.0,
) -> jax.Array:
    """The loss of LoLCATs over layers, of each example; (B,) float32.

    Args:
      student_weights: per layer, (B, H, N, M).
      teacher_weights: per layer, (B, H, N, M).
      student_outputs: per layer, (B, …).
      teacher_outputs: per layer, of the same shapes.
      xent_factor: weight of the cross-entropy of weights; 0 leaves it out.
      mse_factor: weight of the squared error of outputs; 0 leaves it out.

    Raises:
      ValueError: if the four do not have one entry per layer each.
    """
    counts = [len(part) for part in (student_weights, teacher_weights, student_outputs, teacher_outputs)]
    if len(set(counts)) != 1 or not counts[0]:
        raise ValueError(f"weights and outputs must have one entry per layer each, got {counts}")
    loss = jnp.zeros(jnp.shape(student_outputs[0])[:1], jnp.float32)
    if xent_factor:
        for student, teacher in zip(student_weights, teacher_weights, strict=True):
            loss += xent_factor / counts[0] * weights_cross_entropy(student, teacher)
    if mse_factor:
        for student, teacher in zip(student_outputs, teacher_outputs, strict=True):
            error = jnp.square(jnp.asarray(student, jnp.float32) - jnp.asarray(teacher, jnp.float32))
            loss += mse_factor / counts[0] * error.mean(range(1, error.ndim))
    return loss
