"""MVPFormer: a transformer of multi-variate series (2025; code: IBM/multi-variate-parallel-transformer).

Segments of T times and C channels, embedded outside, pass blocks whose two branches stand side by side:

    h = RMSNorm(x);   x = x + MVPA(h, time rows 0..T-1, channel rows 0..C-1) + down(silu(gate h) · up h)

and a last RMSNorm. The two tables of embeddings are shared by all blocks, which map them to keys of their own; they
are added to nothing. The model is trained to foretell the next segment: `attnlab.objectives.contrastive`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.dense.mvpa import PAPER, REPOSITORY, MultiVariateParallelAttention
from attnlab.nn.activations import Activation, silu
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.mlp import GatedMLP
from attnlab.nn.norms import RMSNorm
from attnlab.registry import Cost, Example, Kind, Source, register

_COST = Cost(time="O((T·C)²·H·D)", memory="O(T·C·(T + C)·H)")


class MVPFormerBlock(nnx.Module):
    """Attention and feed-forward side by side behind one norm.

    Args:
      features: channels E.
      num_heads: query heads H.
      hidden_features: of the feed-forward; 8/3 E when None.
      activation: of its gate.
      eps: of the norm.
      dropout: rate on the weights and on the attention's result.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **attention: further arguments of `MultiVariateParallelAttention`.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        hidden_features: int | None = None,
        activation: Activation = silu,
        eps: float = 1e-5,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        stored: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        self.dtype = dtype
        self.norm = RMSNorm(features, eps=eps, **stored)
        rates = {"attention_dropout": dropout, "projection_dropout": dropout}
        self.attention = MultiVariateParallelAttention(features, num_heads=num_heads, **common, **(rates | attention))
        self.mlp = GatedMLP(features, hidden_features, activation=activation, **common)

    def __call__(
        self,
        x: ArrayLike,
        time: ArrayLike,
        channel: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Tokens `(B, T, C, E)` to the same shape; arguments as those of `MultiVariateParallelAttention`."""
        x = jnp.asarray(x, self.dtype)
        h = self.norm(x)
        return x + self.mlp(h) + self.attention(h, time, channel, mask=mask, deterministic=deterministic)


def _example() -> Example:
    model = MVPFormer(
        features=8, depth=1, num_heads=2, num_kv_heads=1, max_times=5, max_channels=4, init_std=0.2, rngs=nnx.Rngs(0)
    )
    return Example(model, (jax.random.normal(jax.random.key(0), (2, 4, 3, 8)),))


@register(
    "mvpa.mvpformer",
    kind=Kind.MODULE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=_COST,
    kernel="block_sparse_attention",
    summary="a transformer of series of any number of channels, whose blocks attend and feed forward side by side",
    small=_example,
)
class MVPFormer(nnx.Module):
    """Embeddings of segments `(B, T, C, E)` to predictions of the next ones, in the same shape.

    Args:
      features: channels E.
      depth: number of blocks.
      num_heads: query heads H.
      num_kv_heads: heads of keys and values; H when None. The released small model has 4 of 12.
      hidden_features: of the feed-forwards.
      max_times: rows of the table of times, at least T.
      max_channels: rows of the table of channels, at least C.
      eps: of the norms.
      init_std: deviation of all kernels and tables at the start.
      dropout: rate in front of the blocks, on weights and on the attention's results.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **attention: further arguments of `MultiVariateParallelAttention`, but for `layer`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        *,
        features: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_kv_heads: int | None = None,
        hidden_features: int = 2048,
        max_times: int = 100,
        max_channels: int = 128,
        eps: float = 1e-5,
        init_std: float = 0.02,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        if min(depth, max_times, max_channels) < 1:
            raise ValueError(
                f"depth, max_times and max_channels must be at least 1, got {depth, max_times, max_channels}"
            )
        stored: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        sizes: dict[str, Any] = {
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "hidden_features": hidden_features,
        }
        self.features, self.dtype = features, dtype
        self.blocks = nnx.List(
            MVPFormerBlock(features, **sizes, eps=eps, dropout=dropout, dtype=dtype, **stored, **attention, layer=layer)
            for layer in range(depth)
        )
        self.norm = RMSNorm(features, eps=eps, **stored)
        init = nnx.initializers.normal(init_std)
        redraw_kernels(self, init, rngs=rngs)
        self.time_table, self.channel_table = (
            nnx.Param(
                init(rngs.params(), (rows, features), param_dtype), logical_axes=(None, "embed"), weight_decay=False
            )
            for rows in (max_times, max_channels)
        )
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout > 0 else nnx.data(None)

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None, deterministic: bool = True) -> jax.Array:
        """Predicts.

        Args:
          x: embeddings `(B, T, C, E)`.
          mask: `(B, T, C)` boolean, True where a segment exists; None if all do.
          deterministic: False in training, for dropout.

        Returns:
          `(B, T, C, E)`: at t what is to come at t + 1.

        Raises:
          ValueError: for shapes that do not fit, or more times or channels than the tables have rows.
        """
        x = jnp.asarray(x, self.dtype)
        if x.ndim != 4 or x.shape[-1] != self.features:
            raise ValueError(f"x must be (B, T, C, {self.features}), got {x.shape}")
        tables = (("times", self.time_table, x.shape[1]), ("channels", self.channel_table, x.shape[2]))
        for name, table, length in tables:
            if length > table.shape[0]:
                raise ValueError(f"x has {length} {name}, and the table has rows for {table.shape[0]}")
        time, channel = (table[...][:length] for _, table, length in tables)
        x = x if self.dropout is None else self.dropout(x, deterministic=deterministic)
        for block in self.blocks:
            x = block(x, time, channel, mask=mask, deterministic=deterministic)
        return self.norm(x)
