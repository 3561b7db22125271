"""Multi-head attention between tokens of different sources, each with a width of its own.

    q = (x + p_x) W_q,  k = (s + p_s) W_k,  v = t W_v,      y = softmax(scale · q kᵀ + bias) v W_o

x are the queries' tokens, s the keys', t the values' (those of the keys unless given); positions p go to queries and
keys alone. Few queries that read many tokens, class attention, and the layers of a decoder are cases of it. It is for
modules with streams of their own; the mixer of one stream is `attention.dense.softmax_attention`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import record
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.norms import LayerNorm
from attnlab.nn.softmax import attention_weights, softmax_attention


class CrossAttention(nnx.Module):
    """Queries `(B, N, C)` read keys and values `(B, M, ·)`; see the module docstring for the equations.

    Args:
      features: channels C of the queries.
      num_heads: heads H.
      key_features: channels of the keys' tokens; C when None.
      value_features: channels of the values' tokens; those of the keys' when None.
      out_features: channels of the result; C when None.
      head_dim: D of queries and keys; C / H when None.
      value_dim: head size of the values; D when None.
      use_bias: whether the maps to queries and values have a bias.
      key_bias: whether the map to keys has one; as `use_bias` when None.
      out_bias: whether the last map has one.
      qk_norm: layer normalisation of queries and keys in each head, eps 1e-5.
      scale: of the scores; D^-1/2 when None.
      dropout: rate on the weights, in training.
      block_size: keys per block, for memory linear in M; all at once when None.
      kernel_init: of the three maps before the attention; normal with variance 1 / channels unless given.
      out_init: of the map after it; as `kernel_init` when None.
      dtype: of the computation and the result; that of the queries when None.
      param_dtype: of the parameters.
      rngs: stream `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the heads do not divide the channels and there is no `head_dim`, or for a dropout out of [0, 1), or
        together with `block_size`.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        key_features: int | None = None,
        value_features: int | None = None,
        out_features: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        use_bias: bool = True,
        key_bias: bool | None = None,
        out_bias: bool = True,
        qk_norm: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        block_size: int | None = None,
        kernel_init: nnx.Initializer | None = None,
        out_init: nnx.Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if head_dim is None and features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}; or give head_dim")
        if not 0 <= dropout < 1 or (dropout and block_size is not None):
            raise ValueError(f"dropout must be in [0, 1), and 0 with a block_size, got {dropout}")
        head_dim = features // num_heads if head_dim is None else head_dim
        value_dim = head_dim if value_dim is None else value_dim
        key_features = features if key_features is None else key_features
        value_features = key_features if value_features is None else value_features
        out_init = kernel_init if out_init is None else out_init
        self.num_heads, self.dtype, self.block_size, self.dropout = num_heads, dtype, block_size, dropout
        self.scale = head_dim**-0.5 if scale is None else scale
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        options = {"dtype": dtype, **stored}
        into = options if kernel_init is None else {"kernel_init": kernel_init, **options}
        out_of = options if out_init is None else {"kernel_init": out_init, **options}
        self.query = ToHeads(features, num_heads, head_dim, use_bias=use_bias, **into)
        key_bias = use_bias if key_bias is None else key_bias
        self.key = ToHeads(key_features, num_heads, head_dim, use_bias=key_bias, **into)
        self.value = ToHeads(value_features, num_heads, value_dim, use_bias=use_bias, **into)
        out_features = features if out_features is None else out_features
        self.out = FromHeads(num_heads, value_dim, out_features, use_bias=out_bias, **out_of)
        self.q_norm = LayerNorm(head_dim, eps=1e-5, **stored) if qk_norm else nnx.data(None)
        self.k_norm = LayerNorm(head_dim, eps=1e-5, **stored) if qk_norm else nnx.data(None)
        self.dropout_rngs = rngs["dropout"].fork() if dropout > 0 else nnx.data(None)

    def __call__(
        self,
        queries: ArrayLike,
        keys: ArrayLike,
        values: ArrayLike | None = None,
        *,
        query_positions: ArrayLike | None = None,
        key_positions: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        causal: bool = False,
        deterministic: bool = True,
    ) -> jax.Array:
        """Attends, and records the weights as `"attention"`.

        Args:
          queries: tokens `(B, N, C)`.
          keys: tokens `(B, M, key_features)`.
          values: tokens `(B, M, value_features)`; those of the keys when None.
          query_positions: added to the queries' tokens, broadcastable to them.
          key_positions: added to the tokens that keys are made of, and not to those of values.
          mask: boolean, True where attention is allowed: `(B, M)`, or broadcastable to `(B, H, N, M)`.
          bias: of the scores, broadcastable to `(B, H, N, M)`.
          causal: query i sees keys j ≤ i.
          deterministic: False in training, for dropout.

        Returns:
          `(B, N, out_features)`; the bias of the last map where a query may see no key.
        """
        q, k, v = self.heads(queries, keys, values, query_positions, key_positions)
        who = {"mask": mask, "bias": bias, "causal": causal, "scale": self.scale}
        record(self, "attention", lambda: attention_weights(q, k, **who))
        dropout = {}
        if not deterministic and self.dropout_rngs is not None:
            dropout = {"dropout_rate": self.dropout, "dropout_key": self.dropout_rngs()}
        return self.out(softmax_attention(q, k, v, **who, block_size=self.block_size, **dropout))

    def with_weights(
        self,
        queries: ArrayLike,
        keys: ArrayLike,
        values: ArrayLike | None = None,
        *,
        query_positions: ArrayLike | None = None,
        key_positions: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        causal: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """What a call gives without dropout, and the weights `(B, H, N, M)` float32, for a caller that uses them."""
        q, k, v = self.heads(queries, keys, values, query_positions, key_positions)
        who = {"mask": mask, "bias": bias, "causal": causal, "scale": self.scale}
        y, weights = softmax_attention(q, k, v, **who, return_weights=True)
        return self.out(y), weights

    def heads(
        self,
        queries: ArrayLike,
        keys: ArrayLike,
        values: ArrayLike | None = None,
        query_positions: ArrayLike | None = None,
        key_positions: ArrayLike | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries `(B, N, H, D)`, keys `(B, M, H, D)` and values `(B, M, H, E)` of tokens; arguments as a call's."""
        x = jnp.asarray(queries, self.dtype)
        s = jnp.asarray(keys, x.dtype)
        t = s if values is None else jnp.asarray(values, x.dtype)
        x = x if query_positions is None else x + jnp.asarray(query_positions, x.dtype)
        s = s if key_positions is None else s + jnp.asarray(key_positions, x.dtype)
        q, k, v = self.query(x), self.key(s), self.value(t)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v
