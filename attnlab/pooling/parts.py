"""What attentive poolings share: few queries that read many tokens, and the projections around it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.linear import Linear, trunc_normal
from attnlab.nn.norms import LayerNorm
from attnlab.nn.softmax import softmax_attention


def wide(x: jax.Array) -> jax.Array:
    """`x` in float32, or in its own dtype where that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def mean(x: jax.Array, axis: int | tuple[int, ...], *, keepdims: bool = False) -> jax.Array:
    """Mean over `axis`, summed in float32 (or wider), in the dtype of `x`."""
    return wide(x).mean(axis, keepdims=keepdims).astype(x.dtype)


def token_mean(x: jax.Array, mask: jax.Array | None, *, keepdims: bool = False) -> jax.Array:
    """Mean (B, C) of the tokens (B, N, C) that exist, summed in float32; zeros where none does."""
    if mask is None:
        return mean(x, 1, keepdims=keepdims)
    total = jnp.where(mask[..., None], wide(x), 0).sum(1, keepdims=keepdims)
    count = mask.sum(1).reshape(-1, *(1,) * (total.ndim - 1))
    return (total / jnp.maximum(count, 1)).astype(x.dtype)


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """(B, N, H·D) to (B, N, H, D)."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def head_size(features: int, num_heads: int) -> int:
    """D = features / num_heads.

    Raises:
      ValueError: if the heads do not divide the channels.
    """
    if features % num_heads:
        raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
    return features // num_heads


def given_queries(queries: ArrayLike, x: jax.Array, count: int | None = None) -> jax.Array:
    """Queries that the caller brings, (B, Q, C), in the dtype of the tokens.

    Args:
      queries: what came.
      x: tokens (B, N, C).
      count: the Q that is wanted, None for any.

    Raises:
      ValueError: if the shape is another.
    """
    shape = jnp.shape(queries)
    if len(shape) != 3 or shape[0] != x.shape[0] or shape[2] != x.shape[2] or count not in (None, shape[1]):
        wanted = f"({x.shape[0]}, {'Q' if count is None else count}, {x.shape[2]})"
        raise ValueError(f"queries must have shape {wanted}, got {shape}")
    return jnp.asarray(queries, x.dtype)


class CrossAttention(nnx.Module):
    """Multi-head attention of queries (B, Q, C) to keys and values (B, N, C).

    Args:
      features: channels C, of the tokens and of the queries.
      num_heads: heads H.
      head_dim: D; C / H when None.
      out_features: channels of the result; C when None.
      use_bias: whether the maps to queries and values have a bias.
      key_bias: whether the map to keys has one; as `use_bias` when None.
      qk_norm: layer normalisation of queries and keys in each head, eps 1e-5.
      scale: of the scores; D^-1/2 when None.
      kernel_init: initialiser of the three maps that come before the attention.
      out_init: initialiser of the map after it; `kernel_init` when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        out_features: int | None = None,
        use_bias: bool = True,
        key_bias: bool | None = None,
        qk_norm: bool = False,
        scale: float | None = None,
        kernel_init: nnx.Initializer = trunc_normal,
        out_init: nnx.Initializer | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        head_dim = head_size(features, num_heads) if head_dim is None else head_dim
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.scale = head_dim**-0.5 if scale is None else scale
        options = {"param_dtype": param_dtype, "rngs": rngs}
        maps = {"axes": ("embed", "heads"), "kernel_init": kernel_init} | options
        self.q = Linear(features, inner, use_bias=use_bias, **maps)
        self.k = Linear(features, inner, use_bias=use_bias if key_bias is None else key_bias, **maps)
        self.v = Linear(features, inner, use_bias=use_bias, **maps)
        self.out = Linear(
            inner,
            features if out_features is None else out_features,
            axes=("heads", "embed"),
            kernel_init=kernel_init if out_init is None else out_init,
            **options,
        )
        self.q_norm = LayerNorm(head_dim, eps=1e-5, **options) if qk_norm else nnx.data(None)
        self.k_norm = LayerNorm(head_dim, eps=1e-5, **options) if qk_norm else nnx.data(None)

    def __call__(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The result (B, Q, out_features) and the weights (B, H, Q, N).

        `values` are the keys' tokens when None; `mask` (B, N) says which of them exist.
        """
        q = split_heads(self.q(queries), self.num_heads)
        k = split_heads(self.k(keys), self.num_heads)
        v = split_heads(self.v(keys if values is None else values), self.num_heads)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        y, weights = softmax_attention(q, k, v, mask=mask, scale=self.scale, return_weights=True)
        return self.out(y.reshape(*y.shape[:2], -1)), weights
