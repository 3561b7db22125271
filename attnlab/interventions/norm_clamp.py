"""Clamped norms of what a feed-forward writes (Wong et al., 2025, arXiv:2512.22213): sinks made weaker or stronger.

A feed-forward of a middle layer turns a token into a sink by writing along the direction u of the primary sink's
stream, and the norm of what it writes decides how much attention the token draws and for how many layers. Where the
cosine of u and of the feed-forward's output y is above a threshold, the output gets another norm:

    y' = y · norm / |y|   if cos(y, u) > 0.98 and the token is not among the first; else y' = y

Reference: JeffreyWong20/Secondary-Attention-Sinks, `prefill_steering_meansure`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.points import At, Intervention, Setting
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32


def clamp_norm(
    y: jax.Array, direction: ArrayLike, allowed: ArrayLike, *, norm: ArrayLike, threshold: float
) -> jax.Array:
    """Rows `(B, N, C)` aligned with `direction` `(C,)` get the norm, where `allowed` `(B|1, N)`; in their dtype."""
    wide = y.astype(at_least_float32(y.dtype))
    u = jnp.asarray(direction, wide.dtype)
    squared = jnp.square(wide).sum(-1)
    size = jnp.sqrt(jnp.where(squared > 0, squared, 1))
    aligned = wide @ u > threshold * size * jnp.linalg.norm(u)
    scale = jnp.where(jnp.asarray(allowed) & aligned & (squared > 0), jnp.asarray(norm, wide.dtype) / size, 1)
    return (wide * scale[..., None]).astype(y.dtype)


def _example() -> Example:
    from attnlab.interventions.examples import small_language_model
    from attnlab.points import attach

    tokens, model = small_language_model()
    clamp = NormClamp(jnp.ones(8), norm=3.0, threshold=0.1, spared=1)
    return Example(attach(model, clamp, layers=(0,)), (tokens,), differentiable=())


@register(
    "secondary_sinks.norm_clamp",
    kind=Kind.INTERVENTION,
    paper=Paper(
        "On the Existence and Behaviour of Secondary Attention Sinks", "Wong et al.", 2025, "2512.22213", number=162
    ),
    source=Source.PAPER_TEXT,
    cost=Cost("O(N·C)", "O(N)"),
    summary="gives what a feed-forward writes along the primary sink another norm",
    small=_example,
)
class NormClamp(Intervention):
    """The clamp, for the layers where it is attached.

    Args:
      direction: u, `(C,)`: what the feed-forward, or the stream, holds at the primary sink.
      norm: of the clamped rows.
      threshold: of the cosine.
      spared: so many first tokens of a sequence are left as they are.

    Raises:
      ValueError: for a direction that is no vector.
    """

    def __init__(self, direction: ArrayLike, *, norm: ArrayLike = 100.0, threshold: float = 0.98, spared: int = 3):
        direction = jnp.asarray(direction)
        if direction.ndim != 1:
            raise ValueError(f"direction must be (C,), got shape {direction.shape}")
        self.direction, self.norm = Setting(direction), Setting(jnp.asarray(norm, jnp.float32))
        self.threshold, self.spared = threshold, spared

    def mlp(self, y: jax.Array, at: At, memory: Any) -> tuple[jax.Array, Any]:
        place = jnp.arange(y.shape[1])[None] if at.order is None else at.order
        allowed = place >= self.spared
        direction, norm = self.direction[...], self.norm[...]
        return clamp_norm(y, direction, allowed, norm=norm, threshold=self.threshold), memory
