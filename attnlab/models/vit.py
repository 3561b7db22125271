"""Vision transformer (Dosovitskiy et al., 2021, arXiv:2010.11929) with any registered token mixer in each layer.

Patches are embedded linearly, a position table is added, `depth` pre-norm blocks follow, then a norm, a pooling over
tokens and a linear classifier. Mean pooling by default: a class token ties the model to mixers of sequences and those
that know of a prefix, while on a grid of patches those of images work too. Registers (Darcet et al., 2024,
arXiv:2309.16588) are further learned tokens, behind the class token and without positions.

`features` gives the stream behind each block; `stages`, `tokens` and `pooled` the last one's map, tokens and vector.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab import registry
from attnlab.contract import Layout, Site
from attnlab.models.block import MixerNames, MixerOptions, blocks_for
from attnlab.models.staged import BehindPrefix, Prefix, Stage, StagedBackbone, classifier, dropout_or_none
from attnlab.nn.conv import PatchEmbed
from attnlab.nn.norms import LayerNorm
from attnlab.nn.positions import PositionTable, SinePositions
from attnlab.points import Pass

POSITIONS = ("learned", "sincos", "none")


class ViT(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32.

    Args:
      image_size: (H, W) in pixels, multiples of the patch size; with `resize` those that the positions are made for.
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
      resize: how the table is fitted to images of other sizes, multiples of the patch size: `"bicubic"` or
        `"bilinear"`; None refuses them.
      class_token: whether there is one; as the pooling needs it when None.
      registers: number of registers.
      pooling: `"mean"` of the patches, `"cls"` (the class token), or the name of a registered pooling, of the patches.
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
        resize: Literal["bicubic", "bilinear"] | None = None,
        class_token: bool | None = None,
        registers: int = 0,
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
        if class_token is False and pooling == "cls":
            raise ValueError("pooling='cls' takes the class token: class_token must not be False")
        if registers < 0:
            raise ValueError(f"registers must be at least 0, got {registers}")
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        placed = int(pooling == "cls" if class_token is None else class_token)
        prefix = placed + registers
        table = {
            # As large as the patches themselves: order must be seen from the start where patches say little.
            "learned": functools.partial(
                PositionTable,
                grid,
                features,
                prefix=placed,
                unplaced=registers,
                resize=resize,
                init=nnx.initializers.normal(0.5),
                param_dtype=param_dtype,
                rngs=rngs,
            ),
            "sincos": functools.partial(SinePositions, grid, prefix=prefix, resize=resize),
            "none": lambda: None,
        }[position]()
        stage = Stage(
            blocks_for(
                Site(
                    features,
                    num_heads,
                    Layout.IMAGE,
                    grid=None if resize else grid,
                    prefix=prefix,
                    num_layers=depth,
                ),
                depth,
                mixer=mixer,
                mixer_options=mixer_options,
                mlp=mlp,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                drop_path=drop_path,
                **common,
            ),
            prefix=Prefix(prefix, features, param_dtype=param_dtype, rngs=rngs) if prefix else None,
            position=table,
            dropout=dropout_or_none(dropout, rngs),
            remat=remat,
        )
        pool = None
        if pooling not in ("mean", "cls"):
            options = common | dict(pooling_options or {})
            pool = registry.create(pooling, Site(features, num_heads, grid=None if resize else grid), **options)
        elif pooling_options:
            raise ValueError(f"pooling_options are for a registered pooling, not for {pooling!r}")
        width = features if pool is None else pool.out_features
        if prefix and pooling != "cls":
            pool = BehindPrefix(prefix, pool)
        self.patch_size = patch_size
        super().__init__(
            PatchEmbed(channels, features, patch_size, **common),
            [stage],
            norm=LayerNorm(features, param_dtype=param_dtype, rngs=rngs),
            pool=pool,
            head=classifier(width, num_classes, **common),
            image_size=None if resize else image_size,
            channels=channels,
            dtype=dtype,
        )

    def _through(
        self, images: ArrayLike, edits: Pass, deterministic: bool, behind: list[jax.Array] | None = None
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        sides = jnp.shape(images)[1:3]
        if any(side % self.patch_size for side in sides):
            raise ValueError(f"images must have sides that are multiples of {self.patch_size}, got {sides}")
        return super()._through(images, edits, deterministic, behind)
