"""Swin Transformer (Liu et al., ICCV 2021, arXiv:2103.14030), with any mixer of images per block.

Patches of 4x4 pixels, then stages of pre-norm blocks. Between stages, 2x2 tokens are concatenated, normed and mapped
from 4 C to 2 C channels. A norm, the mean over tokens and a linear classifier end it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, Site
from attnlab.models.backbone import Choices, PreNormBlock, drop_path_rates, pair, token_mean
from attnlab.nn.linear import Linear, redraw_kernels, trunc_normal
from attnlab.nn.mlp import PatchEmbed
from attnlab.nn.norms import LayerNorm


class PatchMerging(nnx.Module):
    """`(B, H, W, C)` to `(B, H/2, W/2, 2 C)`: 2x2 tokens side by side, column by column, normed and mapped."""

    def __init__(
        self,
        features: int,
        *,
        norm_eps: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.norm = LayerNorm(4 * features, eps=norm_eps, param_dtype=param_dtype, rngs=rngs)
        self.reduction = Linear(
            4 * features, 2 * features, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Raises `ValueError` if the image has an odd side."""
        batch, rows, columns, channels = x.shape
        if rows % 2 or columns % 2:
            raise ValueError(f"patch merging needs even sides, got an image of shape {x.shape}")
        x = x.reshape(batch, rows // 2, 2, columns // 2, 2, channels)
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, rows // 2, columns // 2, 4 * channels)
        return self.reduction(self.norm(x))


def swin_window(grid: tuple[int, int], window: int, block: int) -> tuple[int, int]:
    """Window and shift of a block, as the authors' code clips them.

    A window of at least the shorter side of the grid becomes that side and is not shifted; else the windows of odd
    blocks are shifted by half a window.
    """
    if min(grid) <= window:
        return min(grid), 0
    return window, window // 2 if block % 2 else 0


class SwinTransformer(nnx.Module):
    """Images `(B, H, W, in_channels)` to logits `(B, num_classes)` in float32.

    Args:
      features: channels C of the first stage; each later stage has twice as many.
      choices: the mixer of each block, `choices[stage][block]`.
      num_heads: heads per stage.
      mlp_ratio: hidden channels over channels.
      image_size: pixels on a side, or (rows, columns).
      patch_size: pixels on a side of a patch.
      in_channels: of the images.
      num_classes: classes.
      position_table: whether a learned position table is added to the patches.
      patch_norm: whether patches are normed.
      norm_eps: of all norms.
      dropout: rate after the patches and inside feed-forwards.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the lists have different lengths, or images cannot be halved between stages.
    """

    def __init__(
        self,
        features: int = 96,
        *,
        choices: Choices,
        num_heads: Sequence[int],
        mlp_ratio: float = 4.0,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
        position_table: bool = False,
        patch_norm: bool = True,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        drop_path: float = 0.1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if len(choices) != len(num_heads):
            raise ValueError(f"num_heads must have one entry for each of {len(choices)} stages, got {len(num_heads)}")
        grids = swin_grids(image_size, patch_size, len(choices))
        norm = {"eps": norm_eps, "param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        depth = sum(map(len, choices))
        rates = drop_path_rates(drop_path, depth)
        self.dtype, self.image_shape = dtype, (*pair(image_size), in_channels)
        self.embed = PatchEmbed(in_channels, features, pair(patch_size), **common)
        self.embed_norm = LayerNorm(features, **norm) if patch_norm else nnx.data(None)
        self.position = nnx.data(None)
        if position_table:
            table = trunc_normal(rngs.params(), (*grids[0], features), param_dtype)
            self.position = nnx.Param(table, logical_axes=(None, None, "embed"))
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout > 0 else nnx.data(None)
        self.stages, self.merges = nnx.List(), nnx.List()
        layer, width = 0, features
        for stage, (grid, stage_choices) in enumerate(zip(grids, choices, strict=True)):
            if stage:
                self.merges.append(PatchMerging(width, norm_eps=norm_eps, **common))
                width *= 2
            blocks = nnx.List()
            for choice in stage_choices:
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
        self.norm = LayerNorm(width, **norm)
        self.head = Linear(width, num_classes, axes=("embed", None), **common)
        redraw_kernels(self, trunc_normal, rngs=rngs)

    def features(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """What is classified: the mean of the normed tokens of the last stage, `(B, C)`."""
        x = jnp.asarray(images, self.dtype)
        if x.shape[1:] != self.image_shape:
            raise ValueError(f"images must be (B, {', '.join(map(str, self.image_shape))}), got {x.shape}")
        x = self.embed(x)
        x = x if self.embed_norm is None else self.embed_norm(x)
        x = x if self.position is None else x + self.position[...].astype(x.dtype)
        if self.dropout is not None:
            x = self.dropout(x, deterministic=deterministic)
        for stage, blocks in enumerate(self.stages):
            x = self.merges[stage - 1](x) if stage else x
            for block in blocks:
                x = block(x, deterministic=deterministic)
        return token_mean(self.norm(x))

    def __call__(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        return self.head(self.features(images, deterministic=deterministic)).astype(jnp.float32)


def swin_grids(image_size: int | Sequence[int], patch_size: int | Sequence[int], stages: int) -> list[tuple[int, int]]:
    """Rows and columns of tokens in each stage.

    Raises:
      ValueError: if patches do not tile the image, or a side cannot be halved between stages.
    """
    image, patch = pair(image_size), pair(patch_size)
    multiple = tuple(p * 2 ** (stages - 1) for p in patch)
    if any(side % m for side, m in zip(image, multiple, strict=True)):
        raise ValueError(f"image_size must be a multiple of {multiple}, got {image}")
    rows, columns = image[0] // patch[0], image[1] // patch[1]
    return [(rows >> stage, columns >> stage) for stage in range(stages)]
