"""CSwin Transformer (Dong et al., CVPR 2022, arXiv:2107.00652).

A 7x7 convolution of stride 4 and a norm make the tokens; 3x3 convolutions of stride 2, each with a norm, double the
channels between four stages of pre-norm blocks, of attention in cross-shaped windows where no other mixer is chosen. A
norm, the mean over tokens and a linear classifier end it. The code is at microsoft/CSWin-Transformer.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.attention.local.cross_shaped_windows import PAPER, CrossShapedWindowAttention, softmax_core
from attnlab.models import staged
from attnlab.models.staged import Choice, Mixers, Models, Stage, StagedBackbone
from attnlab.nn.conv import ConvNorm
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.linear import trunc_normal
from attnlab.nn.norms import LayerNorm
from attnlab.registry import Cost, Kind, Source, register


@register(
    "cswin.backbone",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="microsoft/CSWin-Transformer",
    cost=Cost(time="O(N·s·(Hh+Ww)·C)", memory="O(N·s·(Hh+Ww)·H)"),
    summary="four stages of attention in cross-shaped windows, whose stripes widen",
    small={
        "features": 8,
        "num_heads": (2, 2),
        "depths": (1, 1),
        "splits": (2, 4),
        "mlp_ratio": 1.0,
        "image_size": 32,
        "num_classes": 5,
    },
)
class CSwinTransformer(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are CSwin-T.

    Args:
      features: channels C of the first stage; each later stage has twice as many.
      num_heads: heads per stage.
      depths: blocks per stage.
      mixers: what takes the place of attention in cross-shaped windows, in all stages or in each.
      replaced: in how many of the first blocks of each stage; in all where it is None.
      splits: width of the stripes per stage. The last stage always has one window.
      padded: whether stripes that do not tile the tokens are padded with zeros, for images of any size.
      scale: of the scores in these, D^-1/2 when None.
      qkv_bias: whether queries, keys and values have a bias.
      mlp_ratio: hidden channels over channels.
      image_size: pixels on a side, or (rows, columns); None for any, with padded stripes.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      norm_eps: of the norms in blocks and of the last.
      attention_dropout: rate on attention weights, in mixers that have them.
      dropout: rate inside feed-forwards; the authors' code leaves what mixers return without dropout.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the lists have different lengths, or the image cannot be divided by 4 and halved between stages,
        which stripes that are not padded need.
    """

    def __init__(
        self,
        features: int = 64,
        *,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        depths: Sequence[int] = (1, 2, 21, 1),
        mixers: Mixers = None,
        replaced: Sequence[int | None] | None = None,
        splits: Sequence[int] = (1, 2, 7, 7),
        padded: bool = False,
        scale: float | None = None,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        image_size: int | Sequence[int] | None = 224,
        channels: int = 3,
        num_classes: int | None = 1000,
        norm_eps: float = 1e-5,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        staged.per_stage(len(depths), splits=splits)
        if image_size is None and not padded:
            raise ValueError("image_size may be None with padded stripes only")
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        shared = {"qkv_bias": qkv_bias, "attention_dropout": attention_dropout}
        block = {"mlp_ratio": mlp_ratio, "norm_eps": norm_eps, "dropout": dropout, "shared": shared} | common
        core = functools.partial(softmax_core, scale=scale, dropout=attention_dropout)
        widths, last = [features << stage for stage in range(len(depths))], len(depths) - 1
        places = staged.places(
            widths,
            [None] * len(depths) if padded else staged.halved_grids(image_size, 4, len(depths)),
            num_heads=num_heads,
            depths=depths,
            own=[
                Choice(
                    CrossShapedWindowAttention,
                    {"core": core, "split": split, "whole": stage == last, "padded": padded},
                )
                for stage, split in enumerate(splits)
            ],
            mixers=mixers,
            replaced=replaced,
            drop_path=drop_path,
        )
        norm = functools.partial(LayerNorm, eps=1e-5)
        stages = []
        for stage, here in enumerate(places):
            down = ConvNorm(widths[stage - 1], widths[stage], 3, stride=2, norm=norm, **common) if stage else None
            stages.append(Stage([staged.transformer_block(place, **block) for place in here], down=down))
        super().__init__(
            ConvNorm(channels, features, 7, stride=4, padding=[(2, 2)] * 2, norm=norm, **common),
            stages,
            norm=LayerNorm(widths[-1], eps=norm_eps, param_dtype=param_dtype, rngs=rngs),
            head=staged.classifier(widths[-1], num_classes, **common),
            image_size=None if image_size is None else staged.pair(image_size),
            channels=channels,
            dtype=dtype,
        )
        redraw_kernels(self, trunc_normal, rngs=rngs)


_BASE = {"features": 96, "num_heads": (4, 8, 16, 32), "depths": (2, 4, 32, 2)}
_LARGE = _BASE | {"features": 144, "num_heads": (6, 12, 24, 24)}
_WIDE = {"splits": (1, 2, 12, 12), "image_size": 384}
CSWINS: Models = {
    "cswin_tiny": (CSwinTransformer, {}),
    "cswin_small": (CSwinTransformer, {"depths": (2, 4, 32, 2)}),
    "cswin_base": (CSwinTransformer, _BASE),
    "cswin_base_384": (CSwinTransformer, _BASE | _WIDE),
    "cswin_large": (CSwinTransformer, _LARGE),
    "cswin_large_384": (CSwinTransformer, _LARGE | _WIDE),
}
"""For `staged.build_named`: 23, 35, 78 and 173 M parameters (82.8, 83.6, 84.2 % on ImageNet, and 86.5 % with 22K)."""
