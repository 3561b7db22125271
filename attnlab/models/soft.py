"""SOFT's vision transformer (Lu et al., IJCV 2024, arXiv:2207.03341): three stages of SOFT, a last one of softmax.

    x = LN(x + soft(x));   x = LN(x + MLP(x))                             a block of the first three stages
    x = x + attention(LN(x));   x = x + MLP(LN(x))                        of the last, behind a class token

Strided 3x3 convolutions with batch norm and ReLU make the tokens of each stage; learned positions, of 56, 28, 14 and 7
tokens on a side, are resized to those of the image. MLPs of the first stages are four times as wide as their input and
have the tanh form of GELU, and what the last stage drops by whole examples (stochastic depth) they drop by entries.
The code is at fudan-zvg/SOFT.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.attention.linear.soft import PAPER, SoftmaxFreeAttention
from attnlab.models import staged
from attnlab.models.block import Block
from attnlab.models.staged import Choice, Mixers, Models, Place, Prefix, Stage, StagedBackbone
from attnlab.nn.activations import gelu_tanh, relu
from attnlab.nn.conv import ConvNorm, ConvStem
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.linear import trunc_normal
from attnlab.nn.norms import BatchNorm, LayerNorm
from attnlab.nn.positions import PositionTable
from attnlab.registry import Cost, Kind, Source, register

SIDES = (56, 28, 14, 7)
"""Positions on a side of the tables of the stages."""


def soft_block(place: Place, *, rngs: nnx.Rngs, **common: Any) -> Block:
    """A post-norm block of the first three stages."""
    mlp = {"activation": gelu_tanh}
    block = staged.transformer_block(place, norm_eps=1e-5, mlp=mlp, order="post", rngs=rngs, **common)
    if place.drop_path > 0:
        block.drop_path = nnx.Dropout(place.drop_path, rngs=rngs)
    return block


@register(
    "soft.backbone",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="fudan-zvg/SOFT",
    cost=Cost(time="O(N·m·C + H·m³) per block", memory="O(N·m·H)"),
    summary="three stages of softmax-free attention, a last one of softmax attention with a class token",
    small={
        "features": (8, 8, 8, 16),
        "num_heads": (2, 2, 2, 2),
        "depths": (1, 1, 1, 1),
        "ratios": (4, 2, 1),
        "iterations": 6,
        "image_size": 32,
        "num_classes": 5,
    },
)
class SoftVisionTransformer(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are SOFT-tiny.

    Args:
      features: channels C of the four stages.
      num_heads: heads of each stage.
      depths: blocks of each stage.
      ratios: tokens along each axis that make one landmark, in the first three stages.
      conv_sizes: sides of the convolutions of values there.
      iterations: of Newton's rule.
      normalized: the form of SOFT++.
      shared_start: a start value for the whole batch, as the authors have it; of SOFT++ alone.
      mixers: what takes the place of the family's mixers, in all stages or in each.
      replaced: in how many of the first blocks of each stage; in all where it is None.
      qkv_bias: whether queries, keys and values of the last stage have a bias.
      mlp_ratio: hidden channels of the last stage's feed-forwards over channels.
      image_size: pixels on a side, or (rows, columns).
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      norm_eps: of the norms of the last stage, and behind it.
      dropout: rate after the positions and inside the last stage's feed-forwards.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the lists have different lengths.
    """

    def __init__(
        self,
        features: Sequence[int] = (64, 128, 320, 512),
        *,
        num_heads: Sequence[int] = (2, 4, 10, 16),
        depths: Sequence[int] = (1, 2, 3, 2),
        ratios: Sequence[int] = (8, 4, 2),
        conv_sizes: Sequence[int] = (9, 5, 3),
        iterations: int = 20,
        normalized: bool = False,
        shared_start: bool = False,
        mixers: Mixers = None,
        replaced: Sequence[int | None] | None = None,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        image_size: int | Sequence[int] = 224,
        channels: int = 3,
        num_classes: int | None = 1000,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        staged.per_stage(4, features=features, num_heads=num_heads, depths=depths)
        staged.per_stage(3, ratios=ratios, conv_sizes=conv_sizes)
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        size = staged.pair(image_size)
        grids = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in (4, 8, 16, 32)]
        shared = {"iterations": iterations, "normalized": normalized, "shared_start": shared_start}
        own = [
            Choice(SoftmaxFreeAttention, {"ratio": ratio, "conv_size": side, **shared})
            for ratio, side in zip(ratios, conv_sizes, strict=True)
        ]
        places = staged.places(
            features,
            grids,
            num_heads=num_heads,
            depths=depths,
            own=[*own, Choice(SoftmaxAttention, {"qkv_bias": qkv_bias})],
            mixers=mixers,
            replaced=replaced,
            drop_path=drop_path,
        )
        conv = functools.partial(ConvNorm, kernel_size=3, stride=2, norm=BatchNorm, activation=relu, **common)
        acts = {"activation": relu, "last_activation": relu}
        stem = ConvStem(channels, (32, 32, features[0]), strides=(2, 1, 2), **acts, **common)
        stages = []
        for stage in range(3):
            stages.append(
                Stage(
                    [soft_block(place, **common) for place in places[stage]],
                    down=conv(features[stage - 1], features[stage]) if stage else None,
                    position=PositionTable((SIDES[stage],) * 2, features[stage], resize="bilinear", **stored),
                    dropout=staged.dropout_or_none(dropout, rngs),
                )
            )
        last = [dataclasses.replace(p, site=dataclasses.replace(p.site, prefix=1)) for p in places[3]]
        block = {"mlp_ratio": mlp_ratio, "norm_eps": norm_eps, "dropout": dropout}
        stages.append(
            Stage(
                [staged.transformer_block(place, **block, **common) for place in last],
                down=conv(features[2], features[3]),
                prefix=Prefix(1, features[3], **stored),
                position=PositionTable((SIDES[3],) * 2, features[3], prefix=1, resize="bilinear", **stored),
                dropout=staged.dropout_or_none(dropout, rngs),
            )
        )
        super().__init__(
            stem,
            stages,
            norm=LayerNorm(features[3], eps=norm_eps, **stored),
            head=staged.classifier(features[3], num_classes, **common),
            image_size=size,
            channels=channels,
            dtype=dtype,
        )
        redraw_kernels(self, trunc_normal, rngs=rngs)


_MEDIUM = {"features": (64, 128, 288, 512), "num_heads": (2, 4, 9, 16)}
_HUGE = {"features": (64, 128, 352, 512), "num_heads": (2, 4, 11, 16)}
_SIZES = {
    "tiny": {},
    "small": {"depths": (1, 3, 20, 4)},
    "medium": {"depths": (1, 3, 29, 5), **_MEDIUM},
    "large": {"depths": (1, 3, 40, 5)},
    "huge": {"depths": (1, 5, 49, 5), **_HUGE},
}
SOFTS: Models = {f"soft_{name}": (SoftVisionTransformer, size) for name, size in _SIZES.items()} | {
    f"soft_norm_{name}": (SoftVisionTransformer, {**size, "normalized": True}) for name, size in _SIZES.items()
}
"""For `staged.build_named`, SOFT and SOFT++, with the authors' depths. The tiny ones have 13.1 M parameters, as the
paper says (79.3 and 79.4 % on ImageNet-1K); for the small ones it says 24 M, where their code makes 38.9 M."""
