"""The normal form of the arguments of neighborhood attention, which every implementation reads."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.neighborhood_attention.windows import Window

FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Checked arguments in one form; *S stands for 1, 2 or 3 axes of tokens.

    Attributes:
      q: (B, *S, H, D), float.
      k: (B, *S, G, D), dtype of q; G divides H, and query head h reads key head h // (H / G).
      v: (B, *S, G, E), dtype of q.
      bias: (H, 2k-1, …) with one axis per axis of tokens, float, or None.
      additional_keys: (B, A, G, D), dtype of q, or None.
      additional_values: (B, A, G, E), dtype of q; None with `additional_keys`.
      key_mask: (B, *S), bool, which of the keys k exist, or None for all.
      windows: one per axis of tokens.
      scale: of the scores.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    additional_keys: jax.Array | None
    additional_values: jax.Array | None
    key_mask: jax.Array | None
    windows: tuple[Window, ...]
    scale: float

    @property
    def accumulator(self) -> jnp.dtype:
        """Dtype of scores and sums: float64 for float64 inputs, float32 otherwise."""
        return at_least_float32(self.q.dtype)

    @property
    def precision(self) -> jax.lax.Precision:
        """Half-precision inputs are exact in one pass of a matrix unit; wider ones need all passes."""
        return jax.lax.Precision.DEFAULT if self.q.dtype.itemsize <= 2 else jax.lax.Precision.HIGHEST


# Arrays are leaves, so Arguments can cross jit, grad and vmap; what remains is static.
jax.tree_util.register_dataclass(
    Arguments,
    data_fields=["q", "k", "v", "bias", "additional_keys", "additional_values", "key_mask"],
    meta_fields=["windows", "scale"],
)
