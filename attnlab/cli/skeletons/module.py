"""SKELETON made by `attnlab new`: replace this toy by the mechanism, and take this line out.

Two streams, each moved by the gated mean of the other:

    a_i' = a_i + σ(a_i W_g) ⊙ mean_j b_j        b_i' = b_i + σ(b_i W_g) ⊙ mean_j a_j

Say here what the paper and the authors' code compute, where they differ, and the cost.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.linear import Linear
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper("Title of the paper", "First et al.", 2026)


def skeleton(x: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    """Mean (B, 1, C) over the tokens (B, N, C) that exist, (B, N) of `mask`; zeros where none exists."""
    x = jnp.asarray(x)
    wide = at_least_float32(x.dtype)
    exists = jnp.ones(x.shape[:2], wide) if mask is None else jnp.asarray(mask).astype(wide)
    weights = exists / jnp.maximum(exists.sum(1, keepdims=True), 1)
    return jnp.einsum("bn,bnc->bc", weights, x.astype(wide))[:, None].astype(x.dtype)


def _example() -> Example:
    a, b = jax.random.normal(jax.random.key(0), (2, 5, 8)), jax.random.normal(jax.random.key(1), (2, 3, 8))
    return Example(Skeleton(8, rngs=nnx.Rngs(0)), (a, b), batched=(0, 1), differentiable=(0, 1))


@register(
    "skeleton",
    kind=Kind.MODULE,
    paper=PAPER,
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N·C²)", memory="O(N·C)"),
    summary="two streams, each moved by the gated mean of the other (a toy)",
    small=_example,
)
class Skeleton(nnx.Module):
    """Streams (B, N, C) and (B, M, C) to streams of the same shapes. See the module docstring for the equations.

    Args:
      features: channels C of both streams.
      dtype: of the computation and the results; that of the streams when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(self, features: int, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.dtype = dtype
        self.gate = Linear(features, features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        a: ArrayLike,
        b: ArrayLike,
        *,
        masks: tuple[ArrayLike | None, ArrayLike | None] = (None, None),
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """Moves both streams; `masks` (B, N) and (B, M) say which tokens exist, all where None."""
        a, b = jnp.asarray(a, self.dtype), jnp.asarray(b, self.dtype)
        of_a, of_b = skeleton(a, masks[0]), skeleton(b, masks[1])
        return a + jax.nn.sigmoid(self.gate(a)) * of_b, b + jax.nn.sigmoid(self.gate(b)) * of_a
