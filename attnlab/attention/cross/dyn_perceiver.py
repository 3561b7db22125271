"""Attention between latents and features, both ways, of Dynamic Perceiver (ICCV 2023, arXiv:2306.11248).

    q = x W_q;   k = s W_k + E;   v = s W_v        no biases; E, if any, is a learned vector for each place of the keys
    attention(x, s) = softmax(q k^T / √D) v W_o + b_o
    x = x + attention(LN(x), LN(s));   x = x + W_2 GELU(W_1 LN(x))                        a cross-attention layer
    x = x + attention(LN(x), LN(x));   x = x + W_2 GELU(W_1 LN(x))                        a self-attention layer

All norms have an eps of 1e-5. Latents read features (x2z) with E over a grid of 7x7; features read latents (z2x) with
an eighth of the channels in one head. Code: LeapLabTHU/Dynamic_Perceiver, where a mask is True at keys that are
missing; here it is True at those that exist. `attnlab.models.dyn_perceiver` is built of it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import record
from attnlab.nn.chain import call
from attnlab.nn.cross_attention import CrossAttention
from attnlab.nn.mlp import MLP
from attnlab.nn.norms import LayerNorm
from attnlab.nn.softmax import attention_weights, softmax_attention
from attnlab.points import Edits, Layer, visit
from attnlab.registry import Cost, Example, Kind, Paper, Source, register

PAPER = Paper("Dynamic Perceiver for Efficient Visual Recognition", "Han et al.", 2023, arxiv="2306.11248", number=102)
SOURCE = {"paper": PAPER, "source": Source.AUTHORS_CODE, "repository": "LeapLabTHU/Dynamic_Perceiver"}


class LatentAttention(nnx.Module):
    """Queries `(B, n, C)` read `(B, L, key_features)`; see the module docstring for the equations.

    Args:
      features: channels C of the queries.
      num_heads: heads H.
      key_features: channels of the keys' and values' tokens; C when None.
      qk_features: channels of queries and keys of all heads together; C when None.
      value_features: channels of the values; those of the keys when None.
      out_features: channels of the result; C when None.
      key_places: L, for which keys have a learned vector each; none when None.
      dropout: rate on the weights.
      dtype: of the computation; that of the queries when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the heads do not divide the channels.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        key_features: int | None = None,
        qk_features: int | None = None,
        value_features: int | None = None,
        out_features: int | None = None,
        key_places: int | None = None,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        inner = features if qk_features is None else qk_features
        value = inner if value_features is None else value_features
        if inner % num_heads or value % num_heads:
            raise ValueError(
                f"num_heads must divide the {inner} and {value} channels of keys and values, got {num_heads}"
            )
        self.attention = CrossAttention(
            features,
            num_heads=num_heads,
            key_features=key_features,
            out_features=out_features,
            head_dim=inner // num_heads,
            value_dim=value // num_heads,
            use_bias=False,
            dropout=dropout,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.places = nnx.data(None)
        if key_places is not None:
            table = jnp.zeros((key_places, inner), param_dtype)
            self.places = nnx.Param(table, logical_axes=(None, None), weight_decay=False)

    def __call__(
        self, x: ArrayLike, source: ArrayLike, *, mask: ArrayLike | None = None, deterministic: bool = True
    ) -> jax.Array:
        """Attends, and records the weights as `"attention"`.

        Args:
          x: tokens of the queries `(B, n, C)`.
          source: tokens of keys and values `(B, L, key_features)`.
          mask: `(B, L)` boolean, which keys exist; all when None.
          deterministic: False in training.

        Raises:
          ValueError: for another number of keys than there are learned vectors.
        """
        inner = self.attention
        q, k, v = inner.heads(x, source)
        if self.places is not None:
            if k.shape[1] != self.places.shape[0]:
                raise ValueError(f"source must have {self.places.shape[0]} tokens, got {k.shape[1]}")
            k = k + self.places[...].astype(k.dtype).reshape(-1, *k.shape[2:])
        who = {"mask": mask, "scale": inner.scale}
        record(self, "attention", lambda: attention_weights(q, k, **who))
        dropout = {}
        if not deterministic and inner.dropout_rngs is not None:
            dropout = {"dropout_rate": inner.dropout, "dropout_key": inner.dropout_rngs()}
        return inner.out(softmax_attention(q, k, v, **who, **dropout))


def _example() -> Example:
    keys = jax.random.split(jax.random.key(0), 2)
    layer = CrossLatentLayer(8, num_heads=2, key_features=6, key_places=5, rngs=nnx.Rngs(0))
    x, source = jax.random.normal(keys[0], (2, 3, 8)), jax.random.normal(keys[1], (2, 5, 6))
    return Example(layer, (x, source), {"mask": jnp.arange(5) < jnp.array([[5], [3]])}, (0, 1, "mask"), (0, 1))


@register(
    "dyn_perceiver",
    kind=Kind.MODULE,
    cost=Cost(time="O(n·L·C)", memory="O(n·L·H)"),
    summary="few latents read many features, or features read latents, with a learned vector for each key's place",
    small=_example,
    **SOURCE,
)
class CrossLatentLayer(nnx.Module):
    """Tokens `(B, n, C)` that read others `(B, L, key_features)`, to the same shape; see the module docstring.

    Args:
      features: channels C.
      num_heads: heads H.
      widening: hidden channels of the feed-forward over C.
      attention_residual: whether what is read is added to the tokens, and does not take their place.
      dropout: rate on attention weights and on what either step returns.
      dtype: of the computation; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **attention: further arguments of `LatentAttention`.

    Raises:
      ValueError: if the heads do not divide the channels.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        widening: int = 1,
        attention_residual: bool = True,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        key_features = attention.get("key_features") or features
        self.residual = attention_residual
        self.query_norm, self.key_norm = (LayerNorm(n, eps=1e-5, **stored) for n in (features, key_features))
        self.attention = LatentAttention(
            features, num_heads=num_heads, dropout=dropout, dtype=dtype, **attention, **stored
        )
        self.mlp_norm = LayerNorm(features, eps=1e-5, **stored)
        self.mlp = MLP(features, widening * features, dtype=dtype, **stored)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout > 0 else nnx.data(None)

    def __call__(
        self, x: ArrayLike, source: ArrayLike, *, mask: ArrayLike | None = None, deterministic: bool = True
    ) -> jax.Array:
        """Arguments as `LatentAttention`."""
        x, source = jnp.asarray(x), jnp.asarray(source)
        read = self.attention(self.query_norm(x), self.key_norm(source), mask=mask, deterministic=deterministic)
        x = x + _dropped(self, read, deterministic) if self.residual else read
        return x + _dropped(self, self.mlp(self.mlp_norm(x)), deterministic)


class SelfLatentLayer(Layer):
    """Tokens `(B, n, C)` that read each other, to the same shape; see the module docstring.

    Args:
      features: channels C.
      num_heads: heads H.
      qk_features: channels of queries and keys of all heads together; C when None.
      value_features: channels of the values; those of the keys when None.
      widening: hidden channels of the feed-forward over C.
      dropout: rate on attention weights and on what either step returns.
      dtype: of the computation; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the heads do not divide the channels.
    """

    points = frozenset({"stream", "normed", "mixed", "middle", "mlp"})  # type: ignore[assignment]  # of all alike

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        qk_features: int | None = None,
        value_features: int | None = None,
        widening: int = 1,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        sizes = {"num_heads": num_heads, "qk_features": qk_features, "value_features": value_features}
        self.norm, self.mlp_norm = (LayerNorm(features, eps=1e-5, **stored) for _ in range(2))
        self.attention = LatentAttention(features, dropout=dropout, dtype=dtype, **sizes, **stored)
        self.mlp = MLP(features, widening * features, dtype=dtype, **stored)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout > 0 else nnx.data(None)

    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        edits: Edits | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Attends; `mask` `(B, n)` says which tokens exist."""
        x = visit(self, edits, "stream", jnp.asarray(x))
        normed = visit(self, edits, "normed", self.norm(x))
        read = self.attention(normed, normed, mask=mask, deterministic=deterministic)
        x = x + _dropped(self, visit(self, edits, "mixed", read), deterministic)
        x = visit(self, edits, "middle", x)
        return x + _dropped(self, visit(self, edits, "mlp", self.mlp(self.mlp_norm(x))), deterministic)


def _dropped(layer: CrossLatentLayer | SelfLatentLayer, y: jax.Array, deterministic: bool) -> jax.Array:
    return y if layer.dropout is None else call(layer.dropout, y, deterministic)
