"""Poolings without parameters: the mean of the tokens, and the first token."""

from typing import Any

import jax
from flax import nnx

from attnlab.contract import Pooling
from attnlab.pooling.parts import token_mean


class MeanPooling(Pooling):
    """Tokens (B, N, C) to their mean (B, C), summed in float32.

    Args:
      features: channels C of the tokens.
      dtype: of the result; that of the tokens when None.
      rngs: not needed, taken so that every pooling is built alike.
    """

    def __init__(self, features: int, *, dtype: Any = None, rngs: nnx.Rngs | None = None):
        self.features, self.out_features, self.dtype = features, features, dtype

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        return token_mean(x, mask)


class FirstToken(MeanPooling):
    """Tokens (B, N, C) to the first of them (B, C): the class token of a model that has one."""

    accepts = frozenset()

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        return x[:, 0]
