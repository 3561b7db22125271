"""Pyramid Vision Transformer (Wang et al., ICCV 2021, arXiv:2102.12122), with any mixer of images per block.

Four stages. Each cuts its input into patches (4x4 pixels, then 2x2 tokens), norms them, adds a learned position table
and runs pre-norm blocks. The mean of the last stage's tokens is classified, without a norm, as in the models of the
papers that replace the attention.
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
from attnlab.nn.resampling import resize_bilinear


class PyramidStage(nnx.Module):
    """Patches, position table and blocks of one stage; arguments as `PyramidVisionTransformer`."""

    def __init__(
        self,
        in_features: int,
        sites: Sequence[Site],
        choices: Sequence[Any],
        *,
        patch_size: int | tuple[int, int],
        mlp_ratio: float,
        norm_eps: float,
        dropout: float,
        drop_path: Sequence[float],
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        features, grid = sites[0].features, sites[0].grid
        self.embed = PatchEmbed(in_features, features, patch_size, **common)
        self.norm = LayerNorm(features, eps=1e-5, param_dtype=param_dtype, rngs=rngs)
        table = trunc_normal(rngs.params(), (*grid, features), param_dtype)
        self.position = nnx.Param(table, logical_axes=(None, None, "embed"))
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout > 0 else nnx.data(None)
        self.blocks = nnx.List(
            PreNormBlock(
                choice.build(site, **common),
                features,
                mlp_ratio=mlp_ratio,
                norm_eps=norm_eps,
                dropout=dropout,
                drop_path=rate,
                **common,
            )
            for site, choice, rate in zip(sites, choices, drop_path, strict=True)
        )

    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`(B, H, W, C)` to `(B, H/patch, W/patch, C')`; the position table is resized to another grid."""
        x = self.norm(self.embed(x))
        position = self.position[...]
        if position.shape[:2] != x.shape[1:3]:
            position = resize_bilinear(position[None], x.shape[1:3])[0]
        x = x + position.astype(x.dtype)
        if self.dropout is not None:
            x = self.dropout(x, deterministic=deterministic)
        for block in self.blocks:
            x = block(x, deterministic=deterministic)
        return x


class PyramidVisionTransformer(nnx.Module):
    """Images `(B, H, W, in_channels)` to logits `(B, num_classes)` in float32.

    Args:
      features: channels per stage.
      choices: the mixer of each block, `choices[stage][block]`.
      num_heads: heads per stage.
      mlp_ratios: hidden channels over channels, per stage.
      image_size: pixels on a side, or (rows, columns). Images of another size are taken if the mixers take them.
      patch_size: pixels on a side of the first stage's patches; later ones are 2x2 tokens.
      in_channels: of the images.
      num_classes: classes.
      norm_eps: of the norms in blocks.
      dropout: rate after the positions and inside feed-forwards.
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
        choices: Choices,
        num_heads: Sequence[int],
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        sizes = {"choices": choices, "num_heads": num_heads, "mlp_ratios": mlp_ratios}
        for name, values in sizes.items():
            if len(values) != len(features):
                raise ValueError(f"{name} must have one entry for each of {len(features)} stages, got {len(values)}")
        image, patch = pair(image_size), pair(patch_size)
        steps = 2 ** (len(features) - 1)
        if any(side % (p * steps) for side, p in zip(image, patch, strict=True)):
            raise ValueError(f"image_size must be a multiple of {tuple(p * steps for p in patch)}, got {image}")
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        depth = sum(map(len, choices))
        rates = drop_path_rates(drop_path, depth)
        self.dtype = dtype
        self.stages = nnx.List()
        first, channels = 0, in_channels
        for stage, width in enumerate(features):
            grid = tuple(side // (p * 2**stage) for side, p in zip(image, patch, strict=True))
            last = first + len(choices[stage])
            self.stages.append(
                PyramidStage(
                    channels,
                    [Site(width, num_heads[stage], Layout.IMAGE, False, grid, 0, i, depth) for i in range(first, last)],
                    choices[stage],
                    patch_size=2 if stage else patch,
                    mlp_ratio=mlp_ratios[stage],
                    norm_eps=norm_eps,
                    dropout=dropout,
                    drop_path=rates[first:last],
                    **common,
                )
            )
            first, channels = last, width
        self.head = Linear(channels, num_classes, axes=("embed", None), **common)
        redraw_kernels(self, trunc_normal, rngs=rngs)

    def features(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """What is classified: the mean of the last stage's tokens, `(B, C)`."""
        x = jnp.asarray(images, self.dtype)
        for stage in self.stages:
            x = stage(x, deterministic=deterministic)
        return token_mean(x)

    def __call__(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        return self.head(self.features(images, deterministic=deterministic)).astype(jnp.float32)
