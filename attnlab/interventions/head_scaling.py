"""Scaling of heads (Michel et al., arXiv:1905.10650): a factor on what each head of each layer gives.

    y'_h = ξ_h y_h

ξ = 1 leaves a head as it is, ξ = 0 removes it; |∂L/∂ξ_h| at ξ = 1, averaged over data, is the head's importance. The
factors are an array, so that a sweep over ablations is one `vmap`, and importance one `grad`:

    def loss_under(factors):
        return loss(attach(model, HeadScaling(factors)))

    losses = jax.vmap(loss_under)(1 - jnp.eye(L * H).reshape(L * H, L, H))      # without each head in turn
    importance = jnp.abs(jax.grad(loss_under)(jnp.ones((L, H))))
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.points import At, Intervention, Setting
from attnlab.registry import Cost, Example, Kind, Paper, Source, register


def scale_heads(y: jax.Array, factors: ArrayLike) -> jax.Array:
    """`(B, N, H, E)` times `(H,)`, in the dtype of `y`."""
    return y * jnp.asarray(factors, y.dtype)[:, None]


def _example() -> Example:
    from attnlab.interventions.examples import small_vit
    from attnlab.points import attach

    images, model = small_vit()
    return Example(attach(model, HeadScaling(jnp.asarray([[0.5, 1.0], [1.0, 0.0]]))), (images,))


@register(
    "head_scaling",
    kind=Kind.INTERVENTION,
    paper=Paper("Are Sixteen Heads Really Better than One?", "Michel et al.", 2019, "1905.10650"),
    source=Source.PAPER_TEXT,
    cost=Cost("O(N·C)", "O(N·C)"),
    summary="a factor on each head's output: ablation, and importance as the gradient of the factor",
    small=_example,
)
class HeadScaling(Intervention):
    """Factors on the heads.

    Args:
      factors: `(L, H)` for the L layers of the model, or `(H,)` in each layer where it is attached.

    Raises:
      ValueError: for factors of another rank.
    """

    def __init__(self, factors: ArrayLike):
        factors = jnp.asarray(factors)
        if factors.ndim not in (1, 2):
            raise ValueError(f"factors must be (L, H) or (H,), got shape {factors.shape}")
        self.factors = Setting(factors)

    def heads(self, y: jax.Array, at: At, memory: Any) -> tuple[jax.Array, Any]:
        factors = self.factors[...]
        return scale_heads(y, factors[at.layer] if factors.ndim == 2 else factors), memory
