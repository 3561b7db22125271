"""Clamped linear attention of L2ViT (Zheng, 2025, arXiv:2501.16182): ReLU features, a bounded denominator.

With φ = ReLU, per head, and a learned temperature τ of each head (D^-1/2 at the start):

    y_i = τ φ(q_i) Σ_j φ(k_j) v_jᵀ / max(φ(q_i) · Σ_j φ(k_j), 100)

The bound is a least value of the denominator: a query that meets few keys reads less than a mean of values, and on
small maps most do. τ is a factor of the result and so does not cancel. The authors' code has both; a form that it keeps
as a comment bounds by 1 and has a fixed factor. Cost O(N·D²) per head; without the local concentration of its blocks
(`attnlab.models.l2vit`) a set of tokens is all that it sees.

The causal form, over the tokens up to each one, cross-attention and masks are our extension. The denominator is carried
as one more channel of the values, of ones, so that decoding needs the state of plain linear attention.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, Pattern
from attnlab.nn.feature_maps import relu
from attnlab.nn.linear_mixer import Places, Recurrence
from attnlab.nn.projected_mixer import ProjectedLinearMixer
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.linear_attention import linear_attention

PAPER = Paper("The Linear Attention Resurrection in Vision Transformer", "Zheng", 2025, arxiv="2501.16182", number=2)


def clamped_linear_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, temperature: ArrayLike, *, least: float = 100.0, causal: bool = False
) -> jax.Array:
    """y_i = τ q_i Σ_j k_j v_jᵀ / max(q_i · Σ_j k_j, least).

    Args:
      q: features of queries, at least 0, `(B, N, H, D)`.
      k: features of keys, `(B, M, H, D)`; M = N if causal.
      v: values, `(B, M, H, E)`.
      temperature: τ of each head, `(H,)`.
      least: bound of the denominator, above 0.
      causal: query i reads keys j ≤ i.

    Returns:
      `(B, N, H, E)` in the dtype of `q`.
    """
    return _divided(linear_attention(q, k, _with_ones(v), causal=causal), temperature, least)


def _with_ones(v: ArrayLike) -> jax.Array:
    v = jnp.asarray(v)
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)


def _divided(y: jax.Array, temperature: ArrayLike, least: float) -> jax.Array:
    """From sums `(…, H, E + 1)`, the last of ones, to `(…, H, E)`."""
    wide = y.astype(at_least_float32(y.dtype))
    tau = jnp.asarray(temperature, wide.dtype)[:, None]
    return (tau * wide[..., :-1] / jnp.maximum(wide[..., -1:], least)).astype(y.dtype)


@register(
    "l2vit",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="ChuanyangZheng/L2ViT",
    cost=Cost(time="O(N·C·D)", memory="O(C·D)", state="H·D·(E+1)"),
    kernel="linear_attention",
    summary="ReLU linear attention with a denominator of at least 100 and a temperature of each head",
    small={"least": 1.0},
)
class ClampedLinearAttention(ProjectedLinearMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      causal: whether token i sees tokens up to i only.
      least: bound of the denominator, above 0.
      qkv_bias: whether the maps to queries, keys and values have a bias; the last map has.
      rngs: stream `params`.
      **projections: sizes of the heads, layout, context and dtypes: see `ProjectedLinearMixer`.

    Raises:
      ValueError: for sizes that do not fit, or a bound that is not positive.
    """

    patterns = frozenset(Pattern)
    layouts = frozenset(Layout)
    permutation_equivariant = True

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        causal: bool = False,
        least: float = 100.0,
        qkv_bias: bool = False,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        if least <= 0:
            raise ValueError(f"least must be positive, got {least}")
        options = {"out_bias": True, **projections, "num_heads": num_heads, "causal": causal, "use_bias": qkv_bias}
        super().__init__(features, **options, rngs=rngs)
        self.least = least
        self.temperature = nnx.Param(
            jnp.full((num_heads,), self.key_size**-0.5, self.param_dtype), logical_axes=("heads",)
        )
        self.value_size += 1  # the denominator is carried beside the values

    def project(self, x: jax.Array, source: jax.Array, at: Places, carry: Any) -> tuple[Recurrence, Any]:
        return Recurrence(relu(self.query(x)), relu(self.key(source)), _with_ones(self.value(source))), carry

    def merge(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return self.out(_divided(y, self.temperature[...], self.least))

    def _map(self, parts: Recurrence, segment_ids: Any) -> jax.Array:
        weights = super()._map(parts, segment_ids)
        factor = self.temperature[...].astype(weights.dtype)[:, None, None]
        return factor * weights / jnp.maximum(weights.sum(-1, keepdims=True), self.least)
