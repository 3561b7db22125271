"""Vision transformer (Dosovitskiy et al., 2021, arXiv:2010.11929) with any registered token mixer in each layer.

Patches are embedded linearly, a position table is added, `depth` pre-norm blocks follow, then a norm, a pooling over
tokens and a linear classifier. Mean pooling by default: a class token ties the model to mixers of sequences, while on
a grid of patches those of images work too.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab import registry
from attnlab.contract import Layout, Site
from attnlab.models.block import Blocks, MixerNames, MixerOptions
from attnlab.nn.linear import Linear, trunc_normal
from attnlab.nn.mlp import PatchEmbed
from attnlab.nn.norms import LayerNorm
from attnlab.nn.positions import sincos_table
from attnlab.points import Editable, Pass, visit

POSITIONS = ("learned", "sincos", "none")


class ViT(Editable):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32.

    Args:
      image_size: (H, W) in pixels, multiples of the patch size.
      num_classes: classes.
      channels: of the images.
      patch_size: side of a patch in pixels.
      features: channels C of the tokens.
      depth: number of blocks.
      num_heads: heads of each mixer.
      mixer: name of a registered token mixer, or a pattern of names repeated over the depth.
      mixer_options: constructor options by mixer name.
      mlp: `"gelu"` or `"swiglu"`.
      mlp_ratio: hidden channels of the feed-forward over C.
      position: table added to the patches: `"learned"`, `"sincos"` or `"none"`.
      pooling: `"mean"`, `"cls"` (a class token), or the name of a registered pooling.
      pooling_options: constructor options of a registered pooling.
      dropout: rate after the embedding and inside the feed-forward.
      drop_path: stochastic depth rate of the last block.
      remat: recompute blocks in the backward pass.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params` and `dropout`.

    Raises:
      ValueError: for sizes that do not fit, or an unknown position or pooling.
      UnsupportedArgument: for a mixer that takes no such tokens.
    """

    model_points = frozenset({"logits"})

    def __init__(
        self,
        image_size: tuple[int, int],
        num_classes: int,
        *,
        channels: int = 3,
        patch_size: int = 16,
        features: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mixer: MixerNames = "softmax_attention",
        mixer_options: MixerOptions | None = None,
        mlp: str = "gelu",
        mlp_ratio: float = 4.0,
        position: str = "learned",
        pooling: str = "mean",
        pooling_options: dict[str, Any] | None = None,
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
        common = {"dtype": dtype, "param_dtype": param_dtype}
        grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.grid, self.image_shape = grid, (*image_size, channels)
        self.dtype = dtype
        self.embed = PatchEmbed(channels, features, patch_size, **common, rngs=rngs)
        self.position = nnx.data(None)
        if position == "learned":
            # As large as the patches themselves: order must be seen from the start where patches say little.
            table = 0.5 * jax.random.normal(rngs.params(), (*grid, features), param_dtype)
            self.position = nnx.Param(table, logical_axes=(None, None, "embed"))
        self.use_sincos = position == "sincos"
        self.class_token = nnx.data(None)
        if pooling == "cls":
            token = trunc_normal(rngs.params(), (1, 1, features), param_dtype)
            self.class_token = nnx.Param(token, logical_axes=(None, None, "embed"))
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else nnx.data(None)
        self.blocks = Blocks(
            Site(features, num_heads, grid=None if pooling == "cls" else grid, num_layers=depth),
            depth,
            mixer=mixer,
            mixer_options=mixer_options,
            layouts=(Layout.SEQUENCE,) if pooling == "cls" else (Layout.IMAGE, Layout.SEQUENCE),
            mlp=mlp,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            drop_path=drop_path,
            remat=remat,
            **common,
            rngs=rngs,
        )
        self.norm = LayerNorm(features, param_dtype=param_dtype, rngs=rngs)
        self.pool = nnx.data(None)
        if pooling not in ("mean", "cls"):
            self.pool = registry.create(
                pooling, Site(features, num_heads, grid=grid), rngs=rngs, **(common | dict(pooling_options or {}))
            )
        elif pooling_options:
            raise ValueError(f"pooling_options are for a registered pooling, not for {pooling!r}")
        width = features if self.pool is None else self.pool.out_features
        self.head = Linear(width, num_classes, axes=("embed", None), **common, rngs=rngs)

    def features(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """Normed tokens of the last block: `(B, N, C)`, or `(B, 1 + N, C)` with a class token."""
        return self._tokens(images, self.edits(), deterministic)

    def _tokens(self, images: ArrayLike, edits: Pass, deterministic: bool) -> jax.Array:
        images = jnp.asarray(images, self.dtype)
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images must be (B, {', '.join(map(str, self.image_shape))}), got {images.shape}")
        x = self.embed(images)
        if self.position is not None:
            x = x + self.position[...].astype(x.dtype)
        elif self.use_sincos:
            x = x + sincos_table(self.grid, x.shape[-1]).astype(x.dtype)
        if self.class_token is not None:
            token = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, x.shape[-1])).astype(x.dtype)
            x = jnp.concatenate([token, x.reshape(x.shape[0], -1, x.shape[-1])], axis=1)
        if self.dropout is not None:
            x = self.dropout(x, deterministic=deterministic)
        x = self.blocks(x, edits=edits.blocks, deterministic=deterministic)
        return self.norm(x).reshape(x.shape[0], -1, x.shape[-1])

    def __call__(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        edits = self.edits()
        x = self._tokens(images, edits, deterministic)
        if self.class_token is not None:
            pooled = x[:, 0]
        elif self.pool is not None:
            pooled = self.pool(x, deterministic=deterministic)
        else:
            pooled = x.mean(1, dtype=jnp.float32).astype(x.dtype)
        return visit(self, edits.model, "logits", self.head(pooled).astype(jnp.float32))
