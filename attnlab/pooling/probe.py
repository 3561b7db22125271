"""The head with which frozen encoders are probed (Psomas et al., 2025, arXiv:2506.10178): pool, normalise, classify."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Pooling
from attnlab.nn.linear import Linear
from attnlab.nn.norms import BatchNorm


class Probe(nnx.Module):
    """Linear(BatchNorm(pooling(x))): tokens (B, N, C) to logits (B, classes).

    The batch normalisation has no scale and no bias (eps 1e-6): it makes one learning rate fit features of any size.

    Args:
      pooling: tokens to one vector; `MeanPooling` gives plain linear probing.
      num_classes: logits.
      dtype: of the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        pooling: Pooling,
        num_classes: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.pooling = pooling
        self.norm = BatchNorm(pooling.out_features, eps=1e-6, use_affine=False, **options)
        self.classifier = Linear(pooling.out_features, num_classes, axes=("embed", "vocab"), dtype=dtype, **options)

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """Logits. With `deterministic=False` the batch's statistics normalise, and update the running ones."""
        y = self.pooling(x, deterministic=deterministic)
        return self.classifier(self.norm(y, deterministic=deterministic))
