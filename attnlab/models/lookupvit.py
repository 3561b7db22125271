"""LookupViT: all heavy work on a few compressed tokens, which look the others up (ECCV 2024, arXiv:2407.12753).

Lookup tokens L are the patches; compressed tokens P are their map, shrunk to a grid that a call may choose. A block:

    P = P + A (LN(L) W_v) W_o                A = softmax of LN(P) on LN(L): the compressed tokens gather
    P = P + attention(LN(P));   P = P + MLP(LN(P)), of width p·C
    L = L + A^T (LN(P) W_v') W_o'            the same map read backwards: they give back
    L = L + MLP(LN(L)), of width C/q

The mean of P, or its class token, is normed and classified. P starts from the patches without their positions and has a
table of its own, which is interpolated, so that one model runs with any compressed grid; trained on several
(`COMPRESSED_GRIDS`, one drawn for each step) it trades speed for accuracy afterwards.

No code of the authors is public; this is a reading of the paper: norms in front of every step, residual connections
around it, maps with biases, widths p = 4 and q = 2.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.cross.lookupvit import LookupAttention
from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.contract import Site
from attnlab.models import staged
from attnlab.models.block import Block
from attnlab.models.inputs import Images
from attnlab.models.staged import Builder, Choice, Models, Prefix
from attnlab.nn.chain import call
from attnlab.nn.conv import PatchEmbed
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.linear import trunc_normal
from attnlab.nn.mlp import MLP, DropPath
from attnlab.nn.norms import LayerNorm
from attnlab.nn.positions import PositionTable
from attnlab.nn.resampling import resize_bilinear
from attnlab.points import Editable, Edits, visit
from attnlab.registry import Cost, Example, Kind, Paper, Source, register

PAPER = Paper(
    "LookupViT: Compressing visual information to a limited number of tokens",
    "Koner et al.",
    2024,
    arxiv="2407.12753",
    number=78,
)
_SOURCE = {"paper": PAPER, "source": Source.ABSTRACT_ONLY}
_COST = Cost(time="O(N·M·C + M²·C)", memory="O(N·M·H), with kernel O(N·C)")
COMPRESSED_GRIDS = ((3, 3), (5, 5), (7, 7), (10, 10))
"""Grids of compressed tokens to draw from, one for each step of a training of several resolutions."""


class Streams(NamedTuple):
    """Both token sets: `compressed` `(B, M, C)` and `lookup` `(B, N, C)`."""

    compressed: jax.Array
    lookup: jax.Array


class Refinement(Block):
    """The usual block, on compressed tokens; all of them are needed afterwards, so that none can be left out."""

    @property
    def points(self) -> frozenset[str]:
        return super().points - {"tokens"}


def _example() -> Example:
    keys = jax.random.split(jax.random.key(0), 2)
    block = LookupBlock(8, num_heads=2, p=1.0, rngs=nnx.Rngs(0))
    return Example(
        block, (jax.random.normal(keys[0], (2, 3, 8)), jax.random.normal(keys[1], (2, 7, 8))), {}, (0, 1), (0, 1)
    )


@register(
    "lookupvit",
    kind=Kind.MODULE,
    cost=_COST,
    kernel="block_sparse_attention",
    summary="few tokens gather from many, are refined, and give back along the same attention map",
    small=_example,
    **_SOURCE,
)
class LookupBlock(nnx.Module):
    """Compressed tokens `(B, M, C)` and lookup tokens `(B, N, C)`, of an image or a video, to the same pair.

    Args:
      features: channels C.
      num_heads: heads H.
      p: hidden channels of the compressed tokens' feed-forward over C, rounded down.
      q: C over the hidden channels of the lookup tokens' feed-forward.
      renorm: how the map is read backwards: see `LookupAttention`.
      kernel: in the place of a stored map: see `LookupAttention`.
      mixer: builds the compressed tokens' own mixer, `staged.Choice`, or a registered name; softmax attention when
        None.
      layer: number of the block, for mixers that depend on it.
      num_layers: of the model.
      norm_eps: of all norms.
      dropout: rate inside the feed-forwards and on what the mixer returns.
      drop_path: probability that a step is dropped for an example in training.
      dtype: of the computation; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        p: float = 4.0,
        q: float = 2.0,
        renorm: Literal["none", "softmax"] = "none",
        kernel: str | None = None,
        mixer: str | Builder | None = None,
        layer: int = 0,
        num_layers: int = 1,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        build = Choice(SoftmaxAttention) if mixer is None else Choice(mixer) if isinstance(mixer, str) else mixer
        site = Site(features, num_heads, layer=layer, num_layers=num_layers)
        names = ("gather_p", "gather_l", "refine1", "refine2", "infuse_p", "lookup")
        norms = {name: LayerNorm(features, eps=norm_eps, **stored) for name in names}
        self.attention = LookupAttention(features, num_heads=num_heads, renorm=renorm, kernel=kernel, **common)
        self.refine = Refinement(
            build(site, layer, projection_dropout=dropout, **common),
            MLP(features, int(features * p), dropout=dropout, **common),
            norms["refine1"],
            norms["refine2"],
            drop_path=drop_path,
            rngs=rngs,
        )
        self.mlp = MLP(features, int(features / q), dropout=dropout, **common)
        self.gather_norm, self.source_norm = norms["gather_p"], norms["gather_l"]
        self.infuse_norm, self.mlp_norm = norms["infuse_p"], norms["lookup"]
        self.drop_path = nnx.List([DropPath(drop_path, rngs=rngs) for _ in range(3)]) if drop_path else nnx.data(None)

    def __call__(
        self,
        compressed: ArrayLike,
        lookup: ArrayLike,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
    ) -> Streams:
        """Mixes; `edits` are those of the refinement.

        Raises:
          ValueError: for streams of different batches or channels.
        """
        compressed, lookup = jnp.asarray(compressed), jnp.asarray(lookup)
        shapes = compressed.shape, lookup.shape
        if any(len(shape) != 3 for shape in shapes) or shapes[0][::2] != shapes[1][::2]:
            raise ValueError(f"compressed must be (B, M, C) and lookup (B, N, C), got {shapes[0]} and {shapes[1]}")
        gathered, ways = self.attention.gather(self.gather_norm(compressed), self.source_norm(lookup))
        compressed = compressed + self._kept(0, gathered, deterministic)
        compressed = self.refine(compressed, edits=edits, deterministic=deterministic)
        infused = self.attention.infuse(self.infuse_norm(compressed), ways)
        lookup = lookup + self._kept(1, infused, deterministic)
        cheap = call(self.mlp, self.mlp_norm(lookup), deterministic)
        return Streams(compressed, lookup + self._kept(2, cheap, deterministic))

    def _kept(self, step: int, y: jax.Array, deterministic: bool) -> jax.Array:
        return y if self.drop_path is None else self.drop_path[step](y, deterministic=deterministic)


