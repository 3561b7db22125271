"""Attention in cross-shaped windows (CSWin Transformer, Dong et al., CVPR 2022, arXiv:2107.00652).

Queries, keys and values are projected once. The first half of the channels attends inside stripes of full height and
`split` columns, the second half inside stripes of full width and `split` rows; if one window covers the image, there
is one branch with all channels. A depthwise 3x3 convolution of the values inside each stripe is added (LePE: locally
enhanced position), and the branches are concatenated and projected:

    y = [branch_vertical(Q₁, K₁, V₁); branch_horizontal(Q₂, K₂, V₂)] W_o,    branch = core(Q, K, V) + LePE(V)

The core of the paper is softmax attention. Others take its place in the models of later papers: agent attention
(arXiv:2312.08874), `core=functools.partial(AgentCore, num_agents=9)`, and InLine attention (arXiv:2412.06590), the
latter with one window, since the kernel of its convolution is one per image. Cost with softmax O(N·split·(Hh+Ww)·C)
time.

For dense prediction stripes need not tile the image (`padded`): queries, keys and values are padded with zeros, half of
them on either side, which are attended to. The paper writes that horizontal stripes have the first heads; in the
authors' code, and here, the vertical ones do.

Reference for names and defaults: microsoft/CSWin-Transformer.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.contract import Given, Layout, Site, TokenMixer, View, constructor_parameters, record
from attnlab.nn.dense_mixer import Core, Heads, HeadSizes
from attnlab.nn.depthwise import DepthwiseConv, on_tokens
from attnlab.nn.grids import to_tokens
from attnlab.nn.heads import FromHeads, ToHeads, split_heads
from attnlab.nn.softmax_core import SoftmaxCore
from attnlab.nn.windows import ShiftedWindows
from attnlab.points import visit
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper(
    "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows",
    "Dong et al.",
    2022,
    arxiv="2107.00652",
    number=17,
)

CoreBuilder = Callable[..., Core]
"""Builds a branch's core: `(features, *, num_heads, grid, param_dtype, rngs) -> Core`, the grid that of a window.

