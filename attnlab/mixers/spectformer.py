"""SpectFormer's spectral gating (Patro et al., 2023, arXiv:2304.06446; code: badripatro/SpectFormers).

    y = irfft(W ⊙ rfft(x))        over all axes of the grid, per channel, orthonormal, in float32

The filter of GFNet, with one complex weight W for each frequency and channel: a depthwise circular convolution as large
as the grid. With W = 1 it is the identity, and it commutes with cyclic shifts. There are no projections, and no mask:
the whole grid is there. The authors' hierarchical code fixes grids by the number of channels (56 for 64 and 96, 28 for
128 and 192); here they are given. Cost O(N log N) per channel.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Given, Layout, TokenMixer
from attnlab.nn.spectral import GlobalFilter, spectrum_of
from attnlab.registry import Cost, Paper, Source, register

PAPER = Paper(
    "SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
    "Patro et al.",
    2023,
    arxiv="2304.06446",
    number=57,
)


@register(
    "spectformer",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="badripatro/SpectFormers",
    cost=Cost(time="O(N·log(N)·C)", memory="O(N·C)"),
    summary="every frequency of the grid of tokens has a learned complex factor, per channel",
)
class SpectralGating(TokenMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      grid: lengths of the token axes, which the weights are made for.
      layout: of the tokens.
      dtype: of the result; that of the tokens when None. The transforms are float32.
      param_dtype: of the weights.
      rngs: stream `params`.

    Raises:
      ValueError: without a grid, or for one of another layout.
    """

    layouts = frozenset(Layout)

    def __init__(
        self,
        features: int,
        *,
        grid: tuple[int, ...] | None = None,
        layout: Layout = Layout.IMAGE,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.features, self.layout, self.dtype = features, Layout(layout), dtype
        if grid is None or len(grid) != self.layout.axes:
            raise ValueError(f"grid must be the {self.layout.axes} lengths of the axes of the {layout}, got {grid}")
        self.grid = tuple(grid)
        self.filter = GlobalFilter(features, spectrum_of(self.grid), param_dtype=param_dtype, rngs=rngs)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        if x.shape[1:-1] != self.grid:
            raise ValueError(f"SpectralGating was built for the grid {self.grid}, got x of shape {x.shape}")
        return self.filter(x)
