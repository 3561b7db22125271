"""SKELETON made by `attnlab new`: replace this toy by the mechanism, and take this line out.

What each head hands on is multiplied by a factor, without training. In use:

    quieter = attach(model, Skeleton(0.5), layers=(0, 1))

Say here what the paper and the authors' code edit, and where they differ.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.models.vit import ViT
from attnlab.points import At, Intervention, Setting, attach
from attnlab.registry import Cost, Example, Kind, Paper, Source, register

PAPER = Paper("Title of the paper", "First et al.", 2026)


def _example() -> Example:
    model = ViT((8, 8), 3, patch_size=4, features=8, depth=1, num_heads=2, rngs=nnx.Rngs(0))
    return Example(attach(model, Skeleton(0.5)), (jax.random.normal(jax.random.key(0), (2, 8, 8, 3)),))


@register(
    "skeleton",
    kind=Kind.INTERVENTION,
    paper=PAPER,
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N·C)", memory="O(1)"),
    summary="what the heads hand on is multiplied by a factor (a toy)",
    small=_example,
)
class Skeleton(Intervention):
    """Scales heads; see the module docstring.

    Args:
      factor: one number for all heads, or (H,).
    """

    def __init__(self, factor: ArrayLike):
        self.factor = Setting(jnp.asarray(factor))

    def heads(self, value: jax.Array, at: At, memory: Any) -> tuple[jax.Array, Any]:
        """The heads (B, N, H, E), scaled; nothing is remembered."""
        return value * jnp.broadcast_to(self.factor[...], value.shape[2:3])[:, None], memory
