"""cosFormer: linear attention whose weights are a cosine of the distance (Qin et al., ICLR 2022, arXiv:2202.08791), as
the benchmark CAB (Zhang et al., ICML 2023, arXiv:2210.07661) has it.

    w_ij = relu(q_i)·relu(k_j) cos(π/2 (i - j) / M),   y_i = Σ_j w_ij v_j / max(Σ_j w_ij, 1e-6)

The cosine of a difference is a product of sines and cosines, so each query and key has 2D features,

    [relu(x) sin(π i / 2M), relu(x) cos(π i / 2M)],   i = 1, 2, …

M is the longer of the two sequences, or in packed segments each one's length. CAB forbids the causal form, which the
paper has. Ours needs M as `length`, since how long a sequence will be is not known at its start; tokens beyond it count
as the last place. Padding, which CAB's code does not mask, is masked, and does not count in M. Cost O(N·D·E) per head.

Code: Shark-NLP/CAB, after OpenNLPLab/cosFormer.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Pattern, Site, UnsupportedArgument
from attnlab.nn import feature_maps
from attnlab.nn.clamped_mixer import ClampedLinearMixer, with_total
from attnlab.nn.linear_mixer import Places, Recurrence
from attnlab.nn.prefix_scans import segment_max
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32


def cosine_features(x: ArrayLike, place: ArrayLike) -> jax.Array:
    """The features of a place.

    Args:
      x: φ(x), at least 0, `(B, N, H, D)`.
      place: i / M, `(1|B, N)` float, from 0 to 1.

    Returns:
      `(B, N, H, 2D)` in the dtype of `x`.
    """
    x = jnp.asarray(x)
    wide = x.astype(at_least_float32(x.dtype))
    angle = jnp.asarray(place, wide.dtype)[:, :, None, None] * (math.pi / 2)
    return jnp.concatenate([wide * jnp.sin(angle), wide * jnp.cos(angle)], axis=-1).astype(x.dtype)


@register(
    "cab.cosformer",
    paper=Paper("cosFormer: Rethinking Softmax in Attention", "Qin et al.", 2022, arxiv="2202.08791"),
    source=Source.AUTHORS_CODE,
    repository="Shark-NLP/CAB",
    cost=Cost(time="O(N·H·D·E)", memory="O(N·H·(D+E))", state="2·H·D·(E+1)"),
    kernel="linear_attention",
    summary="linear attention of rectified queries and keys, weighted by the cosine of their distance",
    small={"length": 12},
)
class CosformerAttention(ClampedLinearMixer):
    """Tokens (B, N, C) to (B, N, C). See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      causal: whether token i sees tokens up to i only; needs `length`.
      length: M, the longest sequence; that of the call when None.
      feature_map: name of the map to positive features, see `attnlab.nn.feature_maps`.
      least: bound of the denominator.
      rngs: stream `params`.
      **projections: sizes and biases of the heads, and context: see `ClampedLinearMixer`.

    Raises:
      ValueError: for sizes that do not fit, a causal form without length, or an unknown feature map.
    """

    patterns = frozenset({Pattern.SELF, Pattern.CAUSAL_SELF, Pattern.CROSS})
    independent_queries = False

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        causal: bool = False,
        length: int | None = None,
        feature_map: str = "relu",
        least: float = 1e-6,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        if causal and length is None:
            raise ValueError("causal cosFormer attention needs length: its weights depend on the longest sequence")
        if length is not None and length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        super().__init__(features, num_heads=num_heads, causal=causal, least=least, rngs=rngs, **projections)
        self.length, self.feature_map, self.key_size = length, feature_map, 2 * self.key_size
        feature_maps.feature_map(feature_map)
        if self.context_features is not None:
            self.accepts = self.accepts - {"segment_ids"}

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        """In a causal model the length of its sequences, where it fixes them."""
        return {"length": site.grid[0]} if site.causal and site.grid is not None else {}

    def check_decodes(self, cross: bool) -> None:
        if cross or self.context_features is not None:
            raise UnsupportedArgument("CosformerAttention does not decode attention to a context")
        super().check_decodes(cross)

    def project(self, x: jax.Array, source: jax.Array, at: Places, carry: Any) -> tuple[Recurrence, Any]:
        if isinstance(at.segment_ids, tuple):
            raise UnsupportedArgument("CosformerAttention takes segment_ids of one sequence, not of a pair")
        phi = feature_maps.feature_map(self.feature_map)
        of_queries, of_keys = self._places_of(at)
        q = cosine_features(phi(self.query(x)), of_queries)
        k = cosine_features(phi(self.key(source)), of_keys)
        return Recurrence(q, k, with_total(self.value(source))), carry

    def _places_of(self, at: Places) -> tuple[jax.Array, jax.Array]:
        queries, keys = ((place + 1).astype(jnp.float32) for place in (at.queries, at.keys))
        if self.length is not None:
            return jnp.minimum(queries / self.length, 1), jnp.minimum(keys / self.length, 1)
        counted = keys if at.real is None else jnp.where(at.real, keys, 1)
        longest = segment_max(counted, segment_ids=at.segment_ids)
        if at.real_queries is None and at.segment_ids is None:
            longest = jnp.maximum(longest, queries.max(1, keepdims=True))
        return queries / longest, keys / longest
