"""DeiT (Touvron et al., ICML 2021, arXiv:2012.12877): a plain vision transformer with a class token.

Patches of 16x16 pixels, a class token in front, a learned position table over all of them, pre-norm blocks, a norm;
the class token is classified. Distillation tokens are not part of it. A block takes a mixer of sequences, or a mixer
of images that has an option `prefix`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, Site
from attnlab.models.backbone import Choice, PreNormBlock, drop_path_rates, pair
from attnlab.nn.linear import Linear, redraw_kernels, trunc_normal
from attnlab.nn.mlp import PatchEmbed
from attnlab.nn.norms import LayerNorm


class DeiT(nnx.Module):
    """Images `(B, H, W, in_channels)` to logits `(B, num_classes)` in float32.

    Args:
      features: channels C.
      choices: the mixer of each block.
      num_heads: heads.
      mlp_ratio: hidden channels over channels.
      image_size: pixels on a side, or (rows, columns).
      patch_size: pixels on a side of a patch.
      in_channels: of the images.
      num_classes: classes.
      norm_eps: of all norms.
      dropout: rate after the positions and inside feed-forwards.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the patches do not tile the image.
    """

    def __init__(
        self,
        features: int = 192,
        *,
        choices: Sequence[Choice],
        num_heads: int,
        mlp_ratio: float = 4.0,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        image, patch = pair(image_size), pair(patch_size)
        if any(side % p for side, p in zip(image, patch, strict=True)):
            raise ValueError(f"image_size must be a multiple of the patches {patch}, got {image}")
        grid = (image[0] // patch[0], image[1] // patch[1])
        tokens = 1 + grid[0] * grid[1]
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.dtype, self.image_shape = dtype, (*image, in_channels)
        self.embed = PatchEmbed(in_channels, features, patch, **common)
        self.class_token = nnx.Param(trunc_normal(rngs.params(), (features,), param_dtype), logical_axes=("embed",))
        table = trunc_normal(rngs.params(), (tokens, features), param_dtype)
        self.position = nnx.Param(table, logical_axes=(None, "embed"))
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout > 0 else nnx.data(None)
        self.blocks = nnx.List()
        rates = drop_path_rates(drop_path, len(choices))
        for layer, choice in enumerate(choices):
            if Layout.SEQUENCE in choice.cls.layouts:
                site = Site(features, num_heads, grid=(tokens,), layer=layer, num_layers=len(choices))
                mixer = choice.build(site, **common)
            else:
                site = Site(features, num_heads, Layout.IMAGE, False, grid, 1, layer, len(choices))
                mixer = choice.build(site, **common)
            self.blocks.append(
                PreNormBlock(
                    mixer,
                    features,
                    mlp_ratio=mlp_ratio,
                    norm_eps=norm_eps,
                    dropout=dropout,
                    drop_path=rates[layer],
                    **common,
                )
            )
        self.norm = LayerNorm(features, eps=norm_eps, param_dtype=param_dtype, rngs=rngs)
        self.head = Linear(features, num_classes, axes=("embed", None), **common)
        redraw_kernels(self, trunc_normal, rngs=rngs)

    def features(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """What is classified: the normed class token, `(B, C)`."""
        x = jnp.asarray(images, self.dtype)
        if x.shape[1:] != self.image_shape:
            raise ValueError(f"images must be (B, {', '.join(map(str, self.image_shape))}), got {x.shape}")
        x = self.embed(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([token, x], 1) + self.position[...].astype(x.dtype)
        if self.dropout is not None:
            x = self.dropout(x, deterministic=deterministic)
        for block in self.blocks:
            x = block(x, deterministic=deterministic)
        return self.norm(x)[:, 0]

    def __call__(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        return self.head(self.features(images, deterministic=deterministic)).astype(jnp.float32)