@register(
    "lookupvit.backbone",
    kind=Kind.BACKBONE,
    cost=_COST,
    kernel="block_sparse_attention",
    summary="a vision transformer that works on a few compressed tokens, as many as a call chooses",
    small={"features": 8, "num_heads": 2, "depth": 1, "p": 1.0, "compressed_grid": (2, 2), "class_token": True}
    | {"image_size": 32, "patch_size": 8, "num_classes": 5},
    **_SOURCE,
)
class LookupViT(Editable):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults have the width of ViT-Ti.

    Images of other sizes, multiples of the patch, get a table of positions by bilinear interpolation.

    Args:
      features: channels C.
      num_heads: heads.
      depth: blocks.
      compressed_grid: rows and columns of the compressed tokens, unless a call says otherwise.
      class_token: whether a learned token stands in front of the compressed ones and is classified; else their mean is.
      mixers: builds the mixers of the compressed tokens, `staged.Choice`, or a registered name; softmax attention when
        None.
      image_size: pixels on a side, or (rows, columns), for which the positions are made.
      patch_size: pixels on a side of a patch.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      norm_eps: of all norms.
      dropout: rate after the positions, inside feed-forwards and on what mixers return.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **block: further arguments of `LookupBlock`.

    Raises:
      ValueError: if the patches do not tile the image.
    """

    inputs: ClassVar[Images] = Images()
    model_points = frozenset({"logits"})

    def __init__(
        self,
        features: int = 192,
        *,
        num_heads: int = 3,
        depth: int = 12,
        compressed_grid: tuple[int, int] = (5, 5),
        class_token: bool = False,
        mixers: str | Builder | None = None,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        channels: int = 3,
        num_classes: int | None = 1000,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **block: Any,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        (grid,) = staged.halved_grids(image_size, patch_size, 1)
        self.image_shape, self.dtype, self.compressed_grid = (None, None, channels), dtype, tuple(compressed_grid)
        self.stem = PatchEmbed(channels, features, staged.pair(patch_size), **common)
        self.position = PositionTable(grid, features, resize="bilinear", **stored)
        self.prefix = Prefix(1, features, **stored) if class_token else nnx.data(None)
        table = {"prefix": int(class_token), "resize": "bilinear", **stored}
        self.compressed_position = PositionTable(self.compressed_grid, features, **table)
        self.dropout = nnx.data(staged.dropout_or_none(dropout, rngs))
        sizes = {"num_heads": num_heads, "num_layers": depth, "norm_eps": norm_eps, "dropout": dropout, **block}
        rates = [drop_path * layer / max(depth - 1, 1) for layer in range(depth)]
        self.block = nnx.List(
            [
                LookupBlock(features, mixer=mixers, layer=layer, drop_path=rate, **sizes, **common)
                for layer, rate in enumerate(rates)
            ]
        )
        self.norm = LayerNorm(features, eps=norm_eps, **stored)
        self.head = nnx.data(staged.classifier(features, num_classes, **common))
        redraw_kernels(self, trunc_normal, rngs=rngs)

    def stages(
        self, images: ArrayLike, *, compressed_grid: tuple[int, int] | None = None, deterministic: bool = True
    ) -> tuple[jax.Array, ...]:
        """The map `(B, Hh, Ww, C)` of the lookup tokens behind the last block, for dense prediction."""
        return (self._through(images, compressed_grid, deterministic, self.edits().blocks)[1],)

    def tokens(
        self, images: ArrayLike, *, compressed_grid: tuple[int, int] | None = None, deterministic: bool = True
    ) -> jax.Array:
        """The compressed tokens `(B, prefix + M, C)` behind the last block; the norm stands behind the pooling."""
        return self._through(images, compressed_grid, deterministic, self.edits().blocks)[0]

    def pooled(
        self, images: ArrayLike, *, compressed_grid: tuple[int, int] | None = None, deterministic: bool = True
    ) -> jax.Array:
        """What is classified: one vector `(B, C)` for each image."""
        return self._pooled(images, compressed_grid, deterministic, self.edits().blocks)

    def __call__(
        self, images: ArrayLike, *, compressed_grid: tuple[int, int] | None = None, deterministic: bool = True
    ) -> jax.Array:
        """Logits, or without a head what `pooled` gives.

        Args:
          images: `(B, H, W, channels)`.
          compressed_grid: rows and columns of the compressed tokens; those of the constructor when None.
          deterministic: False in training.

        Raises:
          ValueError: for images that patches do not tile, or a grid without tokens.
        """
        edits = self.edits()
        x = self._pooled(images, compressed_grid, deterministic, edits.blocks)
        if self.head is None:
            return x
        return visit(self, edits.model, "logits", self.head(x).astype(jnp.float32))

    def _pooled(
        self,
        images: ArrayLike,
        grid: tuple[int, int] | None,
        deterministic: bool,
        edits: Sequence[Edits | None] | None,
    ) -> jax.Array:
        x = self._through(images, grid, deterministic, edits)[0]
        return self.norm(staged.token_mean(x) if self.prefix is None else x[:, 0])

    def _through(
        self,
        images: ArrayLike,
        grid: tuple[int, int] | None,
        deterministic: bool,
        edits: Sequence[Edits | None] | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Compressed tokens and the map of the lookup tokens."""
        images = jnp.asarray(images, self.dtype)
        if images.ndim != 4 or images.shape[-1] != self.image_shape[-1]:
            raise ValueError(f"images must be (B, H, W, {self.image_shape[-1]}), got {images.shape}")
        grid = self.compressed_grid if grid is None else tuple(grid)
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"compressed_grid must be rows and columns of tokens, got {grid}")
        patches = self.stem(images)
        compressed = resize_bilinear(patches, grid)
        if self.prefix is None:
            compressed = compressed + self.compressed_position(compressed)
            compressed = compressed.reshape(compressed.shape[0], -1, compressed.shape[-1])
        else:
            compressed = self.prefix(compressed)
            compressed = compressed + self.compressed_position(compressed, grid=grid)
        lookup = (patches + self.position(patches)).reshape(patches.shape[0], -1, patches.shape[-1])
        if self.dropout is not None:
            compressed, lookup = (self.dropout(x, deterministic=deterministic) for x in (compressed, lookup))
        for block, edit in zip(self.block, edits or (None,) * len(self.block), strict=True):
            compressed, lookup = block(compressed, lookup, edits=edit, deterministic=deterministic)
        return compressed, lookup.reshape(patches.shape)


LOOKUPVITS: Models = {
    "lookupvit_tiny": (LookupViT, {}),
    "lookupvit_small": (LookupViT, {"features": 384, "num_heads": 6}),
    "lookupvit_base": (LookupViT, {"features": 768, "num_heads": 12}),
}
"""For `staged.build_named`, of the widths of ViT. The authors released no code, and what their models count could
not be read: the tests hold these to the sum of their maps."""
