"""One softmax attention read in both directions: A v, what queries gather, and Aᵀ x, what keys are given back.

    A = softmax_j(scale · q_i·k_j);     (A v)_i = Σ_j A_ij v_j;     (Aᵀ x)_j = Σ_i A_ij x_i

Rows of A sum to 1, rows of Aᵀ do not. With a kernel neither is ever stored: Aᵀ x follows from the rows' log-sum-exp.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab.nn.softmax import attention_weights, weighted_values
from pallas_kernels.block_sparse_attention import block_sparse_attention, transposed_attention
from pallas_kernels.dtypes import at_least_float32


class TwoWayAttention(NamedTuple):
    """An attention map of queries `(B, N, H, D)` on keys `(B, M, H, D)`, itself or as what it follows from.

    Attributes:
      q: queries.
      k: keys.
      scale: of the scores.
      weights: A `(B, H, N, M)` in float32 (or wider); None with a kernel.
      lse: `(B, N, H)`, with a kernel.
      kernel: "auto" or the name of an implementation of `block_sparse_attention`, or None.
    """

    q: jax.Array
    k: jax.Array
    scale: float
    weights: jax.Array | None = None
    lse: jax.Array | None = None
    kernel: str | None = None

    def back(self, x: jax.Array) -> jax.Array:
        """Aᵀ x: rows of the queries `(B, N, H, E)` to those of the keys, `(B, M, H, E)`, in their dtype."""
        if self.weights is None:
            return transposed_attention(
                self.q, self.k, x.astype(self.q.dtype), self.lse, scale=self.scale, implementation=_named(self.kernel)
            )
        wide = at_least_float32(x.dtype)
        return jnp.einsum("bhnm,bnhe->bmhe", self.weights.astype(x.dtype), x, preferred_element_type=wide).astype(
            x.dtype
        )

    def all_weights(self) -> jax.Array:
        """A `(B, H, N, M)` in float32 (or wider)."""
        return attention_weights(self.q, self.k, scale=self.scale) if self.weights is None else self.weights


def two_way_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float | None = None, kernel: str | None = None
) -> tuple[jax.Array, TwoWayAttention]:
    """A v `(B, N, H, E)`, and the map to read the other way.

    Args:
      q: queries `(B, N, H, D)`.
      k: keys `(B, M, H, D)`.
      v: values `(B, M, H, E)`.
      scale: of the scores; D^-1/2 when None.
      kernel: "auto" or the name of an implementation of `pallas_kernels.block_sparse_attention`, by which no map is
        stored; dense when None.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if kernel is None:
        weights = attention_weights(q, k, scale=scale)
        return weighted_values(weights, v), TwoWayAttention(q, k, scale, weights)
    y, lse = block_sparse_attention(q, k, v, scale=scale, return_lse=True, implementation=_named(kernel))
    return y, TwoWayAttention(q, k, scale, None, lse, kernel)


def _named(kernel: str | None) -> str | None:
    return None if kernel == "auto" else kernel
