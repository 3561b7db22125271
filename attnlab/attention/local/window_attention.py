"""Window attention of the Swin Transformer (Liu et al., ICCV 2021, arXiv:2103.14030).

An image is tiled by windows of w x w tokens, and softmax attention runs inside each, with a learned bias for each
offset between two tokens:

    Y = softmax(Q Kᵀ / √D + B) V,    B[i, j] = table[(r_i - r_j, c_i - c_j)]     (H, n, n), n = w²

In every other layer the windows are shifted cyclically by half a window, and tokens that were not neighbours before
the shift do not see each other. Cost O(N·n·C) time, O(N·n·H) memory. The authors' code adds -100 to the scores of
such pairs; here their weights are exactly zero.

Reference for names and defaults: microsoft/Swin-Transformer.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.contract import Site, View
from attnlab.nn.grid_mixer import GridMixer
from attnlab.nn.position_bias import RelativePositionBias
from attnlab.nn.softmax_core import SoftmaxCore
from attnlab.nn.windows import ShiftedWindows
from attnlab.registry import Cost, Paper, Source, register


@register(
    "window_attention",
    paper=Paper(
        "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", "Liu et al.", 2021, "2103.14030"
    ),
    source=Source.PAPER_TEXT,
    repository="microsoft/Swin-Transformer",
    cost=Cost(time="O(N·n·C)", memory="O(N·n·H)"),
    summary="softmax attention inside windows with relative position bias, shifted in every other layer",
)
class WindowAttention(GridMixer):
    """Softmax attention inside windows of an image, with its projections.

    Args:
      features: channels C.
      num_heads: H.
      window: rows and columns of a window, one number for both; they must tile the image unless it is padded.
      shift: of the windows; half a window in odd layers when None, except along an axis that one window covers.
      padded: whether images that the windows do not tile are padded with zeros, which are attended to like others.
      grid: rows and columns of the image, if the model fixes them; the default of `shift` looks at it.
      layer: index of the layer, which the default of `shift` looks at.
      scale: of the scores, D^-1/2 when None.
      qkv_bias: whether queries, keys and values have a bias.
      relative_bias: whether scores have the learned bias of offsets.
      attention_dropout: rate on the weights.
      projection_dropout: rate on the result.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the heads do not divide the channels, or the windows do not tile the grid.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        window: int | tuple[int, int] = 7,
        shift: int | tuple[int, int] | None = None,
        padded: bool = False,
        grid: tuple[int, int] | None = None,
        layer: int = 0,
        scale: float | None = None,
        qkv_bias: bool = True,
        relative_bias: bool = True,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        size = ShiftedWindows(window).size
        if shift is None:
            lengths = (None, None) if grid is None else grid
            shift = tuple(0 if layer % 2 == 0 or w == n else w // 2 for w, n in zip(size, lengths, strict=True))
        super().__init__(
            features,
            num_heads=num_heads,
            grid=grid,
            window=size,
            shift=shift,
            padded=padded,
            qkv_bias=qkv_bias,
            projection_dropout=projection_dropout,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        bias = RelativePositionBias(size, num_heads, param_dtype=param_dtype, rngs=rngs) if relative_bias else None
        self.core = SoftmaxCore(num_heads, bias=bias, scale=scale, dropout=attention_dropout, rngs=rngs)

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        """Windows that tile the grid: per axis the longest of at most 7 tokens, the whole axis if none but 1 does."""
        if site.grid is None or len(site.grid) != 2:
            return {}
        fitting = (max(w for w in range(1, 8) if length % w == 0) for length in site.grid)
        return {"window": tuple(length if w == 1 else w for w, length in zip(fitting, site.grid, strict=True))}

    def view(self, grid: tuple[int, int], batch: int, real: np.ndarray | None = None) -> View:
        region = self.windows.same_region(grid)
        return View(mask=None if region is None else jnp.tile(region, (batch, 1, 1))[:, None])
