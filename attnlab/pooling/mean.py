"""Poolings without parameters: the mean of the tokens, and the first token."""

from typing import Any

import jax
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Pooling
from attnlab.pooling.parts import mean


class MeanPooling(Pooling):
    """Tokens (B, N, C) to their mean (B, C), summed in float32.

    Args:
      features: channels C of the tokens.
      dtype: of the result; that of the tokens when None.
      rngs: not needed, taken so that every pooling is built alike.
    """

    def __init__(self, features: int, *, dtype: Any = None, rngs: nnx.Rngs | None = None):
        self.features, self.out_features, self.dtype = features, features, dtype

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        return mean(self.check_call(x), 1)


class FirstToken(MeanPooling):
    """Tokens (B, N, C) to the first of them (B, C): the class token of a model that has one."""

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        return self.check_call(x)[:, 0]
