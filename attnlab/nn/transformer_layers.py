"""Encoder and decoder layers of torch.nn.Transformer and DETR, in post-norm and pre-norm order.

Post-norm (Vaswani et al., 2017, arXiv:1706.03762; DETR, Carion et al., 2020, arXiv:2005.12872), with p positions of the
tokens x and r of the memory m, and A(q, k, v) the attention:

    x = LN1(x + A(x + p, x + p, x));    x = LN2(x + A'(x + p, m + r, m));    x = LN3(x + FF(x))

Pre-norm, h being the norm of x in front of each branch:

    h = LN1(x), x = x + A(h + p, h + p, h);    x = x + A'(LN2(x) + p, m + r, m);    x = x + FF(LN3(x))

An encoder layer has no A' and calls the last norm LN2. Positions are those of DETR, which go to queries and keys alone;
torch.nn.Transformer adds its own before the first layer. In training, dropout falls on weights, branches and the
feed-forward's hidden channels.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.activations import Activation, relu
from attnlab.nn.cross_attention import CrossAttention
from attnlab.nn.mlp import MLP
from attnlab.nn.norms import LayerNorm

Order = Literal["post", "pre"]


class EncoderLayer(nnx.Module):
    """Self-attention and feed-forward; see the module docstring for the equations.

    Args:
      features: channels C of the tokens.
      num_heads: heads H.
      hidden_features: of the feed-forward; 4 C when None.
      order: where the norms stand: "post" or "pre".
      activation: of the feed-forward.
      eps: of the norms.
      dropout: rate.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`, and `dropout` if there is any.

    Raises:
      ValueError: for another order.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        hidden_features: int | None = None,
        order: Order = "post",
        activation: Activation = relu,
        eps: float = 1e-5,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.post, self.dtype = _is_post(order), dtype
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        options = {"dropout": dropout, "dtype": dtype, **stored}
        self.attention = CrossAttention(features, num_heads=num_heads, **options)
        self.mlp = MLP(features, hidden_features, activation=activation, **options)
        self.norm1, self.norm2 = (LayerNorm(features, eps=eps, **stored) for _ in range(2))
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout > 0 else nnx.data(None)

    def __call__(
        self,
        x: ArrayLike,
        *,
        positions: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        causal: bool = False,
        deterministic: bool = True,
    ) -> jax.Array:
        """Tokens `(B, N, C)` to the same shape.

        Args:
          x: the tokens.
          positions: broadcastable to them.
          mask: boolean, True where attention is allowed: `(B, N)`, or broadcastable to `(B, H, N, N)`.
          bias: of the scores.
          causal: token i sees tokens up to i.
          deterministic: False in training.
        """
        x = jnp.asarray(x, self.dtype)
        h = x if self.post else self.norm1(x)
        place = {"query_positions": positions, "key_positions": positions}
        y = self.attention(h, h, **place, mask=mask, bias=bias, causal=causal, deterministic=deterministic)
        x = x + _dropped(self.dropout, y, deterministic)
        x = self.norm1(x) if self.post else x
        x = x + self.mlp(x if self.post else self.norm2(x), deterministic=deterministic)
        return self.norm2(x) if self.post else x


class DecoderLayer(nnx.Module):
    """Self-attention, attention to a memory, and feed-forward; see the module docstring for the equations.

    Args:
      features: channels C of the tokens.
      num_heads: heads H.
      memory_features: channels of the memory; C when None.
      hidden_features: of the feed-forward; 4 C when None.
      order: where the norms stand: "post" or "pre".
      self_attention: whether there is any, with its norm LN1.
      activation: of the feed-forward.
      eps: of the norms.
      dropout: rate.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`, and `dropout` if there is any.

    Raises:
      ValueError: for another order.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        memory_features: int | None = None,
        hidden_features: int | None = None,
        order: Order = "post",
        self_attention: bool = True,
        activation: Activation = relu,
        eps: float = 1e-5,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.post, self.dtype = _is_post(order), dtype
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        options = {"dropout": dropout, "dtype": dtype, **stored}
        self.attention = self.norm1 = nnx.data(None)
        if self_attention:
            self.attention = CrossAttention(features, num_heads=num_heads, **options)
            self.norm1 = LayerNorm(features, eps=eps, **stored)
        self.cross_attention = CrossAttention(features, num_heads=num_heads, key_features=memory_features, **options)
        self.mlp = MLP(features, hidden_features, activation=activation, **options)
        self.norm2, self.norm3 = (LayerNorm(features, eps=eps, **stored) for _ in range(2))
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout > 0 else nnx.data(None)

    def __call__(
        self,
        x: ArrayLike,
        memory: ArrayLike,
        *,
        positions: ArrayLike | None = None,
        memory_positions: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        memory_mask: ArrayLike | None = None,
        causal: bool = False,
        deterministic: bool = True,
    ) -> jax.Array:
        """Tokens `(B, N, C)` to the same shape.

        Args:
          x: the tokens.
          memory: `(B, M, memory_features)`.
          positions: of the tokens, broadcastable to them.
          memory_positions: of the memory, broadcastable to it.
          mask: boolean, True where self-attention is allowed: `(B, N)`, or broadcastable to `(B, H, N, N)`.
          memory_mask: boolean, True where a token may see the memory: `(B, M)`, or broadcastable to `(B, H, N, M)`.
          causal: token i sees tokens up to i, and the whole memory.
          deterministic: False in training.
        """
        x = jnp.asarray(x, self.dtype)
        if self.attention is not None:
            h = x if self.post else self.norm1(x)
            place = {"query_positions": positions, "key_positions": positions}
            y = self.attention(h, h, **place, mask=mask, causal=causal, deterministic=deterministic)
            x = x + _dropped(self.dropout, y, deterministic)
            x = self.norm1(x) if self.post else x
        elif mask is not None or causal:
            raise ValueError("mask and causal are those of the self-attention, and this layer has none")
        h = x if self.post else self.norm2(x)
        place = {"query_positions": positions, "key_positions": memory_positions}
        y = self.cross_attention(h, memory, **place, mask=memory_mask, deterministic=deterministic)
        x = x + _dropped(self.dropout, y, deterministic)
        x = self.norm2(x) if self.post else x
        x = x + self.mlp(x if self.post else self.norm3(x), deterministic=deterministic)
        return self.norm3(x) if self.post else x


def _is_post(order: str) -> bool:
    if order not in ("post", "pre"):
        raise ValueError(f"order must be 'post' or 'pre', got {order!r}")
    return order == "post"


def _dropped(dropout: nnx.Dropout | None, y: jax.Array, deterministic: bool) -> jax.Array:
    return y if dropout is None else dropout(y, deterministic=deterministic)
