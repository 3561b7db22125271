"""Vision transformer (Dosovitskiy et al., 2021, arXiv:2010.11929) with any registered token mixer in each layer.

Patches are embedded linearly, a position table is added, `depth` pre-norm blocks follow, then a norm, a pooling over
tokens and a linear classifier. Mean pooling by default: a class token ties the model to mixers of sequences and those
that know of a prefix, while on a grid of patches those of images work too.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from attnlab import registry
from attnlab.contract import Layout, Site
from attnlab.models.block import MixerNames, MixerOptions, blocks_for
from attnlab.models.staged import Prefix, Stage, StagedBackbone, classifier, dropout_or_none
from attnlab.nn.conv import PatchEmbed
from attnlab.nn.norms import LayerNorm
from attnlab.nn.positions import PositionTable, SinePositions

POSITIONS = ("learned", "sincos", "none")


class ViT(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32.

    Args:
      image_size: (H, W) in pixels, multiples of the patch size.
      num_classes: classes; without any the pooled features are the result.
      channels: of the images.
      patch_size: side of a patch in pixels.
      features: channels C of the tokens.
      depth: number of blocks.
      num_heads: heads of each mixer.
      mixer: name of a registered token mixer, or a pattern of names repeated over the depth.
      mixer_options: constructor options by mixer name.
      mlp: feed-forward, `"gelu"` or `"swiglu"`.
      mlp_ratio: hidden channels of the feed-forward over C.
      position: table added to the tokens: `"learned"`, `"sincos"` or `"none"`.
      pooling: `"mean"`, `"cls"` (a class token), or the name of a registered pooling.
      pooling_options: constructor options of a registered pooling.
      dropout: rate after the embedding and inside the feed-forward.
      drop_path: stochastic depth rate of the last block.
      remat: recompute blocks in the backward pass, to save memory.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params` and `dropout`.

    Raises:
      ValueError: for sizes that do not fit, or an unknown position or pooling.
      UnsupportedArgument: for a mixer that takes no such tokens.
    """

    def __init__(
        self,
        image_size: Sequence[int],
        num_classes: int | None,
        *,
        channels: int = 3,
        patch_size: int = 16,
        features: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mixer: MixerNames = "softmax_attention",
        mixer_options: MixerOptions | None = None,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        mlp_ratio: float = 4.0,
        position: Literal["learned", "sincos", "none"] = "learned",
        pooling: str = "mean",
        pooling_options: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if any(side % patch_size for side in image_size):
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        if position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {position!r}")
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        grid, prefix = (image_size[0] // patch_size, image_size[1] // patch_size), int(pooling == "cls")
        table = {
            # As large as the patches themselves: order must be seen from the start where patches say little.
            "learned": functools.partial(
                PositionTable,
                (1 + grid[0] * grid[1],) if prefix else grid,
                features,
                init=nnx.initializers.normal(0.5),
                param_dtype=param_dtype,
                rngs=rngs,
            ),
            "sincos": functools.partial(SinePositions, grid, prefix=prefix),
            "none": lambda: None,
        }[position]()
        stage = Stage(
            blocks_for(
                Site(features, num_heads, Layout.IMAGE, grid=grid, prefix=prefix, num_layers=depth),
                depth,
                mixer=mixer,
                mixer_options=mixer_options,
                mlp=mlp,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                drop_path=drop_path,
                **common,
            ),
            prefix=Prefix(1, features, param_dtype=param_dtype, rngs=rngs) if prefix else None,
            position=table,
            dropout=dropout_or_none(dropout, rngs),
            remat=remat,
        )
        pool = None
        if pooling not in ("mean", "cls"):
            options = common | dict(pooling_options or {})
            pool = registry.create(pooling, Site(features, num_heads, grid=grid), **options)
        elif pooling_options:
            raise ValueError(f"pooling_options are for a registered pooling, not for {pooling!r}")
        super().__init__(
            PatchEmbed(channels, features, patch_size, **common),
            [stage],
            norm=LayerNorm(features, param_dtype=param_dtype, rngs=rngs),
            pool=pool,
            head=classifier(features if pool is None else pool.out_features, num_classes, **common),
            image_size=image_size,
            channels=channels,
            dtype=dtype,
        )
