"""Attention calibration, ACT (Yu et al., ICML 2024): attention moved from sinks in the middle to the rest of the row.

Of one head's causal weights A (N x N), over the queries of a prompt:

    r_j = Σ_i A_ij / (number of queries that see key j, N - j without padding)             received attention
    S   = {j : r_j > θ} without its first member                                           the first sink is spared
    A'_ij = β A_ij for j ∈ S,   A'_ij = A_ij (1 + (1 - β) Σ_S A_i / Σ_{not S} A_i) for others

Rows keep their sums. Whichever sink comes first is spared, also if it is not token 0. The last keys are averaged over
few queries, and may count as sinks. The threshold does not depend on N. Which heads are calibrated is found beforehand,
by the accuracy of the model with each in turn calibrated on held-out data:

    calibrated = attach(model, AttentionCalibration(), layers=range(2, L - 1), heads=chosen)    # chosen: boolean (L, H)

Reference: GATECH-EIC/ACT, `atten_process_eval`, which is meant for a prompt; in a step of one token it would give the
first key the weight 1. Here steps are left as they are. Each example of a batch has its own sinks, which is ours: there
the batch is one. There the first row is set to 1 on the first key, which it is already.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.interventions.parts import move_mass
from attnlab.points import At, Intervention, Setting
from attnlab.registry import Cost, Example, Kind, Paper, Source, register


def received_attention(weights: ArrayLike, allowed: ArrayLike | None = None) -> jax.Array:
    """Mean attention on each key, over the queries that see it: `(B, H, M)`; 0 for a key that none sees.

    Args:
      weights: `(B, H, N, M)`.
      allowed: boolean, broadcastable to them, who sees whom; the causal rule when None.
    """
    weights = jnp.asarray(weights)
    allowed = jnp.tri(*weights.shape[-2:], dtype=bool) if allowed is None else jnp.asarray(allowed)
    allowed = allowed.reshape((1,) * (4 - allowed.ndim) + allowed.shape)
    seen = jnp.broadcast_to(allowed, (*allowed.shape[:2], *weights.shape[2:])).sum(-2)
    return weights.sum(-2) / jnp.maximum(seen, 1).astype(weights.dtype)


def calibrate_sinks(
    weights: ArrayLike,
    *,
    heads: tuple[int, ...] | None = None,
    beta: ArrayLike = 0.4,
    theta: ArrayLike = 0.1,
    allowed: ArrayLike | None = None,
) -> jax.Array:
    """The calibrated weights.

    Args:
      weights: `(B, H, N, M)` of a prompt.
      heads: which heads are calibrated; all when None.
      beta: β, what sinks keep.
      theta: θ, received attention above which a key is a sink.
      allowed: boolean, broadcastable to the weights, who sees whom; the causal rule when None.

    Raises:
      ValueError: for heads that do not exist.
    """
    weights = jnp.asarray(weights)
    if heads is not None and any(not 0 <= head < weights.shape[1] for head in heads):
        raise ValueError(f"heads must be among the {weights.shape[1]} of the weights, got {list(heads)}")
    sinks = received_attention(weights, allowed) > jnp.asarray(theta, weights.dtype)
    sinks &= jnp.cumsum(sinks, -1) > 1
    moved = move_mass(weights, sinks[:, :, None], True, kept=beta)
    if heads is None:
        return moved
    chosen = jnp.zeros(weights.shape[1], bool).at[jnp.asarray(heads, int)].set(True)
    return jnp.where(chosen[:, None, None], moved, weights)


def _example() -> Example:
    from attnlab.interventions.examples import small_language_model
    from attnlab.points import attach

    tokens, model = small_language_model()
    # Above a threshold that no received attention is near to.
    edit = AttentionCalibration(theta=0.05)
    return Example(attach(model, edit, heads=jnp.asarray([True, False])), (tokens,), differentiable=())


@register(
    "act_calibration",
    kind=Kind.INTERVENTION,
    paper=Paper(
        "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through "
        "Attention Calibration",
        "Yu et al.",
        2024,
        number=105,
    ),
    source=Source.AUTHORS_CODE,
    repository="GATECH-EIC/ACT",
    cost=Cost("O(H·N·M)", "O(H·N·M)"),
    summary="moves attention from sinks other than the first to the rest of each row of a prompt",
    small=_example,
)
class AttentionCalibration(Intervention):
    """Calibration of a call, and of prefill; steps are left as they are.

    Args:
      beta: β, what sinks keep of their attention.
      theta: θ, received attention above which a key is a sink.
    """

    def __init__(self, *, beta: ArrayLike = 0.4, theta: ArrayLike = 0.1):
        self.beta, self.theta = (Setting(jnp.asarray(value, jnp.float32)) for value in (beta, theta))

    def attention(self, weights: jax.Array, at: At, memory: Any) -> tuple[jax.Array, Any]:
        if at.phase == "step":
            return weights, memory
        seen = jnp.ones((1, 1, 1, 1), bool) if at.allowed is None else at.allowed
        beta, theta = self.beta[...], self.theta[...]
        return calibrate_sinks(weights, beta=beta, theta=theta, allowed=seen), memory
