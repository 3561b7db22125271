"""The losses that Sparsifiner is trained by (Wei et al., CVPR 2023, arXiv:2303.13755): logits, tokens, attention maps.

    loss = CE(logits, labels) + 0.5 KL(teacher ‖ student) + 0.5 mean (tokens - teacher's)²
         + 0.01 · mean over layers Σ (approximation - teacher's attention)²          while the approximation is trained
         + 0.05 · mean over layers Σ (approximation - own attention)²                self-distillation, afterwards

The teacher's attention is without its class token's row. Sums of squares go over all of one example's entries; in the
authors' code over the whole batch's, so that its factors are for their batch. Nothing flows into the teacher.
Code: lim142857/Sparsifiner.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.attention.sparse.sparsifiner import PAPER
from attnlab.objectives.exits import label_cross_entropy
from attnlab.objectives.logit_distillation import logit_distillation
from attnlab.registry import Cost, Example, Kind, Source, register


def token_distillation(student: ArrayLike, teacher: ArrayLike, *, alive: ArrayLike | None = None) -> jax.Array:
    """The squared error of tokens, averaged over those that are left and over channels; (B,) float32.

    Args:
      student: tokens (B, N, C).
      teacher: of the same shape; without gradient.
      alive: (B, N) boolean, which tokens are left; all when None. An example without any gives 0.

    Raises:
      ValueError: for shapes that do not fit.
    """
    if jnp.shape(student) != jnp.shape(teacher):
        raise ValueError(f"student and teacher must have one shape, got {jnp.shape(student)} and {jnp.shape(teacher)}")
    teacher = jax.lax.stop_gradient(jnp.asarray(teacher, jnp.float32))
    error = jnp.square(jnp.asarray(student, jnp.float32) - teacher).mean(-1)
    if alive is None:
        return error.mean(-1)
    alive = jnp.asarray(alive)
    return jnp.where(alive, error, 0).sum(-1) / jnp.maximum(alive.sum(-1, dtype=jnp.float32), 1)


def attention_reconstruction(approximations: Sequence[ArrayLike], attention: Sequence[ArrayLike]) -> jax.Array:
    """The squared error of approximated attention, summed over an example and averaged over layers; (B,) float32.

    Args:
      approximations: per layer, (B, H, N - 1, N): all rows but the class token's.
      attention: per layer, (B, H, N, N).

    Raises:
      ValueError: without layers, or for different numbers of them.
    """
    if not approximations or len(approximations) != len(attention):
        raise ValueError(f"there must be one map for each layer, got {len(approximations)} and {len(attention)}")
    errors = [
        jnp.square(jnp.asarray(guess, jnp.float32) - jnp.asarray(full, jnp.float32)[:, :, 1:]).sum((1, 2, 3))
        for guess, full in zip(approximations, attention, strict=True)
    ]
    return jnp.stack(errors).mean(0)


def _example() -> Example:
    keys = jax.random.split(jax.random.key(0), 6)
    logits = [jax.random.normal(key, (3, 4)) for key in keys[:2]]
    tokens = [jax.random.normal(key, (3, 5, 2)) for key in keys[2:4]]
    guess, full = jax.random.uniform(keys[4], (3, 2, 5, 6)), jax.nn.softmax(jax.random.normal(keys[5], (3, 2, 6, 6)))
    arguments = (logits[0], jnp.array([0, 3, 1]), tokens[0], logits[1], tokens[1], [guess], [full])
    return Example(sparsifiner_loss, arguments, {}, tuple(range(7)), (0, 2, 5))


@register(
    "sparsifiner.loss",
    kind=Kind.OBJECTIVE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="lim142857/Sparsifiner",
    cost=Cost(time="O(N·C + H·N²)", memory="O(N·C + H·N²)"),
    summary="labels, a teacher's logits and tokens, and the attention that a low-rank guess is to be",
    small=_example,
)
def sparsifiner_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    tokens: ArrayLike,
    teacher_logits: ArrayLike,
    teacher_tokens: ArrayLike,
    approximations: Sequence[ArrayLike] = (),
    attention: Sequence[ArrayLike] = (),
    *,
    alive: ArrayLike | None = None,
    label_factor: float = 1.0,
    logit_factor: float = 0.5,
    token_factor: float = 0.5,
    attention_factor: float = 0.01,
) -> jax.Array:
    """The weighted sum of all terms, of each example; (B,) float32.

    Args:
      logits: of the student, (B, classes).
      labels: integers (B,), or probabilities (B, classes).
      tokens: the student's last patch tokens, (B, N - 1, C).
      teacher_logits: (B, classes).
      teacher_tokens: (B, N - 1, C).
      approximations: per layer, (B, H, N - 1, N); none for a training without that term.
      attention: per layer, (B, H, N, N): the teacher's, or for self-distillation the student's own over all pairs.
      alive: (B, N - 1) boolean, patches that the student did not prune.
      label_factor: of the cross-entropy.
      logit_factor: of the divergence from the teacher's logits.
      token_factor: of the squared error of tokens.
      attention_factor: of the squared error of approximations, 0.01 for a teacher's attention, 0.05 (0.002 in the
        released configuration) for the student's own.

    Raises:
      ValueError: for shapes that do not fit.
    """
    loss = label_factor * label_cross_entropy(logits, labels)
    loss = loss + logit_factor * logit_distillation(logits, teacher_logits)
    loss = loss + token_factor * token_distillation(tokens, teacher_tokens, alive=alive)
    if approximations or attention:
        loss = loss + attention_factor * attention_reconstruction(approximations, attention)
    return loss
