"""DeiT (Touvron et al., ICML 2021, arXiv:2012.12877): a plain vision transformer with a class token.

Patches of 16x16 pixels, a class token in front, a learned position table over all of them, pre-norm blocks of softmax
attention where no other mixer is chosen, a norm; the class token is classified. Distillation tokens are not part of it.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.models import staged
from attnlab.models.staged import Choice, Mixers, Prefix, Stage, StagedBackbone
from attnlab.nn.conv import PatchEmbed
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.linear import trunc_normal
from attnlab.nn.norms import LayerNorm
from attnlab.nn.positions import PositionTable


class DeiT(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are DeiT-Ti.

    Args:
      features: channels C.
      num_heads: heads.
      depth: blocks.
      mixers: what takes the place of softmax attention.
      replaced: in how many of the first blocks; in all when None.
      qkv_bias: whether queries, keys and values have a bias.
      mlp_ratio: hidden channels over channels.
      image_size: pixels on a side, or (rows, columns).
      patch_size: pixels on a side of a patch.
      channels: of the images.
      num_classes: classes; without any the class token is the result.
      norm_eps: of all norms.
      attention_dropout: rate on attention weights, in mixers that have them.
      dropout: rate after the positions, inside feed-forwards and on what mixers return.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the patches do not tile the image.
      UnsupportedArgument: for a mixer that takes neither sequences nor images behind a class token.
    """

    def __init__(
        self,
        features: int = 192,
        *,
        num_heads: int = 3,
        depth: int = 12,
        mixers: Mixers = None,
        replaced: int | None = None,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
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
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        shared = {"qkv_bias": qkv_bias, "attention_dropout": attention_dropout, "projection_dropout": dropout}
        block = {"mlp_ratio": mlp_ratio, "norm_eps": norm_eps, "dropout": dropout, "shared": shared} | common
        (grid,) = staged.halved_grids(image_size, patch_size, 1)
        (places,) = staged.places(
            [features],
            [grid],
            num_heads=[num_heads],
            depths=[depth],
            own=[Choice(SoftmaxAttention)],
            mixers=mixers,
            replaced=[replaced],
            drop_path=drop_path,
            prefix=1,
        )
        table = {"param_dtype": param_dtype, "rngs": rngs}
        stage = Stage(
            [staged.transformer_block(place, **block) for place in places],
            prefix=Prefix(1, features, **table),
            position=PositionTable((1 + grid[0] * grid[1],), features, **table),
            dropout=staged.dropout_or_none(dropout, rngs),
        )
        super().__init__(
            PatchEmbed(channels, features, staged.pair(patch_size), **common),
            [stage],
            norm=LayerNorm(features, eps=norm_eps, **table),
            head=staged.classifier(features, num_classes, **common),
            image_size=staged.pair(image_size),
            channels=channels,
            dtype=dtype,
        )
        redraw_kernels(self, trunc_normal, rngs=rngs)
