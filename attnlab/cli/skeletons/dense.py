"""SKELETON made by `attnlab new`: replace this toy by the mechanism, and take this line out.

Softmax attention with a learned temperature for each head, in the library's axis names:

    Y = softmax(exp(t_h) Q Kᵀ / √D) V        t (H,), 0 at the start

Say here what the paper and the authors' code compute, where they differ, and the cost: O(N·M·C).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout
from attnlab.nn.dense_mixer import DenseMixer, Heads, HeadSizes
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.rotary import Rotary
from attnlab.nn.softmax_core import SoftmaxCore
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper("Title of the paper", "First et al.", 2026)


def skeleton(q: ArrayLike, temperature: ArrayLike) -> jax.Array:
    """Queries with the temperature of their head.

    Args:
      q: queries, (B, N, H, D).
      temperature: its logarithm for each head, (H,).

    Returns:
      (B, N, H, D) in the dtype of `q`.
    """
    q = jnp.asarray(q)
    return q * jnp.exp(jnp.asarray(temperature, at_least_float32(q.dtype)))[:, None].astype(q.dtype)


@register(
    "skeleton",
    paper=PAPER,
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N·M·C)", memory="O(N·M·H)", state="2·M·C"),
    summary="softmax attention with a learned temperature for each head (a toy)",
)
class Skeleton(DenseMixer):
    """Tokens (B, N, C) to (B, N, C). See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      causal: whether token i sees tokens up to i only.
      layout: of the tokens.
      context_features: channels of the context for cross-attention; None for self-attention.
      rotary: rotary positions, as options or as their base alone; none when None.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        causal: bool = False,
        layout: Layout = Layout.SEQUENCE,
        context_features: int | None = None,
        rotary: Rotary | float | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.sizes = HeadSizes.of(features, num_heads)
        self.features, self.causal, self.layout = features, causal, Layout(layout)
        self.context_features, self.dtype = context_features, dtype
        source, head_dim = features if context_features is None else context_features, self.sizes.key_size
        common: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = ToHeads(features, num_heads, head_dim, **common)
        self.key = ToHeads(source, num_heads, head_dim, **common)
        self.value = ToHeads(source, num_heads, head_dim, **common)
        self.out = FromHeads(num_heads, head_dim, features, **common)
        self.temperature = nnx.Param(jnp.zeros((num_heads,), param_dtype), logical_axes=("heads",))
        self.set_core(SoftmaxCore(num_heads, rotary=rotary))

    def project(self, x: jax.Array, source: jax.Array, given: Given) -> Heads:
        return Heads(skeleton(self.query(x), self.temperature[...]), self.key(source), self.value(source))

    def merge(self, y: jax.Array, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        return self.out(y)
