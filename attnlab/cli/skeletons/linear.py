"""SKELETON made by `attnlab new`: replace this toy by the mechanism, and take this line out.

Linear attention with the features φ(u) = softplus(u), in the library's axis names:

    y_i = φ(q_i) Σ_j φ(k_j)ᵀ v_j / (φ(q_i)·Σ_j φ(k_j))        j ≤ i if causal

Say here what the paper and the authors' code compute, where they differ, and the cost: O(N·C·D).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Pattern
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.linear_mixer import LinearMixer, Places, Recurrence
from attnlab.registry import Cost, Paper, Source, register

PAPER = Paper("Title of the paper", "First et al.", 2026)


def skeleton(u: ArrayLike) -> jax.Array:
    """Features of queries or keys (B, N, H, D), positive, in their dtype."""
    return jax.nn.softplus(u)


@register(
    "skeleton",
    paper=PAPER,
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N·C·D)", memory="O(N·C)", state="H·D·(D+1)"),
    kernel="linear_attention",
    summary="linear attention with softplus features (a toy)",
)
class Skeleton(LinearMixer):
    """Tokens (B, N, C) to (B, N, C). See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      causal: whether token i sees tokens up to i only.
      dtype: of the computation; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF, Pattern.SELF})
    permutation_equivariant = True
    normalize = True

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        causal: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % num_heads:
            raise ValueError(f"features {features} is not a multiple of num_heads {num_heads}")
        self.features, self.num_heads, self.causal, self.dtype = features, num_heads, causal, dtype
        self.key_size = self.value_size = features // num_heads
        common: Any = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = ToHeads(features, num_heads, self.key_size, **common)
        self.key = ToHeads(features, num_heads, self.key_size, **common)
        self.value = ToHeads(features, num_heads, self.value_size, **common)
        self.out = FromHeads(num_heads, self.value_size, features, **common)

    def project(self, x: jax.Array, source: jax.Array, at: Places, carry: Any) -> tuple[Recurrence, Any]:
        return Recurrence(skeleton(self.query(x)), skeleton(self.key(source)), self.value(source)), carry

    def merge(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return self.out(y)
