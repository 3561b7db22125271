"""Pyramid Vision Transformer (Wang et al., ICCV 2021, arXiv:2102.12122).

Four stages. Each cuts its input into patches (4x4 pixels, then 2x2 tokens), norms them, adds a learned position table
and runs pre-norm blocks, of spatial-reduction attention where no other mixer is chosen. The mean of the last stage's
tokens is classified, without a norm, as in the models of the papers that replace the attention.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.attention.dense.spatial_reduction_attention import SpatialReductionAttention
from attnlab.models import staged
from attnlab.models.staged import Choice, Mixers, Stage, StagedBackbone
from attnlab.nn.conv import PatchEmbed
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.linear import trunc_normal
from attnlab.nn.norms import LayerNorm
from attnlab.nn.positions import PositionTable


class PyramidVisionTransformer(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are PVT-Tiny.

    Args:
      features: channels per stage.
      num_heads: heads per stage.
      depths: blocks per stage.
      mixers: what takes the place of spatial-reduction attention, in all stages or in each.
      replaced: in how many of the first blocks of each stage; in all where it is None.
      reductions: stride of the convolution before keys and values, per stage; of spatial-reduction attention.
      scale: of its scores, D^-1/2 when None.
      qkv_bias: whether queries, keys and values have a bias.
      mlp_ratios: hidden channels over channels, per stage.
      image_size: pixels on a side, or (rows, columns). Images of another size are taken if the mixers take them.
      patch_size: pixels on a side of the first stage's patches; later ones are 2x2 tokens.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      norm_eps: of the norms in blocks.
      attention_dropout: rate on attention weights, in mixers that have them.
      dropout: rate after the positions, inside feed-forwards and on what mixers return.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the lists have different lengths, or the patches do not tile the image in every stage.
    """

    def __init__(
        self,
        features: Sequence[int] = (64, 128, 320, 512),
        *,
        num_heads: Sequence[int] = (1, 2, 5, 8),
        depths: Sequence[int] = (2, 2, 2, 2),
        mixers: Mixers = None,
        replaced: Sequence[int | None] | None = None,
        reductions: Sequence[int] = (8, 4, 2, 1),
        scale: float | None = None,
        qkv_bias: bool = True,
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        channels: int = 3,
        num_classes: int | None = 1000,
        norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        staged.per_stage(len(depths), reductions=reductions, mlp_ratios=mlp_ratios)
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        shared = {"qkv_bias": qkv_bias, "attention_dropout": attention_dropout, "projection_dropout": dropout}
        grids = staged.halved_grids(image_size, patch_size, len(depths))
        places = staged.places(
            features,
            grids,
            num_heads=num_heads,
            depths=depths,
            own=[Choice(SpatialReductionAttention, {"reduction": r, "scale": scale}) for r in reductions],
            mixers=mixers,
            replaced=replaced,
            drop_path=drop_path,
        )
        norm = functools.partial(LayerNorm, eps=1e-5)
        stages = []
        for stage, width in enumerate(features):
            block = {"mlp_ratio": mlp_ratios[stage], "norm_eps": norm_eps, "dropout": dropout, "shared": shared}
            stages.append(
                Stage(
                    [staged.transformer_block(place, **block, **common) for place in places[stage]],
                    down=PatchEmbed(features[stage - 1], width, 2, norm=norm, **common) if stage else None,
                    position=PositionTable(grids[stage], width, resize="bilinear", param_dtype=param_dtype, rngs=rngs),
                    dropout=staged.dropout_or_none(dropout, rngs),
                )
            )
        super().__init__(
            PatchEmbed(channels, features[0], staged.pair(patch_size), norm=norm, **common),
            stages,
            head=staged.classifier(features[-1], num_classes, **common),
            channels=channels,
            dtype=dtype,
        )
        redraw_kernels(self, trunc_normal, rngs=rngs)
