"""CSwin Transformer (Dong et al., CVPR 2022, arXiv:2107.00652), with any mixer of images per block.

A 7x7 convolution of stride 4 and a norm make the tokens; 3x3 convolutions of stride 2, each with a norm, double the
channels between four stages of pre-norm blocks. A norm, the mean over tokens and a linear classifier end it. The
mixers of the paper are `attnlab.attention.local.cross_shaped_windows.CrossShapedWindowAttention`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, Site
from attnlab.models.backbone import Choices, PreNormBlock, drop_path_rates, pair, token_mean
from attnlab.models.swin import swin_grids
from attnlab.nn.linear import Conv, Linear, redraw_kernels, trunc_normal
from attnlab.nn.norms import LayerNorm


class ConvNorm(nnx.Module):
    """A strided convolution over images, then a norm."""

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel: int,
        *,
        stride: int,
        padding: int,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(
            in_features,
            features,
            (kernel, kernel),
            strides=(stride, stride),
            padding=[(padding, padding)] * 2,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.norm = LayerNorm(features, eps=1e-5, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(B, H, W, C)` to `(B, H/stride, W/stride, C')`."""
        return self.norm(self.conv(x))


class CSwinTransformer(nnx.Module):
    """Images `(B, H, W, in_channels)` to logits `(B, num_classes)` in float32.

    Args:
      features: channels C of the first stage; each later stage has twice as many.
      choices: the mixer of each block, `choices[stage][block]`.
      num_heads: heads per stage.
      mlp_ratio: hidden channels over channels.
      image_size: pixels on a side, or (rows, columns).
      in_channels: of the images.
      num_classes: classes.
      norm_eps: of the norms in blocks and of the last.
      dropout: rate inside feed-forwards.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the lists have different lengths, or the image cannot be divided by 4 and halved between stages.
    """

    def __init__(
        self,
        features: int = 64,
        *,
        choices: Choices,
        num_heads: Sequence[int],
        mlp_ratio: float = 4.0,
        image_size: int | Sequence[int] = 224,
        in_channels: int = 3,
        num_classes: int = 1000,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if len(choices) != len(num_heads):
            raise ValueError(f"num_heads must have one entry for each of {len(choices)} stages, got {len(num_heads)}")
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        depth = sum(map(len, choices))
        rates = drop_path_rates(drop_path, depth)
        self.dtype, self.image_shape = dtype, (*pair(image_size), in_channels)
        self.entries, self.stages = nnx.List(), nnx.List()
        layer, width = 0, features
        for stage, grid in enumerate(swin_grids(image_size, 4, len(choices))):
            if stage:
                self.entries.append(ConvNorm(width, 2 * width, 3, stride=2, padding=1, **common))
                width *= 2
            else:
                self.entries.append(ConvNorm(in_channels, width, 7, stride=4, padding=2, **common))
            blocks = nnx.List()
            for choice in choices[stage]:
                site = Site(width, num_heads[stage], Layout.IMAGE, False, grid, 0, layer, depth)
                blocks.append(
                    PreNormBlock(
                        choice.build(site, **common),
                        width,
                        mlp_ratio=mlp_ratio,
                        norm_eps=norm_eps,
                        dropout=dropout,
                        drop_path=rates[layer],
                        **common,
                    )
                )
                layer += 1
            self.stages.append(blocks)
        self.norm = LayerNorm(width, eps=norm_eps, param_dtype=param_dtype, rngs=rngs)
        self.head = Linear(width, num_classes, axes=("embed", None), **common)
        redraw_kernels(self, trunc_normal, rngs=rngs)

    def features(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """What is classified: the mean of the normed tokens of the last stage, `(B, C)`."""
        x = jnp.asarray(images, self.dtype)
        if x.shape[1:] != self.image_shape:
            raise ValueError(f"images must be (B, {', '.join(map(str, self.image_shape))}), got {x.shape}")
        for entry, blocks in zip(self.entries, self.stages, strict=True):
            x = entry(x)
            for block in blocks:
                x = block(x, deterministic=deterministic)
        return token_mean(self.norm(x))

    def __call__(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        return self.head(self.features(images, deterministic=deterministic)).astype(jnp.float32)
