"""Flowformer for images (Wu et al., ICML 2022, arXiv:2202.06258): a pyramid of Flow-Attention.

    x = x + flow(LN(x));   x = x + γ MLP(LN(x))          a block

Patches of 4 pixels, a learned position of each in front of the first stage alone, 2x2 convolutions between the stages,
no norm behind either; 12 heads in all stages. The code is at thuml/Flowformer, Flowformer_CV/flowformer.py; its flows
have ε once more than the core code's.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.attention.linear.flowformer import PAPER, FlowAttention
from attnlab.models import staged
from attnlab.models.pyramid import Pyramid
from attnlab.models.staged import Choice, Models
from attnlab.nn.positions import PositionTable
from attnlab.registry import Cost, Kind, Source, register

IMAGES = Choice(FlowAttention, {"flow_eps": 1e-6})


@register(
    "flowformer.backbone",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="thuml/Flowformer",
    cost=Cost(time="O(N·C·D)", memory="O(N·C)"),
    summary="a pyramid of stages of Flow-Attention",
    small={"features": (8, 16), "num_heads": (2, 2), "depths": (1, 1), "image_size": 32, "num_classes": 5},
)
class Flowformer(Pyramid):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are the paper's model.

    Args:
      features: channels C of each stage.
      num_heads: heads of each stage.
      depths: blocks of each stage.
      mlp_scale: γ at the start.
      dropout: rate inside feed-forwards.
      image_size: pixels on a side, or (rows, columns), multiples of the last stage's stride; others are refused.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `Pyramid`: mixers in place of these, sizes, rates.

    Raises:
      ValueError: for lists of different lengths, or an image that patches do not tile.
    """

    def __init__(
        self,
        features: Sequence[int] = (96, 192, 384, 768),
        *,
        num_heads: Sequence[int] = (12, 12, 12, 12),
        depths: Sequence[int] = (2, 2, 10, 4),
        mlp_scale: float = 0.001,
        dropout: float = 0.0,
        image_size: int | Sequence[int] = 224,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        grid = staged.halved_grids(image_size, 4, len(depths))[0]
        super().__init__(
            features,
            own=[IMAGES],
            stem={"kernel_size": 4, "padding": "VALID", "norm": None},
            down={"kernel_size": 2, "padding": "VALID", "norm": None},
            position=PositionTable(grid, features[0], param_dtype=param_dtype, rngs=rngs),
            num_heads=num_heads,
            depths=depths,
            block={"mlp_scale": mlp_scale, "dropout": dropout},
            image_size=image_size,
            param_dtype=param_dtype,
            rngs=rngs,
            **family,
        )


FLOWFORMERS: Models = {"flowformer": (Flowformer, {})}
"""For `staged.build_named`: the 18 layers with which the authors report 80.6 % on ImageNet-1K."""
