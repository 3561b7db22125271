"""Bidirectional cross-attention of LookupViT: few tokens gather from many, and give back by the same map (ECCV 2024).

Few compressed tokens P `(M)` and many lookup tokens L `(N)` (arXiv:2407.12753):

    A = softmax over N of (P W_q)(L W_k)^T / √D
    gathered = A (L W_v) W_o                      M tokens, added to P
    infused  = A^T (P' W_v') W_o'                 N tokens, added to L; P' is what became of P in between

The map is computed once. Read backwards its rows do not sum to 1, unless `renorm="softmax"` normalises the scores over
M instead. Cost O(N·M·C), no N². Written from the paper's abstract and the description of its blocks: no code of the
authors is public. `attnlab.models.lookupvit` is built of it.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import record
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.softmax import softmax_attention
from attnlab.nn.two_way_attention import TwoWayAttention, two_way_attention


class LookupAttention(nnx.Module):
    """Gathering and infusion with one attention map; see the module docstring for the equations.

    Args:
      features: channels C of both streams.
      num_heads: heads H.
      renorm: `"none"`, the map is read backwards as it is, or `"softmax"`, its scores are normalised over the
        compressed tokens then.
      kernel: `pallas_kernels.block_sparse_attention` in the place of a stored map: "auto", or the name of an
        implementation; dense when None.
      dtype: of the computation; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the heads do not divide the channels, or for another renorm.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        renorm: Literal["none", "softmax"] = "none",
        kernel: str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
        if renorm not in ("none", "softmax"):
            raise ValueError(f"renorm must be 'none' or 'softmax', got {renorm!r}")
        self.renorm, self.kernel, self.dtype = renorm, kernel, dtype
        size, common = features // num_heads, {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query, self.key, self.value, self.back_value = (
            ToHeads(features, num_heads, size, **common) for _ in range(4)
        )
        self.out, self.back_out = (FromHeads(num_heads, size, features, **common) for _ in range(2))

    def gather(self, compressed: ArrayLike, lookup: ArrayLike) -> tuple[jax.Array, TwoWayAttention]:
        """What compressed tokens `(B, M, C)` gather from lookup tokens `(B, N, C)`, both normed, and the map.

        The map `(B, H, M, N)` is recorded as `"attention"`.
        """
        compressed = jnp.asarray(compressed, self.dtype)
        lookup = jnp.asarray(lookup, compressed.dtype)
        q, k, v = self.query(compressed), self.key(lookup), self.value(lookup)
        y, ways = two_way_attention(q, k, v, kernel=self.kernel)
        record(self, "attention", ways.all_weights)
        return self.out(y), ways

    def infuse(self, compressed: ArrayLike, ways: TwoWayAttention) -> jax.Array:
        """What lookup tokens `(B, N, C)` are given by compressed tokens `(B, M, C)`, normed, along the map."""
        v = self.back_value(jnp.asarray(compressed, self.dtype))
        if self.renorm == "softmax":
            return self.back_out(softmax_attention(ways.k, ways.q, v, scale=ways.scale))
        return self.back_out(ways.back(v))