A core of padded windows, whose size follows from the image, is built without the grid."""


def softmax_core(
    features: int,
    *,
    num_heads: int,
    grid: tuple[int, int] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> SoftmaxCore:
    """The core of the paper, which has no parameters.

    Args:
      features: channels of the branch.
      num_heads: heads of the branch.
      grid: rows and columns of a window.
      scale: of the scores, D^-1/2 when None.
      dropout: rate on the weights.
      param_dtype: of parameters, of which there are none.
      rngs: stream `dropout` if there is any.
    """
    return SoftmaxCore(num_heads, scale=scale, dropout=dropout, rngs=rngs)


def _needs_grid(core: CoreBuilder) -> bool:
    builder = core.func if isinstance(core, functools.partial) else core
    known = constructor_parameters(builder) if isinstance(builder, type) else inspect.signature(builder).parameters
    return known["grid"].default is inspect.Parameter.empty


class StripeAttention(nnx.Module):
    """One branch: a core inside windows, plus the convolution of the values there.

    Args:
      features: channels of the branch.
      num_heads: heads of the branch.
      window: rows and columns of a window; None where it has all of the image's, whatever they are.
      padded: whether images that the windows do not tile are padded with zeros on both sides, which are attended to.
      core: builds the core.
      dtype: of the convolution; that of the values when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if heads do not divide the channels, or the core does not fit, or needs the grid of a window that the
        image decides.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        window: tuple[int | None, int | None],
        padded: bool = False,
        core: CoreBuilder = softmax_core,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        sizes = HeadSizes.of(features, num_heads)
        common = {"param_dtype": param_dtype, "rngs": rngs}
        self.window, self.padded = tuple(window), padded
        rows, columns = self.window
        if rows is not None and columns is not None:
            grid = {"grid": (rows, columns)}
        elif _needs_grid(core):
            raise ValueError(f"core must do without the grid where the image decides on the window, got {core}")
        else:
            grid = {}
        self.core = core(features, num_heads=num_heads, **grid, **common)
        self.core.check(sizes, Layout.IMAGE)
        self.position = DepthwiseConv((num_heads, sizes.value_size), (3, 3), dtype=dtype, **common)

    def windows(self, grid: Sequence[int]) -> ShiftedWindows:
        """The windows of an image of `grid` tokens."""
        rows, columns = (length if side is None else side for side, length in zip(self.window, grid, strict=True))
        return ShiftedWindows((rows, columns))

    def __call__(self, heads: Heads, grid: tuple[int, int], *, deterministic: bool = True) -> jax.Array:
        """`(B, N, H, E)` from the branch's heads of all tokens of the image.

        Raises:
          ValueError: if the windows do not tile the image, or the core needs one that covers it.
        """
        heads, whole, place = self._padded(heads, grid)
        windows = self.windows(grid)
        heads = windows.heads(heads, whole)
        y, _ = self.core(heads, View(), deterministic=deterministic)
        y = windows.merge(y + on_tokens(self.position, heads.v, windows.size), whole)
        return y if place is None else y[:, place]

    def attention(self, heads: Heads, grid: tuple[int, int]) -> jax.Array:
        """Weights of each query on each key of the image, `(B, H, N, N)`, without the convolution."""
        heads, whole, place = self._padded(heads, grid)
        windows = self.windows(grid)
        weights = windows.scatter_map(self.core.attention(windows.heads(heads, whole), View()), whole)
        return weights if place is None else weights[:, :, place][..., place]

    def _padded(self, heads: Heads, grid: tuple[int, int]) -> tuple[Heads, tuple[int, int], np.ndarray | None]:
        """Heads on a grid that the windows tile, that grid, and which of its tokens are the image's (None for all)."""
        extra = [-length % side for length, side in zip(grid, self.windows(grid).size, strict=True)]
        if not self.padded or not any(extra):
            return heads, grid, None
        widths = [(count // 2, count - count // 2) for count in extra]
        rows, columns = (length + count for length, count in zip(grid, extra, strict=True))

        def fill(part: jax.Array) -> jax.Array:
            image = part.reshape(part.shape[0], *grid, *part.shape[2:])
            image = jnp.pad(image, [(0, 0), *widths, (0, 0), (0, 0)])
            return image.reshape(part.shape[0], rows * columns, *part.shape[2:])

        real = np.flatnonzero(np.pad(np.ones(grid, bool), widths))
        return Heads(*(fill(part) for part in heads[:3]), heads.extra), (rows, columns), real


@register(
    "cswin",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="microsoft/CSWin-Transformer",
    cost=Cost(time="O(N·s·(Hh+Ww)·C)", memory="O(N·s·(Hh+Ww)·H)"),
    summary="softmax attention in stripes, vertical ones for half of the heads, horizontal for the others",
)
class CrossShapedWindowAttention(TokenMixer):
    """Attention in stripes of two directions, with its projections.

    Args:
      features: channels C.
      num_heads: H, half of them for each direction.
      grid: rows and columns of the image; needed unless stripes are padded, which then fit images of any size.
      split: columns of the vertical and rows of the horizontal stripes.
      whole: one branch, whose window is the image; also if no side of it is longer than `split`, unless padded.
      padded: whether images that stripes do not tile are padded with zeros behind the projections, half of them on
        either side; they are attended to.
      core: builds the core of a branch; options of a core are bound to its builder by `functools.partial`.
      qkv_bias: whether queries, keys and values have a bias.
      projection_dropout: rate on the result.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if `grid` is missing, stripes do not tile it, heads do not divide the channels of a branch, or the
        core of padded stripes needs their grid.
    """

    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE
    points = frozenset({"qkv", "heads"})
    # Each direction has half of the heads, so that a device's heads go to the one that has the other half of its own.
    collectives = frozenset({"all-to-all", "collective-permute"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        grid: tuple[int, int] | None = None,
        split: int = 7,
        whole: bool = False,
        padded: bool = False,
        core: CoreBuilder = softmax_core,
        qkv_bias: bool = True,
        projection_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if grid is None and not padded:
            raise ValueError("CrossShapedWindowAttention needs the grid (rows, columns) of its tokens")
        self.features, self.num_heads, self.dtype = features, num_heads, dtype
        self.grid = None if padded else tuple(grid)
        rows, columns = (None, None) if padded else self.grid
        whole = whole or (self.grid is not None and max(self.grid) <= split)
        windows = ((rows, columns),) if whole else ((rows, split), (split, columns))
        if not whole and (num_heads % 2 or features % 2):
            raise ValueError(f"two branches need an even number of heads and channels, got {num_heads} and {features}")
        _, size, _ = HeadSizes.of(features, num_heads)
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query, self.key, self.value = (
            ToHeads(features, num_heads, size, use_bias=qkv_bias, **common) for _ in range(3)
        )
        self.branches = nnx.List(
            StripeAttention(
                features // len(windows),
                num_heads=num_heads // len(windows),
                window=window,
                padded=padded,
                core=core,
                **common,
            )
            for window in windows
        )
        for branch in self.branches:
            if self.grid is not None:
                branch.windows(self.grid).check(self.grid)
        self.out = FromHeads(num_heads, size, features, **common)
        self.dropout = nnx.Dropout(projection_dropout, rngs=rngs) if projection_dropout > 0 else nnx.data(None)

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        """Stripes of the widest common divisor of rows and columns up to 7; one window for an odd number of heads."""
        if site.grid is None or len(site.grid) != 2:
            return {}
        split = max(s for s in range(1, 8) if not (site.grid[0] % s or site.grid[1] % s))
        return {"split": split, "whole": bool(site.num_heads % 2)}

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        return self.attend(x, x.mean((1, 2), dtype=at_least_float32(x.dtype)).astype(x.dtype), given)

    def attend(self, x: jax.Array, mean: jax.Array, given: Given) -> jax.Array:
        """As a call, with a `mean` `(B, C)` for cores that look at the image as a whole; of the tokens in a call."""
        grid = x.shape[1:3]
        if self.grid not in (None, grid):
            raise ValueError(f"CrossShapedWindowAttention was built for the grid {self.grid}, got x of shape {x.shape}")
        tokens = to_tokens(x)
        heads = Heads(self.query(tokens), self.key(tokens), self.value(tokens), (split_heads(mean, self.num_heads),))
        heads = visit(self, given.edits, "qkv", heads)
        count = len(self.branches)
        pairs = [
            (branch, jax.tree.map(lambda part, i=index: jnp.split(part, count, -2)[i], heads))
            for index, branch in enumerate(self.branches)
        ]
        record(self, "attention", lambda: jnp.concatenate([b.attention(share, grid) for b, share in pairs], axis=1))
        y = [branch(share, grid, deterministic=given.deterministic) for branch, share in pairs]
        y = self.out(visit(self, given.edits, "heads", jnp.concatenate(y, 2))).reshape(x.shape)
        return y if self.dropout is None else self.dropout(y, deterministic=given.deterministic)
