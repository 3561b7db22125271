"""Four-stage pyramid vision transformer with any registered token mixer in each stage or layer.

Each stage halves the grid and widens the channels, the layout of PVT (Wang et al., 2021, arXiv:2102.12122) and Swin
(Liu et al., 2021, arXiv:2103.14030). Positions come from a 3×3 depthwise convolution added before each stage's blocks
(Chu et al., 2021, arXiv:2102.10882), so that any image size works that the mixers take.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Layout, Site
from attnlab.models.block import MixerNames, MixerOptions, blocks_for
from attnlab.models.staged import Stage, StagedBackbone, classifier, per_stage
from attnlab.nn.conv import ConvNorm
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.norms import LayerNorm


class PyramidViT(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32.

    Args:
      image_size: (H, W) in pixels; every stage's grid is the one before divided by its stride, rounded up.
      num_classes: classes; without any the pooled features are the result.
      channels: of the images.
      patch_size: stride of the first stage; the others halve the grid.
      features: channels of each stage.
      depths: blocks of each stage.
      num_heads: heads of each stage.
      mixer: one name for all stages, or for each stage a name or a pattern of names repeated over its depth.
      mixer_options: constructor options by mixer name.
      mlp: feed-forward, `"gelu"` or `"swiglu"`.
      mlp_ratio: hidden channels of the feed-forward over those of the stage.
      dropout: rate inside the feed-forward.
      drop_path: stochastic depth rate of the last block.
      remat: recompute blocks in the backward pass, to save memory.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params` and `dropout`.

    Raises:
      ValueError: if the stages' settings do not have one length, or a mixer pattern does not fit a depth.
      UnsupportedArgument: for a mixer that takes no such tokens.
    """

    def __init__(
        self,
        image_size: Sequence[int],
        num_classes: int | None,
        *,
        channels: int = 3,
        patch_size: int = 4,
        features: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mixer: str | Sequence[MixerNames] = "softmax_attention",
        mixer_options: MixerOptions | None = None,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        mixers = (mixer,) * len(depths) if isinstance(mixer, str) else tuple(mixer)
        per_stage(len(depths), features=features, num_heads=num_heads, mixer=mixers)
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        block = {"mlp": mlp, "mlp_ratio": mlp_ratio, "dropout": dropout, "drop_path": drop_path} | common
        grid, widths, stages, downs = tuple(image_size), (channels, *features), [], []
        for stage, (width, depth) in enumerate(zip(features, depths, strict=True)):
            stride = 2 if stage else patch_size
            grid = tuple(-(-side // stride) for side in grid)
            downs.append(ConvNorm(widths[stage], width, stride, stride=stride, padding="SAME", **common))
            names = (mixers[stage],) if isinstance(mixers[stage], str) else tuple(mixers[stage])
            options = {name: options for name, options in (mixer_options or {}).items() if name in names}
            site = Site(width, num_heads[stage], Layout.IMAGE, False, grid, 0, sum(depths[:stage]), sum(depths))
            stages.append(
                Stage(
                    blocks_for(site, depth, mixer=names, mixer_options=options, **block),
                    down=downs[stage] if stage else None,
                    position=DepthwiseConv(width, (3, 3), **common),
                    remat=remat,
                )
            )
        super().__init__(
            downs[0],
            stages,
            norm=LayerNorm(features[-1], param_dtype=param_dtype, rngs=rngs),
            head=classifier(features[-1], num_classes, **common),
            image_size=image_size,
            channels=channels,
            dtype=dtype,
        )
