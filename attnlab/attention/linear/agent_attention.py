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
(PVT, `reduction`), a class token that is read and written but not pooled (DeiT, `class_token`), and stripes between
shared projections (CSwin, which uses `AgentCore` alone). Windows may be shifted, but the authors' code does not mask
what the shift wraps around, and neither does this. The number of the table's cells, 7x7, is a constant of their code.

Reference for names and defaults: LeapLabTHU/Agent-Attention.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, Site, TokenMixer, UnsupportedArgument, record
from attnlab.nn.linear import Conv, Linear, trunc_normal
from attnlab.nn.norms import LayerNorm
from attnlab.nn.resampling import adaptive_avg_pool, resize_bilinear
from attnlab.nn.windows import ShiftedWindows, spread_map
from attnlab.registry import Cost, Paper, Source, register

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
    wide = jnp.promote_types(q.dtype, jnp.float32)
    aggregate = jnp.einsum("bahd,bmhd->bham", agents, k, preferred_element_type=wide) * scale
    broadcast = jnp.einsum("bnhd,bahd->bhna", q, agents, preferred_element_type=wide)
    broadcast = broadcast * (scale if broadcast_scale is None else broadcast_scale)
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


class AgentCore(nnx.Module):
    """Agent attention between projections: the biases, the pooling and the convolution over values.

    Args:
      features: channels C of queries, keys and values.
      num_heads: H.
      grid: rows and columns of the queries.
      key_grid: rows and columns of keys and values, `grid` when None; values are resized to `grid` for the convolution.
      num_agents: n, a square number.
      class_token: whether a token without a place on the grid comes first.
      attention_dropout: rate on both softmaxes.
      dtype: of the computation; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if `num_agents` is no square, or the heads do not divide the channels.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        grid: tuple[int, int],
        key_grid: tuple[int, int] | None = None,
        num_agents: int = 49,
        class_token: bool = False,
        attention_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        side = math.isqrt(num_agents) if num_agents > 0 else 0
        if side < 1 or side * side != num_agents:
            raise ValueError(f"num_agents must be a square number (agents are pooled on a grid), got {num_agents}")
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
        self.num_heads, self.side, self.class_token = num_heads, side, class_token
        self.grid = tuple(grid)
        self.key_grid = self.grid if key_grid is None else tuple(key_grid)

        def table(*shape: int) -> nnx.Param:
            return nnx.Param(trunc_normal(rngs.params(), shape, param_dtype))

        heads, agents, (rows, columns), (key_rows, key_columns) = num_heads, num_agents, self.grid, self.key_grid
        self.aggregate_table = table(heads, agents, BASE, BASE)
        self.aggregate_row = table(heads, agents, key_rows)
        self.aggregate_column = table(heads, agents, key_columns)
        self.broadcast_table = table(heads, agents, BASE, BASE)
        self.broadcast_row = table(heads, rows, agents)
        self.broadcast_column = table(heads, columns, agents)
        self.aggregate_class = table(heads, agents) if class_token else nnx.data(None)
        self.broadcast_class = table(heads, agents) if class_token else nnx.data(None)
        self.local = Conv(
            features,
            features,
            (3, 3),
            feature_group_count=features,
            axes=(None, "embed"),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.dropout = nnx.Dropout(attention_dropout, rngs=rngs) if attention_dropout > 0 else nnx.data(None)

    def biases(self) -> tuple[jax.Array, jax.Array]:
        """P₁ `(H, n, M)` and P₂ `(H, N, n)`."""
        heads, agents = self.aggregate_table.shape[:2]
        rows, columns = self.aggregate_row[...][..., :, None], self.aggregate_column[...][..., None, :]
        aggregate = _resize_last(self.aggregate_table[...], self.key_grid) + rows + columns
        aggregate = aggregate.reshape(heads, agents, -1)
        rows, columns = self.broadcast_row[...][:, :, None], self.broadcast_column[...][:, None]
        broadcast = jnp.moveaxis(_resize_last(self.broadcast_table[...], self.grid), 1, -1) + rows + columns
        broadcast = broadcast.reshape(heads, -1, agents)
        if self.class_token:
            aggregate = jnp.concatenate([self.aggregate_class[...][:, :, None], aggregate], -1)
            broadcast = jnp.concatenate([self.broadcast_class[...][:, None], broadcast], 1)
        return aggregate, broadcast

    def agents(self, q: jax.Array) -> jax.Array:
        """Agents `(B, n, H, D)` of the queries `(B, N, C)`."""
        image = q[:, int(self.class_token) :].reshape(q.shape[0], *self.grid, q.shape[-1])
        return self._heads(adaptive_avg_pool(image, (self.side, self.side)).reshape(q.shape[0], -1, q.shape[-1]))

    def attention(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """The effective map of queries on keys, `(B, H, N, M)`; the local term is not in it."""
        p1, p2 = self.biases()
        aggregate, broadcast = agent_weights(
            self._heads(q), self._heads(k), self.agents(q), aggregate_bias=p1, broadcast_bias=p2
        )
        return broadcast @ aggregate

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Queries `(B, N, C)`, keys and values `(B, M, C)`, tokens in row-major order, to `(B, N, C)`."""
        p1, p2 = self.biases()
        drop = None if self.dropout is None else lambda w: self.dropout(w, deterministic=deterministic)
        y = agent_attention(
            self._heads(q),
            self._heads(k),
            self._heads(v),
            self.agents(q),
            aggregate_bias=p1,
            broadcast_bias=p2,
            dropout=drop,
        ).reshape(q.shape)
        first = int(self.class_token)
        image = v[:, first:].reshape(v.shape[0], *self.key_grid, v.shape[-1])
        if self.key_grid != self.grid:
            image = resize_bilinear(image, self.grid)
        local = self.local(image).reshape(v.shape[0], -1, v.shape[-1])
        return y.at[:, first:].add(local) if first else y + local

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.num_heads, -1)


