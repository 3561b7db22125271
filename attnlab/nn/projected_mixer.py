"""Mixers with the usual projections, around any core or recurrence.

q, k, v = x W_q, c W_k, c W_v             c the context; x itself in self-attention
y = concat_h(core(q, k, v)) W_o
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Given, Layout
from attnlab.nn.dense_mixer import DenseMixer, Heads, HeadSizes
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.linear_mixer import LinearMixer
from attnlab.nn.norms import RMSNorm


class ProjectedMixer(DenseMixer):
    """A dense mixer of tokens of any layout. A subclass gives the core, `set_core`, after this constructor.

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
      projection_dropout: rate on the result.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for sizes that do not fit.
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
        projection_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.sizes = groups, head_dim, value_dim = HeadSizes.of(features, num_heads, num_kv_heads, head_dim, value_dim)
        self.features, self.num_heads, self.causal, self.layout = features, num_heads, causal, Layout(layout)
        self.context_features, self.dtype, self.param_dtype = context_features, dtype, param_dtype
        source = features if context_features is None else context_features
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = ToHeads(features, num_heads, head_dim, use_bias=qkv_bias, **common)
        self.key = ToHeads(source, groups, head_dim, use_bias=qkv_bias, **common)
        self.value = ToHeads(source, groups, value_dim, use_bias=qkv_bias, **common)
        self.out = FromHeads(num_heads, value_dim, features, use_bias=out_bias, **common)
        self.query_norm = RMSNorm(head_dim, param_dtype=param_dtype, rngs=rngs) if qk_norm else nnx.data(None)
        self.key_norm = RMSNorm(head_dim, param_dtype=param_dtype, rngs=rngs) if qk_norm else nnx.data(None)
        self.dropout = nnx.Dropout(projection_dropout, rngs=rngs) if projection_dropout > 0 else nnx.data(None)

    def project(self, x: jax.Array, source: jax.Array, given: Given) -> Heads:
        q, k, v = self.query(x), self.key(source), self.value(source)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return Heads(q, k, v)

    def merge(self, y: jax.Array, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        y = self.out(y)
        return y if self.dropout is None else self.dropout(y, deterministic=deterministic)


class ProjectedLinearMixer(LinearMixer):
    """The same around a recurrence: `query`, `key`, `value` and `out`, for a subclass's `project` and `merge`.

    Args:
      features: channels C.
      num_heads: heads H.
      num_kv_heads: key and value heads G, a divisor of H; H when None.
      head_dim: D; C / H when None.
      value_dim: E; D when None.
      causal: whether token i sees tokens up to i only; images and videos go by row-major order.
      layout: of the tokens.
      context_features: channels of the context for cross-attention; C when None.
      use_bias: whether the four maps have a bias.
      out_bias: whether the last one has; as the others when None.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        causal: bool = True,
        layout: Layout = Layout.SEQUENCE,
        context_features: int | None = None,
        use_bias: bool = False,
        out_bias: bool | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        groups, head_dim, value_dim = HeadSizes.of(features, num_heads, num_kv_heads, head_dim, value_dim)
        self.features, self.num_heads, self.key_size, self.value_size = features, num_heads, head_dim, value_dim
        self.causal, self.layout, self.context_features = causal, Layout(layout), context_features
        self.dtype, self.param_dtype = dtype, param_dtype
        if causal and context_features is not None:
            self.accepts = self.accepts - {"segment_ids"}  # the op takes one array of ids when causal
        source = features if context_features is None else context_features
        common = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = ToHeads(features, num_heads, head_dim, **common)
        self.key = ToHeads(source, groups, head_dim, **common)
        self.value = ToHeads(source, groups, value_dim, **common)
        out_bias = use_bias if out_bias is None else out_bias
        self.out = FromHeads(num_heads, value_dim, features, **(common | {"use_bias": out_bias}))
