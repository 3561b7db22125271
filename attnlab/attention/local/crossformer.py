"""Long and short distance attention (CrossFormer, Wang et al., ICLR 2022, arXiv:2108.00154).

Tokens attend in groups of G x G, with softmax and a bias that a small network makes of the offset:

    Y = softmax(Q Kᵀ / √D + B) V,    B[i, j] = network(r_i - r_j, c_i - c_j)

    short distance: a group is a window of G x G tokens
    long distance: in tiles of G·I x G·I tokens, those at (a·I + u, b·I + v), a and b below G, are group (u, v)

The offsets are those of places in the group, not of the image, in long distance too. The paper samples the whole image
(I = side / G); in the authors' code, and here, I is a number of the stage, so that groups are local to a tile. Images
that the tiles do not tile are padded with zeros, as keys not seen; where a side is not longer than G, groups are
windows of that side. Cost O(N·G²·C) time, O(N·G²·H) memory, and (2 G - 1)² runs of the network.

    network(Δ) = W₃ f(W₂ f(W₁ f(W₀ Δ))),    f = relu ∘ LN,    with p channels: C / 16
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Site, View
from attnlab.nn.activations import relu
from attnlab.nn.grid_mixer import GridMixer
from attnlab.nn.linear import Linear
from attnlab.nn.norms import LayerNorm
from attnlab.nn.position_bias import NetworkBias
from attnlab.nn.positions import grid_positions
from attnlab.nn.softmax_core import SoftmaxCore
from attnlab.nn.windows import DilatedWindows, ShiftedWindows, Windows
from attnlab.registry import Cost, Paper, Source, register

PAPER = Paper(
    "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention",
    "Wang et al.",
    2022,
    arxiv="2108.00154",
    number=88,
)


def groups(grid: tuple[int, int], group: int = 7, interval: int | None = 8, *, long: bool = False) -> Windows:
    """The groups in which the tokens of an image attend.

    Args:
      grid: rows and columns of tokens.
      group: G, tokens on a side of a group.
      interval: I, between the tokens of a group of long distance; None for the least with which a group spans all rows.
      long: whether tokens attend at long distance, if no side is so short that it is one group.

    Returns:
      Windows, which tile the image or not.
    """
    side = min(group, *grid)
    if not long or min(grid) <= group:
        return ShiftedWindows((side, side))
    step = -(-grid[0] // group) if interval is None else interval
    return DilatedWindows((side, side), (step, step))


class DynamicPositionBias(nnx.Module):
    """The network that makes biases of offsets: `(K, 2)` to `(K, H)`.

    Args:
      features: channels p.
      num_heads: heads H.
      residual: whether each of the two maps in the middle is added to what goes into it.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        residual: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = {"param_dtype": param_dtype, "rngs": rngs}
        self.residual = residual
        self.project = Linear(2, features, axes=(None, None), **common)
        self.norm = nnx.List(LayerNorm(features, eps=1e-5, **common) for _ in range(3))
        self.map = nnx.List(Linear(features, features, axes=(None, None), **common) for _ in range(2))
        self.last = Linear(features, num_heads, axes=(None, "heads"), **common)

    def __call__(self, offsets: ArrayLike) -> jax.Array:
        """`(K, 2)`, in tokens, to `(K, H)`."""
        x = self.project(offsets)
        for norm, layer in zip(self.norm, self.map, strict=False):
            y = layer(relu(norm(x)))
            x = x + y if self.residual else y
        return self.last(relu(self.norm[-1](x)))


class GroupCore(SoftmaxCore):
    """Softmax attention in groups of several sizes: the bias is that of the group, which the view's positions tell."""

    def _bias(self, view: View) -> jax.Array | None:
        if self.bias is None:
            return None
        rows, columns = np.asarray(view.q_at)[0, -1] + 1
        return self.bias((int(rows), int(columns)))


@register(
    "crossformer",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="cheerss/CrossFormer",
    cost=Cost(time="O(N·G²·C)", memory="O(N·G²·H)"),
    summary="softmax attention in windows and, in every other layer, of tokens at a distance, biased by a network",
    small={"group": 2, "interval": 2, "long": True, "bias_features": 4},
)
class LongShortDistanceAttention(GridMixer):
    """Softmax attention in groups of an image of any size, with its projections.

    Args:
      features: channels C.
      num_heads: heads H.
      group: G, tokens on a side of a group.
      interval: I, between the tokens of a group of long distance; None for the least with which a group spans all rows.
      long: whether tokens attend at long distance; in odd layers when None.
      layer: index of the layer, which the default of `long` looks at.
      bias_features: channels p of the network of the biases; C / 16 when None.
      position_bias: whether there are biases.
      hide_padding: whether what an image is padded with is hidden; else zeros are attended to like other tokens, with
        the biases of the projections as keys and values.
      centred: whether half of the padding stands in front of the image, not all behind it.
      scale: of the scores, D^-1/2 when None.
      qkv_bias: whether queries, keys and values have a bias.
      attention_dropout: rate on the weights.
      projection_dropout: rate on the result.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the heads do not divide the channels, or the group or the interval is less than 1.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        group: int = 7,
        interval: int | None = 8,
        long: bool | None = None,
        layer: int = 0,
        bias_features: int | None = None,
        position_bias: bool = True,
        hide_padding: bool = True,
        centred: bool = False,
        scale: float | None = None,
        qkv_bias: bool = True,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if group < 1 or (interval is not None and interval < 1):
            raise ValueError(f"group and interval must be at least 1, got {group} and {interval}")
        super().__init__(
            features,
            num_heads=num_heads,
            window=group,
            padded=True,
            qkv_bias=qkv_bias,
            projection_dropout=projection_dropout,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.group, self.interval, self.long = group, interval, layer % 2 == 1 if long is None else long
        self.hide_padding, self.centred = hide_padding, centred
        bias = None
        if position_bias:
            width = max(features // 16, 1) if bias_features is None else bias_features
            network = DynamicPositionBias(width, num_heads, param_dtype=param_dtype, rngs=rngs)
            bias = NetworkBias((group, group), network)
        self.core = GroupCore(num_heads, bias=bias, scale=scale, dropout=attention_dropout, rngs=rngs)

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        """Groups of at most 7 tokens a side whose tiles of long distance are not larger than the grid."""
        if site.grid is None or len(site.grid) != 2:
            return {}
        group = min(7, max(min(site.grid) // 2, 1))
        return {"group": group, "interval": min(8, max(min(site.grid) // group, 1))}

    def windows_on(self, grid: tuple[int, int]) -> Windows:
        return groups(grid, self.group, self.interval, long=self.long)

    def padding(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        windows = self.windows_on(grid)
        steps = windows.interval if isinstance(windows, DilatedWindows) else (1, 1)
        spans = (side * step for side, step in zip(windows.size, steps, strict=True))
        extra = [-length % span for length, span in zip(grid, spans, strict=True)]
        return [(n // 2, n - n // 2) if self.centred else (0, n) for n in extra]

    def view(self, grid: tuple[int, int], batch: int, real: np.ndarray | None = None) -> View:
        windows = self.windows_on(grid)
        places, mask = grid_positions(windows.size), None
        if real is not None and self.hide_padding:
            seen = jnp.broadcast_to(real.reshape(1, -1, 1), (batch, real.size, 1))
            mask = windows.partition(seen, grid)[..., 0]
        return View(q_at=places, k_at=places, mask=mask)
