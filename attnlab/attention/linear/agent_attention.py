"""Agent attention (Han et al., ECCV 2024, arXiv:2312.08874).

A few agent tokens, pooled from the queries, read all keys; all queries then read the agents. Two softmax attentions
of linear cost are one generalised linear attention:

    A   = pool(Q)                                   (n, D)   n = p² means over an adaptive p x p partition of the grid
    V_A = softmax_M(A Kᵀ / √D + P₁) V               (n, E)   agents aggregate
    Y   = softmax_n(Q Aᵀ / √D + P₂) V_A + DWC(V)    (N, E)   agents broadcast; DWC is a depthwise 3x3 convolution
        = φ_q(Q) (φ_k(K)ᵀ V) + DWC(V),   φ_q(Q) = softmax(Q Aᵀ/√D + P₂),   φ_k(K) = softmax(A Kᵀ/√D + P₁)ᵀ

The biases P₁ (H, n, M) and P₂ (H, N, n) are each a 7x7 table resized to the grid (bilinear, not antialiased) plus one
table over rows and one over columns. Cost O((N + M)·n·C) time, O((N + M)·n·H) memory.

Forms of the paper's four models, all of them options here: windows (Swin), keys and values from a strided convolution
(PVT, `reduction`), a class token that is read and written but not pooled (DeiT, `prefix`), and stripes between shared
projections (CSwin, `CrossShapedWindowAttention` with `AgentCore`). Windows may be shifted, but the authors' code does
not mask what the shift wraps around, and neither does this. The number of the table's cells, 7x7, is a constant of
their code.

Reference for names and defaults: LeapLabTHU/Agent-Attention.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.contract import Site, UnsupportedArgument, View, record
from attnlab.nn.dense_mixer import Core, Heads
from attnlab.nn.depthwise import DepthwiseConv, on_tokens
from attnlab.nn.grid_mixer import GridMixer
from attnlab.nn.heads import merge_heads, split_heads
from attnlab.nn.linear import trunc_normal
from attnlab.nn.reduction import SpatialReduction, check_reduction
from attnlab.nn.resampling import adaptive_avg_pool, resize_bilinear
from attnlab.nn.softmax import scaled_product
from attnlab.points import Edits
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper(
    "Agent Attention: On the Integration of Softmax and Linear Attention",
    "Han et al.",
    2024,
    arxiv="2312.08874",
    number=8,
)
BASE = 7  # cells on a side of the bias tables that are resized to the grid


def agent_weights(
    q: jax.Array,
    k: jax.Array,
    agents: jax.Array,
    *,
    aggregate_bias: jax.Array | None = None,
    broadcast_bias: jax.Array | None = None,
    scale: float | None = None,
    broadcast_scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The two softmaxes of `agent_attention`: over keys `(B, H, n, M)`, and over agents `(B, H, N, n)`, in float32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    aggregate = scaled_product("bahd,bmhd->bham", agents, k, scale)
    broadcast = scaled_product("bnhd,bahd->bhna", q, agents, scale if broadcast_scale is None else broadcast_scale)
    if aggregate_bias is not None:
        aggregate = aggregate + aggregate_bias
    if broadcast_bias is not None:
        broadcast = broadcast + broadcast_bias
    return jax.nn.softmax(aggregate, -1), jax.nn.softmax(broadcast, -1)


def agent_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    agents: jax.Array,
    *,
    aggregate_bias: jax.Array | None = None,
    broadcast_bias: jax.Array | None = None,
    scale: float | None = None,
    broadcast_scale: float | None = None,
    dropout: Any = None,
) -> jax.Array:
    """Attention through agents, without the local term.

    Args:
      q: queries, `(B, N, H, D)`.
      k: keys, `(B, M, H, D)`.
      v: values, `(B, M, H, E)`.
      agents: `(B, n, H, D)`.
      aggregate_bias: added to the scores of agents on keys, broadcastable to `(B, H, n, M)`.
      broadcast_bias: added to the scores of queries on agents, broadcastable to `(B, H, N, n)`.
      scale: of the scores, D^-1/2 when None.
      broadcast_scale: of the scores of queries on agents, `scale` when None.
      dropout: function applied to both weights, in training.

    Returns:
      `(B, N, H, E)` in the dtype of `v`; both softmaxes are computed in float32.
    """
    aggregate, broadcast = agent_weights(
        q,
        k,
        agents,
        aggregate_bias=aggregate_bias,
        broadcast_bias=broadcast_bias,
        scale=scale,
        broadcast_scale=broadcast_scale,
    )
    if dropout is not None:
        aggregate, broadcast = dropout(aggregate), dropout(broadcast)
    wide = aggregate.dtype
    read = jnp.einsum("bham,bmhe->bahe", aggregate.astype(v.dtype), v, preferred_element_type=wide)
    y = jnp.einsum("bhna,bahe->bnhe", broadcast.astype(v.dtype), read.astype(v.dtype), preferred_element_type=wide)
    return y.astype(v.dtype)


class AgentCore(Core):
    """Agent attention between projections: the pooling and the biases, without the local term.

    Args:
      features: channels C of the tokens.
      num_heads: H.
      grid: rows and columns of the queries.
      key_grid: rows and columns of keys and values; `grid` when None.
      num_agents: n, a square number.
      prefix: tokens in front, without a place on the grid: they are read and written, but not pooled.
      dropout: rate on both softmaxes.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if `num_agents` is no square, or the heads do not divide the channels.
    """

    permutation_equivariant = False

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        grid: tuple[int, int],
        key_grid: tuple[int, int] | None = None,
        num_agents: int = 49,
        prefix: int = 0,
        dropout: float = 0.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        side = math.isqrt(num_agents) if num_agents > 0 else 0
        if side < 1 or side * side != num_agents:
            raise ValueError(f"num_agents must be a square number (agents are pooled on a grid), got {num_agents}")
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
        self.num_heads, self.side, self.prefix = num_heads, side, prefix
        self.grid = tuple(grid)
        self.key_grid = self.grid if key_grid is None else tuple(key_grid)

        def table(*shape: int) -> nnx.Param:
            values = trunc_normal(rngs.params(), (num_heads, *shape), param_dtype)
            return nnx.Param(values, logical_axes=("heads", *(None,) * len(shape)), weight_decay=False)

        agents, (rows, columns), (key_rows, key_columns) = num_agents, self.grid, self.key_grid
        self.aggregate_table = table(agents, BASE, BASE)
        self.aggregate_row = table(agents, key_rows)
        self.aggregate_column = table(agents, key_columns)
        self.broadcast_table = table(agents, BASE, BASE)
        self.broadcast_row = table(rows, agents)
        self.broadcast_column = table(columns, agents)
        self.aggregate_prefix = table(agents, prefix) if prefix else nnx.data(None)
        self.broadcast_prefix = table(prefix, agents) if prefix else nnx.data(None)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout > 0 else nnx.data(None)

    def biases(self) -> tuple[jax.Array, jax.Array]:
        """P₁ `(H, n, M)` and P₂ `(H, N, n)`."""
        heads, agents = self.aggregate_table.shape[:2]
        rows, columns = self.aggregate_row[...][..., :, None], self.aggregate_column[...][..., None, :]
        aggregate = _resize_last(self.aggregate_table[...], self.key_grid) + rows + columns
        aggregate = aggregate.reshape(heads, agents, -1)
        rows, columns = self.broadcast_row[...][:, :, None], self.broadcast_column[...][:, None]
        broadcast = jnp.moveaxis(_resize_last(self.broadcast_table[...], self.grid), 1, -1) + rows + columns
        broadcast = broadcast.reshape(heads, -1, agents)
        if self.prefix:
            aggregate = jnp.concatenate([self.aggregate_prefix[...], aggregate], -1)
            broadcast = jnp.concatenate([self.broadcast_prefix[...], broadcast], 1)
        return aggregate, broadcast

    def agents(self, q: jax.Array) -> jax.Array:
        """Agents `(B, n, H, D)` of the queries `(B, N, H, D)`."""
        image = merge_heads(q[:, self.prefix :]).reshape(q.shape[0], *self.grid, -1)
        pooled = adaptive_avg_pool(image, (self.side, self.side))
        return split_heads(pooled.reshape(q.shape[0], self.side**2, -1), self.num_heads)

    def attention(self, heads: Heads, view: View) -> jax.Array:
        self.refuse_masks(view)
        p1, p2 = self.biases()
        aggregate, broadcast = agent_weights(
            heads.q, heads.k, self.agents(heads.q), aggregate_bias=p1, broadcast_bias=p2
        )
        return broadcast @ aggregate

    def __call__(
        self,
        heads: Heads,
        view: View,
        cache: Any = None,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
        owner: nnx.Module | None = None,
    ) -> tuple[jax.Array, Any]:
        self.refuse_masks(view)
        if owner is not None:
            record(owner, "attention", lambda: self.attention(heads, view))
        p1, p2 = self.biases()
        drop = None if self.dropout is None else lambda w: self.dropout(w, deterministic=deterministic)
        agents = self.agents(heads.q)
        return agent_attention(*heads[:3], agents, aggregate_bias=p1, broadcast_bias=p2, dropout=drop), None


def _resize_last(table: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Tables `(…, 7, 7)` to `(…, *size)`, in float32 or wider."""
    table = table.astype(at_least_float32(table.dtype))
    return resize_bilinear(table.reshape(-1, BASE, BASE, 1), size).reshape(*table.shape[:-2], *size)


