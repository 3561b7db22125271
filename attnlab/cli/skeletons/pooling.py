"""SKELETON made by `attnlab new`: replace this toy by the mechanism, and take this line out.

One learned query reads the tokens:

    a = softmax_n(q xᵀ / √C)   (B, N)        y = a x   (B, C)

Say here what the paper and the authors' code compute, where they differ, and the cost: O(N·C).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Pooling, record
from attnlab.nn.masking import masked_softmax
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper("Title of the paper", "First et al.", 2026)


def skeleton(x: ArrayLike, query: ArrayLike, mask: ArrayLike | None = None) -> tuple[jax.Array, jax.Array]:
    """Tokens as a query sees them.

    Args:
      x: tokens, (B, N, C).
      query: (C,).
      mask: (B, N), which tokens exist; all when None.

    Returns:
      (B, C) in the dtype of `x`, and the weights (B, N) in float32; zeros where no token exists.
    """
    x = jnp.asarray(x)
    wide = at_least_float32(x.dtype)
    scores = jnp.einsum("bnc,c->bn", x.astype(wide), jnp.asarray(query, wide)) * x.shape[-1] ** -0.5
    weights = masked_softmax(scores, mask)
    return jnp.einsum("bn,bnc->bc", weights, x.astype(wide)).astype(x.dtype), weights


@register(
    "skeleton",
    paper=PAPER,
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N·C)", memory="O(N)"),
    summary="one learned query reads the tokens (a toy)",
)
class Skeleton(Pooling):
    """Tokens (B, N, C) to one vector (B, C). See the module docstring for the equations.

    Args:
      features: channels C of the tokens.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(self, features: int, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.features = self.out_features = features
        self.dtype = dtype
        query = jax.random.normal(rngs.params(), (features,), param_dtype)
        self.query = nnx.Param(query, logical_axes=("embed",))

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        y, weights = skeleton(x, self.query[...], mask)
        record(self, "attention", lambda: weights[:, None, None])
        return y
