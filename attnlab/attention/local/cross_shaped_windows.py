"""Attention in cross-shaped windows (CSWin Transformer, Dong et al., CVPR 2022, arXiv:2107.00652).

Queries, keys and values are projected once. The first half of the channels attends inside stripes of full height and
`split` columns, the second half inside stripes of full width and `split` rows; if one window covers the image, there
is one branch with all channels. A depthwise 3x3 convolution of the values inside each stripe is added (LePE: locally
enhanced position), and the branches are concatenated and projected:

    y = [branch_vertical(Q₁, K₁, V₁); branch_horizontal(Q₂, K₂, V₂)] W_o,    branch = core(Q, K, V) + LePE(V)

The core of the paper is softmax attention. Agent attention (arXiv:2312.08874) and InLine attention (arXiv:2412.06590)
take its place in the models of their papers. Cost with softmax O(N·split·(Hh+Ww)·C) time.

Reference for names and defaults: microsoft/CSWin-Transformer.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.linear.agent_attention import AgentCore
from attnlab.attention.linear.inline_attention import InlineCore, inline_scores
from attnlab.contract import Layout, Site, TokenMixer, record
from attnlab.nn.linear import Conv, Linear
from attnlab.nn.softmax import attention_weights, softmax_attention
from attnlab.nn.windows import ShiftedWindows

CORES = ("softmax", "agent", "inline")


class StripeAttention(nnx.Module):
    """One branch: attention of projected tokens inside windows, plus the convolution of their values.

    Args:
      features: channels of the branch.
      num_heads: heads of the branch.
      window: rows and columns of a window.
      core: `softmax`, `agent` or `inline`; the last only with one window that covers the image, since the kernel of
        its convolution is one per image.
      num_agents: of the core `agent`.
      scale: of the scores of the core `softmax`, D^-1/2 when None.
      attention_dropout: rate on softmax weights.
      dtype: of the computation; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for an unknown core, or an option that the core does not have.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        window: tuple[int, int],
        core: str = "softmax",
        num_agents: int | None = None,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if core not in CORES:
            raise ValueError(f"core must be one of {', '.join(CORES)}, got {core!r}")
        if (num_agents is not None) != (core == "agent"):
            raise ValueError(f"num_agents goes with the core agent, got {num_agents=} with {core!r}")
        if scale is not None and core != "softmax":
            raise ValueError(f"scale goes with the core softmax, got {scale=} with {core!r}")
        if attention_dropout > 0 and core == "inline":
            raise ValueError(f"the core inline has no weights to drop, got {attention_dropout=}")
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels of a branch, got {num_heads}")
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.kind, self.num_heads, self.scale = core, num_heads, scale
        self.windows = ShiftedWindows(window)
        self.attention_dropout = attention_dropout
        self.core = self.position = self.dropout_rngs = nnx.data(None)
        if core == "agent":  # its own convolution of the values is the LePE
            self.core = AgentCore(
                features,
                num_heads=num_heads,
                grid=self.windows.size,
                num_agents=num_agents,
                attention_dropout=attention_dropout,
                **common,
            )
            return
        if core == "inline":
            self.core = InlineCore(features, num_heads=num_heads, **common)
        elif attention_dropout > 0:
            self.dropout_rngs = rngs["dropout"].fork()
        self.position = Conv(features, features, (3, 3), feature_group_count=features, axes=(None, "embed"), **common)

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, descriptor: jax.Array, *, deterministic: bool = True
    ) -> jax.Array:
        """Projected images `(B, Hh, Ww, c)` to `(B, Hh, Ww, c)`.

        `descriptor` `(B, c)`: what the core `inline` computes its kernels from; the others do not read it.

        Raises:
          ValueError: if the windows do not tile the image, or with the core `inline` do not cover it.
        """
        grid = v.shape[1:3]
        if self.kind == "inline" and self.windows.size != grid:
            raise ValueError(f"the core inline needs a window that covers the image {grid}, got {self.windows.size}")
        windows = self.windows.partition(v)
        q, k, flat = self._flat(q), self._flat(k), windows.reshape(windows.shape[0], -1, v.shape[-1])
        if self.kind == "agent":
            y = self.core(q, k, flat, deterministic=deterministic)
        elif self.kind == "inline":
            y = self.core(q, k, flat, descriptor, grid)
        else:
            dropout = {}
            if not deterministic and self.dropout_rngs is not None:
                dropout = {"dropout_rate": self.attention_dropout, "dropout_key": self.dropout_rngs()}
            heads = (self._heads(t) for t in (q, k, flat))
            y = softmax_attention(*heads, scale=self.scale, **dropout)
        y = y.reshape(windows.shape)
        return self.windows.merge(y if self.position is None else y + self.position(windows), grid)

    def attention(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Weights of each query on each key of the image, `(B, H, N, N)`, without the convolution."""
        grid = q.shape[1:3]
        q, k = self._flat(q), self._flat(k)
        if self.kind == "agent":
            weights = self.core.attention(q, k)
        elif self.kind == "inline":
            weights = inline_scores(*self.core.map(q, k))
        else:
            weights = attention_weights(self._heads(q), self._heads(k), scale=self.scale)
        return self.windows.scatter_map(weights, grid)

    def _flat(self, x: jax.Array) -> jax.Array:
        windows = self.windows.partition(x)
        return windows.reshape(windows.shape[0], -1, x.shape[-1])

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.num_heads, -1)


class CrossShapedWindowAttention(TokenMixer):
    """Attention in stripes of two directions, with its projections.

    Args:
      features: channels C.
      num_heads: H, half of them for each direction.
      grid: rows and columns of the image.
      split: columns of the vertical and rows of the horizontal stripes.
      whole: one branch, whose window is the image; also if no side of it is longer than `split`.
      core: `softmax`, `agent` or `inline`.
      num_agents: of the core `agent`.
      scale: of the scores of the core `softmax`, D^-1/2 when None.
      qkv_bias: whether queries, keys and values have a bias.
      attention_dropout: rate on softmax weights.
      projection_dropout: rate on the result.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if `grid` is missing, stripes do not tile it, or heads do not divide the channels of a branch.
    """

    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        grid: tuple[int, int] | None = None,
        split: int = 7,
        whole: bool = False,
        core: str = "softmax",
        num_agents: int | None = None,
        scale: float | None = None,
        qkv_bias: bool = True,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if grid is None:
            raise ValueError("CrossShapedWindowAttention needs the grid (rows, columns) of its tokens")
        self.features, self.grid = features, tuple(grid)
        self.takes_descriptor = core == "inline"
        whole = whole or max(self.grid) <= split
        windows = (self.grid,) if whole else ((self.grid[0], split), (split, self.grid[1]))
        if not whole and (num_heads % 2 or features % 2):
            raise ValueError(f"two branches need an even number of heads and channels, got {num_heads} and {features}")
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query_key_value = Linear(features, 3 * features, use_bias=qkv_bias, axes=("embed", "heads"), **common)
        self.branches = nnx.List(
            StripeAttention(
                features // len(windows),
                num_heads=num_heads // len(windows),
                window=window,
                core=core,
                num_agents=num_agents,
                scale=scale,
                attention_dropout=attention_dropout,
                **common,
            )
            for window in windows
        )
        for branch in self.branches:
            branch.windows.check(self.grid)
        self.projection = Linear(features, features, axes=("heads", "embed"), **common)
        self.dropout = nnx.Dropout(projection_dropout, rngs=rngs) if projection_dropout > 0 else nnx.data(None)

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        """Stripes of the widest common divisor of rows and columns up to 7; one window for an odd number of heads."""
        if site.grid is None or len(site.grid) != 2:
            return {}
        split = max(s for s in range(1, 8) if not (site.grid[0] % s or site.grid[1] % s))
        return {"split": split, "whole": bool(site.num_heads % 2)}

    def __call__(
        self,
        x: ArrayLike,
        context: ArrayLike | None = None,
        *,
        mask: ArrayLike | None = None,
        segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
        positions: ArrayLike | None = None,
        descriptor: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """As the contract says; `descriptor` `(B, C)` for the core `inline` is the mean of the tokens unless given."""
        self.check_call(x, context=context, mask=mask, segment_ids=segment_ids, positions=positions)
        x = jnp.asarray(x)
        if x.shape[1:3] != self.grid:
            raise ValueError(f"CrossShapedWindowAttention was built for the grid {self.grid}, got x of shape {x.shape}")
        if descriptor is None:
            descriptor = x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)
        count = len(self.branches)
        projected = jnp.split(self.query_key_value(x), 3, -1)
        parts = [jnp.split(t, count, -1) for t in (*projected, descriptor)]
        record(
            self,
            "attention",
            lambda: jnp.concatenate([b.attention(q, k) for b, q, k in zip(self.branches, *parts[:2], strict=True)], 1),
        )
        branches = zip(self.branches, *parts, strict=True)
        y = [branch(q, k, v, d, deterministic=deterministic) for branch, q, k, v, d in branches]
        y = self.projection(jnp.concatenate(y, -1))
        return y if self.dropout is None else self.dropout(y, deterministic=deterministic)