@register(
    "agent_attention",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="LeapLabTHU/Agent-Attention",
    cost=Cost(time="O((N+M)·n·C)", memory="O((N+M)·n·H)"),
    summary="pooled agent tokens read all keys by softmax, all queries read the agents; linear in N",
)
class AgentAttention(GridMixer):
    """Agent attention with its projections, on images or in windows of them.

    Args:
      features: channels C.
      num_heads: H.
      num_agents: n, a square number; the papers' stages use 9, 16, 49 and 49.
      reduction: keys and values come from a convolution of this stride; 1 takes the tokens themselves.
      attention_dropout: rate on both softmaxes.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **options: those of `GridMixer`: grid (which the biases are tables over), windows, prefix, biases, dropout.

    Raises:
      ValueError: if there is neither grid nor window, windows do not tile the grid, or `reduction` does not divide it.
      UnsupportedArgument: for a reduction or a prefix in windows, or both.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_agents: int = 49,
        reduction: int = 1,
        attention_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(features, num_heads=num_heads, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **options)
        if reduction != 1 and (self.prefix or self.grid is None):
            raise UnsupportedArgument(
                f"AgentAttention reduces whole images without tokens in front, got {reduction=} with {options}"
            )
        key_grid = check_reduction(reduction, self.windows.size)
        common = {"param_dtype": param_dtype, "rngs": rngs}
        self.core = AgentCore(
            features,
            num_heads=num_heads,
            grid=self.windows.size,
            key_grid=key_grid,
            num_agents=num_agents,
            prefix=self.prefix,
            dropout=attention_dropout,
            **common,
        )
        self.local = DepthwiseConv((num_heads, features // num_heads), (3, 3), dtype=dtype, **common)
        self.reduce = SpatialReduction(features, reduction, dtype=dtype, **common) if reduction > 1 else nnx.data(None)

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        """At most a quarter of the tokens of a small grid become agents."""
        if site.grid is None or len(site.grid) != 2:
            return {}
        return {"num_agents": min(7, (min(site.grid) + 1) // 2) ** 2}

    def project(self, x: jax.Array, grid: tuple[int, int]) -> Heads:
        source = x if self.reduce is None else self.reduce(x, grid)
        return Heads(self.query(x), self.key(source), self.value(source))

    def inside(self, heads: Heads, view: View, *, deterministic: bool = True) -> jax.Array:
        y, v = super().inside(heads, view, deterministic=deterministic), heads.v
        if self.reduce is not None:
            image = merge_heads(v).reshape(v.shape[0], *self.core.key_grid, self.features)
            image = resize_bilinear(image, self.core.grid)
            v = split_heads(image.reshape(v.shape[0], -1, self.features), self.num_heads)
        return y + on_tokens(self.local, v, self.core.grid)

    def attention(self, heads: Heads, grid: tuple[int, int], real: np.ndarray | None = None) -> jax.Array:
        if self.reduce is None:
            return super().attention(heads, grid, real)
        return self.reduce.spread(self.core.attention(heads, View()), grid)