def _resize_last(table: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Tables `(…, 7, 7)` to `(…, *size)`, in float32 or wider."""
    table = table.astype(jnp.promote_types(table.dtype, jnp.float32))
    return resize_bilinear(table.reshape(-1, BASE, BASE, 1), size).reshape(*table.shape[:-2], *size)


@register(
    "agent_attention",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="LeapLabTHU/Agent-Attention",
    cost=Cost(time="O((N+M)·n·C)", memory="O((N+M)·n·H)"),
    summary="pooled agent tokens read all keys by softmax, all queries read the agents; linear in N",
)
class AgentAttention(TokenMixer):
    """Agent attention with its projections, on images or in windows of them.

    Args:
      features: channels C.
      num_heads: H.
      grid: rows and columns of the image, which the biases are tables over.
      num_agents: n, a square number; the papers' stages use 9, 16, 49 and 49.
      window: rows and columns of the windows that are attended separately, one number for both; the grid when None.
      shift: by how much the windows are shifted, cyclically.
      reduction: keys and values come from a convolution of this stride; 1 takes the tokens themselves.
      class_token: tokens are a sequence `(B, 1 + H·W, C)` whose first token has no place on the grid.
      qkv_bias: whether queries, keys and values have a bias.
      attention_dropout: rate on both softmaxes.
      projection_dropout: rate on the result.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if `grid` is missing, windows do not tile it, or `reduction` does not divide a window.
      UnsupportedArgument: for windows or reduction with a class token.
    """

    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        grid: tuple[int, int] | None = None,
        num_agents: int = 49,
        window: int | tuple[int, int] | None = None,
        shift: int | tuple[int, int] = 0,
        reduction: int = 1,
        class_token: bool = False,
        qkv_bias: bool = True,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if grid is None:
            raise ValueError(
                "AgentAttention needs the grid (rows, columns) of its tokens: its biases are tables over it"
            )
        if class_token and (window is not None or reduction != 1):
            raise UnsupportedArgument(
                f"AgentAttention has no windows and no reduction with a class token, got {window=}, {reduction=}"
            )
        if window is None and shift != 0:
            raise ValueError(f"AgentAttention shifts windows only, got {shift=} without a window")
        self.features, self.grid, self.class_token = features, tuple(grid), class_token
        self.layout = Layout.SEQUENCE if class_token else Layout.IMAGE
        self.windows = ShiftedWindows(self.grid if window is None else window, shift)
        self.windows.check(self.grid)
        size = self.windows.size
        if reduction < 1 or size[0] % reduction or size[1] % reduction:
            raise ValueError(f"reduction must divide the window {size}, got {reduction}")
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        heads = {"use_bias": qkv_bias, "axes": ("embed", "heads")} | common
        self.query = Linear(features, features, **heads)
        self.key_value = Linear(features, 2 * features, **heads)
        self.core = AgentCore(
            features,
            num_heads=num_heads,
            grid=size,
            key_grid=(size[0] // reduction, size[1] // reduction),
            num_agents=num_agents,
            class_token=class_token,
            attention_dropout=attention_dropout,
            **common,
        )
        self.projection = Linear(features, features, axes=("heads", "embed"), **common)
        self.reduce = self.reduce_norm = nnx.data(None)
        if reduction > 1:
            stride = (reduction, reduction)
            self.reduce = Conv(features, features, stride, strides=stride, padding="VALID", **common)
            self.reduce_norm = LayerNorm(features, eps=1e-5, param_dtype=param_dtype, rngs=rngs)
        self.dropout = nnx.Dropout(projection_dropout, rngs=rngs) if projection_dropout > 0 else nnx.data(None)

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        """At most a quarter of the tokens of a small grid become agents."""
        if site.grid is None or len(site.grid) != 2:
            return {}
        return {"num_agents": min(7, (min(site.grid) + 1) // 2) ** 2}

    def __call__(
        self,
        x: ArrayLike,
        context: ArrayLike | None = None,
        *,
        mask: ArrayLike | None = None,
        segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
        positions: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        self.check_call(x, context=context, mask=mask, segment_ids=segment_ids, positions=positions)
        x = jnp.asarray(x)
        expected = (1 + math.prod(self.grid),) if self.class_token else self.grid
        if x.shape[1:-1] != expected:
            raise ValueError(f"AgentAttention was built for tokens {expected}, got x of shape {x.shape}")
        tokens = x if self.class_token else self.windows.partition(x)
        source = tokens if self.reduce is None else self.reduce_norm(self.reduce(tokens))
        flat = (tokens.shape[0], -1, self.features)
        q = self.query(tokens).reshape(flat)
        k, v = jnp.split(self.key_value(source).reshape(*flat[:2], 2 * self.features), 2, -1)
        record(self, "attention", lambda: self._map(q, k))
        y = self.projection(self.core(q, k, v, deterministic=deterministic))
        if self.dropout is not None:
            y = self.dropout(y, deterministic=deterministic)
        return y if self.class_token else self.windows.merge(y.reshape(tokens.shape), self.grid)

    def _map(self, q: jax.Array, k: jax.Array) -> jax.Array:
        weights = self.core.attention(q, k)
        if self.class_token:
            return weights
        key_grid = self.core.key_grid
        weights = spread_map(weights, key_grid, self.windows.size[0] // key_grid[0])
        return self.windows.scatter_map(weights, self.grid)
