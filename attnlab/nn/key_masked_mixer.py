"""A mixer of sequences with the usual projections and no scores of pairs: it knows which tokens exist, and no more.

    q, k, v = x W_q, c W_k, c W_v             c the context; x itself in self-attention
    y = attend(q, k, v) W_o

A mechanism writes `attend`. Points, sizes, biases and the key mask are here.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Given, TokenMixer
from attnlab.nn.dense_mixer import Heads, HeadSizes
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.points import visit


class KeyMaskedMixer(TokenMixer):
    """Base of such mixers.

    Args:
      features: channels C.
      num_heads: heads H.
      head_dim: D; C / H when None.
      value_dim: E; D when None.
      context_features: channels of the context for cross-attention; C when None.
      qkv_bias: whether the maps to queries, keys and values have a bias.
      out_bias: whether the last map has a bias.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    accepts = frozenset({"key_mask"})
    points = frozenset({"qkv", "heads"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        value_dim: int | None = None,
        context_features: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _, self.key_size, self.value_size = HeadSizes.of(features, num_heads, None, head_dim, value_dim)
        self.features, self.num_heads, self.dtype = features, num_heads, dtype
        self.context_features = context_features
        source = features if context_features is None else context_features
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = ToHeads(features, num_heads, self.key_size, use_bias=qkv_bias, **common)
        self.key = ToHeads(source, num_heads, self.key_size, use_bias=qkv_bias, **common)
        self.value = ToHeads(source, num_heads, self.value_size, use_bias=qkv_bias, **common)
        self.out = FromHeads(num_heads, self.value_size, features, use_bias=out_bias, **common)

    def project(self, x: jax.Array, source: jax.Array) -> Heads:
        """Heads of the tokens `(B, N, C)` and of those `(B, M, C')` that are read."""
        return Heads(self.query(x), self.key(source), self.value(source))

    def attend(self, heads: Heads, given: Given) -> jax.Array:
        """`(B, N, H, E)`; `given.mask` `(B, M)` says which keys exist."""
        raise NotImplementedError

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        source = x if given.context is None else given.context
        heads = visit(self, given.edits, "qkv", self.project(x, source))
        return self.out(visit(self, given.edits, "heads", self.attend(heads, given)).astype(x.dtype))
