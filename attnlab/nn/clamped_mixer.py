"""Linear attention whose denominator is clamped from below.

    y_i = Σ_j φ(q_i)·φ(k_j) v_j / max(Σ_j φ(q_i)·φ(k_j), least)

The sum of the weights is one more channel of the values, so numerator and denominator are one recurrence.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.linear_mixer import Recurrence
from attnlab.nn.projected_mixer import ProjectedLinearMixer
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.linear_attention import linear_attention


def with_total(v: ArrayLike) -> jax.Array:
    """Values `(B, M, H, E)` with a channel of ones behind them, `(B, M, H, E + 1)`."""
    v = jnp.asarray(v)
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)


def over_total(y: jax.Array, least: float) -> jax.Array:
    """Sums `(B, N, H, E + 1)` over their last channel, `(B, N, H, E)` in their dtype."""
    wide = y.astype(at_least_float32(y.dtype))
    return (wide[..., :-1] / jnp.maximum(wide[..., -1:], least)).astype(y.dtype)


def clamped_linear_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, least: float, causal: bool = False, log_decay: ArrayLike | None = None
) -> jax.Array:
    """The equation above, of features.

    Args:
      q: φ(q), `(B, N, H, F)`.
      k: φ(k), `(B, M, H, F)`.
      v: `(B, M, H, E)`.
      least: bound of the denominator.
      causal: whether query i reads keys j ≤ i.
      log_decay: as in `linear_attention`; causal only.

    Returns:
      `(B, N, H, E)` in the dtype of `q`.
    """
    return over_total(linear_attention(q, k, with_total(v), causal=causal, log_decay=log_decay), least)


class ClampedLinearMixer(ProjectedLinearMixer):
    """A `ProjectedLinearMixer` whose `project` gives values `with_total`.

    Args:
      features: channels C.
      num_heads: heads H.
      least: bound of the denominator.
      causal: whether token i sees tokens up to i only.
      qkv_bias: whether the maps to queries, keys and values have a bias; the last map has.
      rngs: stream `params`.
      **projections: see `ProjectedLinearMixer`.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        least: float,
        causal: bool = False,
        qkv_bias: bool = True,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        options = {"out_bias": True, **projections, "causal": causal, "use_bias": qkv_bias}
        super().__init__(features, num_heads=num_heads, **options, rngs=rngs)
        if not least > 0:
            raise ValueError(f"least must be above 0, got {least}")
        self.least, self.value_size = least, self.value_size + 1

    def merge(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return self.out(over_total(y, self.least))

    def _map(self, parts: Recurrence, segment_ids: Any) -> jax.Array:
        weights = super()._map(parts, segment_ids)
        return weights / jnp.maximum(weights.sum(-1, keepdims=True), self.least)
