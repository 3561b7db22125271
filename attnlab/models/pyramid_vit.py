"""Four-stage pyramid vision transformer with any registered token mixer in each stage or layer.

Each stage halves the grid and widens the channels, the layout of PVT (Wang et al., 2021, arXiv:2102.12122) and Swin
(Liu et al., 2021, arXiv:2103.14030). Positions come from a 3×3 depthwise convolution added before each stage's blocks
(Chu et al., 2021, arXiv:2102.10882), so that any image size works that the mixers take.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, Site
from attnlab.models.block import Blocks, MixerNames, MixerOptions
from attnlab.nn.linear import Conv, Linear
from attnlab.nn.norms import LayerNorm


class PyramidViT(nnx.Module):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32.

    Args:
      image_size: (H, W) in pixels; every stage's grid is the one before divided by its stride, rounded up.
      num_classes: classes.
      channels: of the images.
      patch_size: stride of the first stage; the others halve the grid.
      features: channels of each stage.
      depths: blocks of each stage.
      num_heads: heads of each stage.
      mixer: one name for all stages, or for each stage a name or a pattern of names repeated over its depth.
      mixer_options: constructor options by mixer name.
      mlp: `"gelu"` or `"swiglu"`.
      mlp_ratio: hidden channels of the feed-forward over those of the stage.
      dropout: rate inside the feed-forward.
      drop_path: stochastic depth rate of the last block.
      remat: recompute blocks in the backward pass.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params` and `dropout`.

    Raises:
      ValueError: if the stages' settings do not have one length, or a mixer pattern does not fit a depth.
      UnsupportedArgument: for a mixer that takes no such tokens.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        num_classes: int,
        *,
        channels: int = 3,
        patch_size: int = 4,
        features: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mixer: str | Sequence[MixerNames] = "softmax_attention",
        mixer_options: MixerOptions | None = None,
        mlp: str = "gelu",
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stages = len(depths)
        mixers = (mixer,) * stages if isinstance(mixer, str) else tuple(mixer)
        for argument, value in (("features", features), ("num_heads", num_heads), ("mixer", mixers)):
            if len(value) != stages:
                raise ValueError(f"{argument} must have one entry for each of {stages} stages, got {len(value)}")
        common = {"dtype": dtype, "param_dtype": param_dtype}
        self.image_shape = (*image_size, channels)
        self.dtype = dtype
        self.downsamplings, self.norms, self.positions, self.stages = (nnx.List() for _ in range(4))
        grid, width, layer = tuple(image_size), channels, 0
        for stage in range(stages):
            stride, wide = (2 if stage else patch_size), features[stage]
            grid = tuple(-(-side // stride) for side in grid)
            self.downsamplings.append(
                Conv(width, wide, (stride, stride), strides=stride, padding="SAME", **common, rngs=rngs)
            )
            self.norms.append(LayerNorm(wide, param_dtype=param_dtype, rngs=rngs))
            self.positions.append(
                Conv(wide, wide, (3, 3), feature_group_count=wide, axes=(None, "embed"), **common, rngs=rngs)
            )
            names = (mixers[stage],) if isinstance(mixers[stage], str) else tuple(mixers[stage])
            self.stages.append(
                Blocks(
                    Site(wide, num_heads[stage], grid=grid, layer=layer, num_layers=sum(depths)),
                    depths[stage],
                    mixer=names,
                    mixer_options={name: options for name, options in (mixer_options or {}).items() if name in names},
                    layouts=(Layout.IMAGE, Layout.SEQUENCE),
                    mlp=mlp,
                    mlp_ratio=mlp_ratio,
                    dropout=dropout,
                    drop_path=drop_path,
                    remat=remat,
                    **common,
                    rngs=rngs,
                )
            )
            width, layer = wide, layer + depths[stage]
        self.norm = LayerNorm(width, param_dtype=param_dtype, rngs=rngs)
        self.head = Linear(width, num_classes, axes=("embed", None), **common, rngs=rngs)

    def feature_maps(self, images: ArrayLike, *, deterministic: bool = True) -> tuple[jax.Array, ...]:
        """The map `(B, Hh, Ww, C)` at the end of each stage, for dense tasks."""
        x = jnp.asarray(images, self.dtype)
        if x.shape[1:] != self.image_shape:
            raise ValueError(f"images must be (B, {', '.join(map(str, self.image_shape))}), got {x.shape}")
        maps = []
        for down, norm, position, blocks in zip(
            self.downsamplings, self.norms, self.positions, self.stages, strict=True
        ):
            x = norm(down(x))
            x = blocks(x + position(x), deterministic=deterministic)
            maps.append(x)
        return tuple(maps)

    def __call__(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        x = self.norm(self.feature_maps(images, deterministic=deterministic)[-1])
        return self.head(x.mean((1, 2), dtype=jnp.float32).astype(x.dtype)).astype(jnp.float32)
