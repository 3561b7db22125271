"""SKELETON made by `attnlab new`: replace this toy by the mechanism, and take this line out.

Each token gates the mean of all tokens, in the library's axis names:

    y_i = (σ(x_i W_g) ⊙ mean_j (x_j W_v)) W_o

Say here what the paper and the authors' code compute, where they differ, and the cost: O(N·C²).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, Pattern, TokenMixer
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper("Title of the paper", "First et al.", 2026)


def skeleton(values: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    """Mean over the tokens that exist; zeros where none exists.

    Args:
      values: (B, N, H, E).
      mask: (B, N), which tokens exist; all when None.

    Returns:
      (B, 1, H, E) in the dtype of `values`; computed in float32.
    """
    values = jnp.asarray(values)
    wide = at_least_float32(values.dtype)
    exists = jnp.ones(values.shape[:2], wide) if mask is None else jnp.asarray(mask).astype(wide)
    weights = exists / jnp.maximum(exists.sum(1, keepdims=True), 1)
    return jnp.einsum("bn,bnhe->bhe", weights, values.astype(wide))[:, None].astype(values.dtype)


@register(
    "skeleton",
    paper=PAPER,
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N·C²)", memory="O(N·C)"),
    summary="each token gates the mean of all tokens (a toy)",
)
class Skeleton(TokenMixer):
    """Tokens (B, N, C) to (B, N, C). See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    patterns = frozenset({Pattern.SELF})
    layouts = frozenset({Layout.SEQUENCE})
    accepts = frozenset({"key_mask"})
    permutation_equivariant = True

    def __init__(
        self, features: int, *, num_heads: int, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        if features % num_heads:
            raise ValueError(f"features {features} is not a multiple of num_heads {num_heads}")
        self.features, self.dtype, head_dim = features, dtype, features // num_heads
        common: Any = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.gate = ToHeads(features, num_heads, head_dim, **common)
        self.value = ToHeads(features, num_heads, head_dim, **common)
        self.out = FromHeads(num_heads, head_dim, features, **common)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        return self.out(jax.nn.sigmoid(self.gate(x)) * skeleton(self.value(x), given.mask))
