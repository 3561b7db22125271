"""Multi-axis attention (MaxViT, Tu et al., ECCV 2022, arXiv:2204.01697): windows, then a grid of distant tokens.

Tokens attend in groups of P x Q, with softmax and a learned bias for each offset between two places of a group:

    Y = softmax(Q Kᵀ / √D + B) V,    B[i, j] = table[(r_i - r_j, c_i - c_j)]     (H, n, n), n = P·Q

    block: a group is a window of P x Q tokens side by side
    grid:  P x Q tokens spread evenly over the image: (a · Hh/P + u, b · Ww/Q + v) for group (u, v)

One of each after the other lets every token see all, in time linear in N: O(N·n·C) time, O(N·n·H) memory. The places
must divide the image, as in the paper. The authors' TensorFlow code takes offsets as key - query, which loading undoes.

Reference for names and defaults: timm's port, which loads the weights of google-research/maxvit.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Site
from attnlab.nn.grid_mixer import GridMixer
from attnlab.nn.position_bias import RelativePositionBias
from attnlab.nn.softmax_core import SoftmaxCore
from attnlab.nn.windows import DilatedWindows, ShiftedWindows, Windows
from attnlab.registry import Cost, Paper, Source, register

PAPER = Paper("MaxViT: Multi-Axis Vision Transformer", "Tu et al.", 2022, arxiv="2204.01697", number=14)

PARTITIONS: dict[str, type[Windows]] = {"block": ShiftedWindows, "grid": DilatedWindows}
"""The two ways to cut images, by name; both are built of the size of a group alone."""


def groups_of(kind: str, window: int | tuple[int, int]) -> Windows:
    """The groups of an image.

    Args:
      kind: `block` or `grid`.
      window: rows and columns of a group, or one number for both.

    Raises:
      ValueError: for another kind, or a size below 1.
    """
    if kind not in PARTITIONS:
        raise ValueError(f"partition must be {' or '.join(PARTITIONS)}, got {kind!r}")
    return PARTITIONS[kind]((window, window) if isinstance(window, int) else tuple(window))


@register(
    "maxvit",
    paper=PAPER,
    source=Source.THIRD_PARTY,
    repository="huggingface/pytorch-image-models",
    cost=Cost(time="O(N·n·C)", memory="O(N·n·H)"),
    summary="softmax attention in windows (block) or, in every other layer, of tokens spread over the image (grid)",
    small={"partition": "grid"},
)
class PartitionAttention(GridMixer):
    """Softmax attention in the groups of one of both partitions, with its projections.

    Args:
      features: channels C.
      num_heads: heads H.
      partition: `block` or `grid`; grid in odd layers when None.
      window: rows and columns of a group, one number for both; they must divide those of the image.
      grid: rows and columns of the image, if the model fixes them.
      layer: index of the layer, which the default of `partition` looks at.
      scale: of the scores, D^-1/2 when None.
      qkv_bias: whether queries, keys and values have a bias.
      out_bias: whether the result has a bias.
      relative_bias: whether scores have the learned bias of offsets.
      attention_dropout: rate on the weights.
      projection_dropout: rate on the result.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the heads do not divide the channels, or groups do not tile the grid; for another partition.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        partition: str | None = None,
        window: int | tuple[int, int] = 7,
        grid: tuple[int, int] | None = None,
        layer: int = 0,
        scale: float | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        relative_bias: bool = True,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        groups = groups_of(("block", "grid")[layer % 2] if partition is None else partition, window)
        super().__init__(
            features,
            num_heads=num_heads,
            grid=grid,
            window=groups.size,
            qkv_bias=qkv_bias,
            projection_dropout=projection_dropout,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.windows = groups
        if not out_bias:
            self.out.bias = nnx.data(None)
        bias = RelativePositionBias(groups.size, num_heads, param_dtype=param_dtype, rngs=rngs)
        self.core = SoftmaxCore(
            num_heads, bias=bias if relative_bias else None, scale=scale, dropout=attention_dropout, rngs=rngs
        )

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        """Groups that tile the grid: per axis the most of at most 7 tokens that are not all, or all."""
        if site.grid is None or len(site.grid) != 2:
            return {}
        fitting = ([w for w in range(2, min(8, n)) if n % w == 0] for n in site.grid)
        return {"window": tuple(max(some, default=n) for some, n in zip(fitting, site.grid, strict=True))}
