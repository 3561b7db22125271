"""Softmax attention (Vaswani et al., 2017, arXiv:1706.03762, section 3.2).

    q, k, v = x W_q, c W_k, c W_v             c the context; x itself in self-attention
    y = concat_h(softmax(q_h k_hᵀ / √D) v_h) W_o

What later work added is optional: grouped key and value heads (Ainslie et al., 2023, arXiv:2305.13245), normed queries
and keys (Dehghani et al., 2023, arXiv:2302.05442; RMSNorm here), rotary positions (Su et al., 2021, arXiv:2104.09864)
along one, two or three axes, and ALiBi (Press et al., 2022, arXiv:2108.12409). Cost O(N·M·(D+E)) per head. Where the
paper masks by -∞, a query without any key gives zeros.

The operator is `attnlab.nn.softmax.softmax_attention`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Given, Layout
from attnlab.nn.dense_mixer import DenseMixer, Heads, HeadSizes
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.norms import RMSNorm
from attnlab.nn.positions import Rotary
from attnlab.nn.softmax_core import SoftmaxCore
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.masks import Mask


@register(
    "softmax_attention",
    paper=Paper("Attention Is All You Need", "Vaswani et al.", 2017, arxiv="1706.03762"),
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N·M·H·(D+E))", memory="O(N·M·H), with block_size O(N·H·(D+E))", state="M·G·(D+E)"),
    summary="every query weighs every value by the softmax of its scaled products with the keys",
)
class SoftmaxAttention(DenseMixer):
    """Tokens of any layout to the same shape; see the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: query heads H.
      num_kv_heads: key and value heads G, a divisor of H; H when None.
      head_dim: D; C / H when None.
      value_dim: E; D when None.
      causal: whether query i sees keys j ≤ i only.
      layout: of the tokens.
      context_features: channels of the context, for a module that needs one; without it, self-attention, or
        cross-attention to a context of C channels.
      qkv_bias: whether the maps to queries, keys and values have a bias.
      out_bias: whether the last map has a bias.
      qk_norm: whether queries and keys pass an RMSNorm over D.
      rotary: rotary positions along the axes of the layout, or theta for `Rotary(theta)`.
      rotate_keys: whether `rotary` turns keys too, not queries alone.
      alibi: whether scores fall with the distance; for sequences.
      structural_mask: a rule on indices, such as `pallas_kernels.masks.SlidingWindow(127, 0)`.
      scale: of the scores; D^-1/2 when None.
      softcap: bound of the scores by tanh; none when None.
      attention_dropout: rate on the weights.
      projection_dropout: rate on the result.
      block_size: keys per block, for memory linear in M; all at once when None.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for sizes that do not fit, or options that exclude each other.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        causal: bool = False,
        layout: Layout = Layout.SEQUENCE,
        context_features: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        qk_norm: bool = False,
        rotary: Rotary | float | None = None,
        rotate_keys: bool = True,
        alibi: bool = False,
        structural_mask: Mask | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        block_size: int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.sizes = groups, head_dim, value_dim = HeadSizes.of(features, num_heads, num_kv_heads, head_dim, value_dim)
        self.features, self.num_heads, self.causal, self.layout = features, num_heads, causal, Layout(layout)
        self.context_features, self.dtype = context_features, dtype
        source = features if context_features is None else context_features
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = ToHeads(features, num_heads, head_dim, use_bias=qkv_bias, **common)
        self.key = ToHeads(source, groups, head_dim, use_bias=qkv_bias, **common)
        self.value = ToHeads(source, groups, value_dim, use_bias=qkv_bias, **common)
        self.out = FromHeads(num_heads, value_dim, features, use_bias=out_bias, **common)
        self.query_norm = RMSNorm(head_dim, param_dtype=param_dtype, rngs=rngs) if qk_norm else nnx.data(None)
        self.key_norm = RMSNorm(head_dim, param_dtype=param_dtype, rngs=rngs) if qk_norm else nnx.data(None)
        self.dropout = nnx.Dropout(projection_dropout, rngs=rngs) if projection_dropout > 0 else nnx.data(None)
        self.set_core(
            SoftmaxCore(
                num_heads,
                rotary=rotary,
                rotate_keys=rotate_keys,
                alibi=alibi,
                structural_mask=structural_mask,
                scale=scale,
                softcap=softcap,
                dropout=attention_dropout,
                block_size=block_size,
                rngs=rngs,
            )
        )

    def project(self, x: jax.Array, source: jax.Array, given: Given) -> Heads:
        q, k, v = self.query(x), self.key(source), self.value(source)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return Heads(q, k, v)

    def merge(self, y: jax.Array, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        y = self.out(y)
        return y if self.dropout is None else self.dropout(y, deterministic=deterministic)
