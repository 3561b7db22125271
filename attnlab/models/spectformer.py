"""SpectFormer's two backbones (Patro et al., 2023, arXiv:2304.06446): spectral gates first, attention behind.

Vanilla, of one grid: four spectral blocks, then blocks of softmax attention. As in the authors' code a spectral block
has one residual around the gate and the feed-forward, where the paper draws two:

    x = x + MLP(LN(gate(LN(x))))          a spectral block
    x = x + attention(LN(x));   x = x + MLP(LN(x))          one of attention

Hierarchical, of four stages, gates in the first two, every block with two residuals and PVTv2's feed-forward with a
depthwise convolution. Behind the last stage a class token, at first the mean of the tokens, reads them once (class
attention), and is classified behind a norm; with token labels (LV-ViT) half of the largest logit of the tokens, class
by class, is added at inference.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.mixers.spectformer import PAPER, SpectralGating
from attnlab.models import staged
from attnlab.models.block import Block
from attnlab.models.pyramid import Pyramid
from attnlab.models.staged import Choice, Mixers, Models, Place, Stage, StagedBackbone
from attnlab.nn.activations import relu
from attnlab.nn.chain import call
from attnlab.nn.conv import ConvStem, PatchEmbed, redraw_convolutions
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.linear import trunc_normal
from attnlab.nn.norms import BatchNorm, LayerNorm
from attnlab.nn.positions import PositionTable
from attnlab.points import Edits, visit
from attnlab.pooling.cait import ClassAttentionBlock
from attnlab.registry import Cost, Kind, Source, register

_COST = Cost(time="O(N·log(N)·C + N²·C)", memory="O(N²·H)")


class SpectralBlock(Block):
    """A block with one residual: x = x + mlp(norm2(mixer(norm1(x)))). Its parts are those of `Block`."""

    sums_branches = False

    @property
    def points(self) -> frozenset[str]:
        return super().points - {"middle"}

    def _through(self, x: jax.Array, mix: Any, edits: Edits | None, deterministic: bool) -> tuple[jax.Array, Any]:
        x = visit(self, edits, "stream", x)
        y, new = mix(visit(self, edits, "normed", call(self.norm1, x, deterministic)))
        y = call(self.norm2, visit(self, edits, "mixed", y), deterministic)
        y = visit(self, edits, "mlp", call(self.mlp, y, deterministic))
        return x + (y if self.drop_path is None else self.drop_path(y, deterministic=deterministic)), new


def spectral_block(place: Place, *, rngs: nnx.Rngs, **options: Any) -> SpectralBlock:
    """A spectral block of the vanilla model; `options` as `transformer_block`."""
    plain = staged.transformer_block(place, rngs=rngs, **options)
    return SpectralBlock(plain.mixer, plain.mlp, plain.norm1, plain.norm2, drop_path=place.drop_path, rngs=rngs)


@register(
    "spectformer.vanilla",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="badripatro/SpectFormers",
    cost=_COST,
    summary="patches of one grid through four spectral blocks, then through blocks of softmax attention",
    small={"features": 12, "num_heads": 2, "depth": 3, "spectral": 2, "patch_size": 8, "image_size": 32}
    | {"num_classes": 5, "mlp_ratio": 2.0},
)
class SpectFormer(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are SpectFormer-XS.

    Args:
      features: channels C.
      num_heads: heads of the attention.
      depth: blocks.
      spectral: how many of them, the first, are spectral.
      mixers: what takes the place of gates and attention.
      replaced: in how many of the first blocks; in all when None.
      mlp_ratio: hidden channels of feed-forwards over channels.
      image_size: pixels on a side, or (rows, columns).
      patch_size: pixels on a side of a patch.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      norm_eps: of all norms.
      dropout: rate after the positions, inside feed-forwards and around the attention.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      uniform_drop: whether all blocks have that rate.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if patches do not tile the image, or more blocks are spectral than there are.
    """

    def __init__(
        self,
        features: int = 384,
        *,
        num_heads: int = 6,
        depth: int = 12,
        spectral: int = 4,
        mixers: Mixers = None,
        replaced: int | None = None,
        mlp_ratio: float = 4.0,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        channels: int = 3,
        num_classes: int | None = 1000,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        uniform_drop: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not 0 <= spectral <= depth:
            raise ValueError(f"spectral must be from 0 to the depth {depth}, got {spectral}")
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        table = {"param_dtype": param_dtype, "rngs": rngs}
        shared = {"attention_dropout": dropout, "projection_dropout": dropout}
        block = {"mlp_ratio": mlp_ratio, "norm_eps": norm_eps, "dropout": dropout, "shared": shared} | common
        (grid,) = staged.halved_grids(image_size, patch_size, 1)

        def own(site: Any, index: int = 0, **options: Any) -> nnx.Module:
            return Choice(SpectralGating if index < spectral else SoftmaxAttention)(site, index, **options)

        (places,) = staged.places(
            [features],
            [grid],
            num_heads=[num_heads],
            depths=[depth],
            own=[own],
            mixers=mixers,
            replaced=[replaced],
            drop_path=drop_path,
        )
        if uniform_drop:
            places = [dataclasses.replace(place, drop_path=drop_path) for place in places]
        kinds = [spectral_block] * spectral + [staged.transformer_block] * (depth - spectral)
        stage = Stage(
            [build(place, **block) for build, place in zip(kinds, places, strict=True)],
            position=PositionTable(grid, features, **table),
            dropout=staged.dropout_or_none(dropout, rngs),
        )
        super().__init__(
            PatchEmbed(channels, features, staged.pair(patch_size), **common),
            [stage],
            norm=LayerNorm(features, eps=norm_eps, **table),
            head=staged.classifier(features, num_classes, **common),
            image_size=staged.pair(image_size),
            channels=channels,
            dtype=dtype,
        )
        redraw_kernels(self, trunc_normal, rngs=rngs)


class ClassToken(nnx.Module):
    """The mean of tokens `(B, N, C)` reads them by class attention, in some blocks; `(B, C)`, not normed."""

    def __init__(self, blocks: Sequence[ClassAttentionBlock]):
        self.blocks = nnx.List(blocks)

    def __call__(self, x: jax.Array) -> jax.Array:
        cls = staged.token_mean(x)[:, None]
        for block in self.blocks:
            cls, _ = block(cls, x)
        return cls[:, 0]


@register(
    "spectformer.hierarchical",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="badripatro/SpectFormers",
    cost=_COST,
    summary="stages of spectral gates, then of softmax attention; a class token reads the last; token labels",
    small={"features": (8, 8, 16), "num_heads": (2, 2, 2), "depths": (1, 1, 1), "mlp_ratios": (2, 2, 2)}
    | {"stem_features": 4, "image_size": 32, "num_classes": 5},
)
class HierarchicalSpectFormer(Pyramid):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are SpectFormer-H-S.

    Args:
      features: channels C of each stage.
      num_heads: heads of each stage.
      depths: blocks of each stage.
      mlp_ratios: hidden channels of feed-forwards over channels, of each stage.
      spectral: how many of the stages, the first, are spectral.
      stem_features: channels of the stem's first three convolutions.
      token_label: whether the tokens too are classified, as training with token labels needs.
      num_classes: classes; without any the pooled features are the result.
      norm_eps: of the norms of blocks, behind stages and of the class token.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `Pyramid`.

    Raises:
      ValueError: if the lists have different lengths.
    """

    def __init__(
        self,
        features: Sequence[int] = (64, 128, 320, 448),
        *,
        num_heads: Sequence[int] = (2, 4, 10, 14),
        depths: Sequence[int] = (3, 4, 6, 3),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        spectral: int = 2,
        stem_features: int = 32,
        token_label: bool = True,
        num_classes: int | None = 1000,
        norm_eps: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common, width = {"dtype": dtype, **stored}, stem_features
        norm, entry = functools.partial(LayerNorm, eps=norm_eps), functools.partial(LayerNorm, eps=1e-5)
        stem = ConvStem(
            family.get("channels", 3),
            (width, width, width, features[0]),
            strides=(2, 1, 1, 2),
            kernel_size=(7, 3, 3, 3),
            norm=(BatchNorm, BatchNorm, BatchNorm, entry),
            activation=relu,
            use_bias=(False, False, False, True),
            **common,
        )
        own = [[Choice(SpectralGating if stage < spectral else SoftmaxAttention)] for stage in range(len(depths))]
        super().__init__(
            features,
            own=own,
            stem=stem,
            down={"kernel_size": 3, "norm": entry},
            num_heads=num_heads,
            depths=depths,
            mlp_ratio=mlp_ratios,
            block={"mlp": {"depthwise": 3}},
            num_classes=num_classes,
            norm_eps=norm_eps,
            norm_first=False,
            rngs=rngs,
            **({"dtype": dtype, "param_dtype": param_dtype} | family),
        )
        for stage, channels in zip(self.stage[:-1], features[:-1], strict=True):
            stage.norm = norm(channels, **stored)
        options = {"num_heads": num_heads[-1], "mlp_ratio": mlp_ratios[-1], "norm_eps": norm_eps, **stored}
        self.pool = ClassToken([ClassAttentionBlock(features[-1], init=None, **options)])
        self.token_head = nnx.data(None)
        if token_label and num_classes:
            self.token_head = staged.classifier(features[-1], num_classes, **common)
        redraw_kernels(self, trunc_normal, rngs=rngs)
        redraw_convolutions(self, rngs=rngs)

    def __call__(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """Logits `(B, num_classes)`: with token labels, those of the class token and half the tokens' largest."""
        if self.token_head is None:
            return super().__call__(images, deterministic=deterministic)
        edits = self.edits()
        of_class, of_tokens = self._logits(self._through(images, edits, deterministic)[1])
        return visit(self, edits.model, "logits", of_class + 0.5 * of_tokens.max(1))

    def label_tokens(
        self, images: ArrayLike, *, box: tuple[int, int, int, int] | None = None, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """What training with token labels compares: logits of the class token and of every token of the last stage.

        Args:
          images: `(B, H, W, channels)`.
          box: rows from, to, columns from, to, in tokens of the last stage, static: there the first stage's tokens are
            those of the batch in reverse order (MixToken), and so are the tokens' logits, which thereby are each
            image's own again.
          deterministic: False in training.

        Returns:
          `(B, num_classes)` and `(B, N, num_classes)`, float32.

        Raises:
          ValueError: if the model has no head for tokens.
        """
        if self.token_head is None:
            raise ValueError("token_label must be True for logits of tokens")
        x, edits = self._embedded(images, deterministic), self.edits()
        maps, tokens = self._through_stages(_mixed(x, box, 2 ** (len(self.stage) - 1)), edits, deterministic)
        of_class, of_tokens = self._logits(tokens)
        whole = _mixed(of_tokens.reshape(*maps[-1].shape[:3], -1), box, 1)
        return of_class, whole.reshape(of_tokens.shape)

    def _logits(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """From the last stage's tokens `(B, N, C)`, of the class token and of them."""
        of_class = self.head(call(self.norm, self.pool(tokens), True))
        return of_class.astype(jnp.float32), self.token_head(call(self.norm, tokens, True)).astype(jnp.float32)


def _mixed(x: jax.Array, box: tuple[int, int, int, int] | None, stride: int) -> jax.Array:
    """`(B, H, W, C)` with the reversed batch inside a box."""
    if box is None:
        return x
    top, bottom, left, right = (stride * side for side in box)
    return x.at[:, top:bottom, left:right].set(x[::-1, top:bottom, left:right])


_SMALL = {"depth": 19, "drop_path": 0.15}
_BASE = {"features": 512, "num_heads": 8, "depth": 19, "drop_path": 0.25}
_H_BASE = {"features": (64, 128, 320, 512), "num_heads": (2, 4, 10, 16), "depths": (3, 4, 12, 3), "stem_features": 64}
_H_LARGE = {"features": (96, 192, 384, 512), "num_heads": (3, 6, 12, 16), "depths": (3, 6, 18, 3), "stem_features": 64}
SPECTFORMERS: Models = {
    "spectformer_ti": (SpectFormer, {"features": 256, "num_heads": 4}),
    "spectformer_xs": (SpectFormer, {}),
    "spectformer_s": (SpectFormer, _SMALL),
    "spectformer_b": (SpectFormer, _BASE),
    "spectformer_h_s": (HierarchicalSpectFormer, {}),
    "spectformer_h_b": (HierarchicalSpectFormer, _H_BASE),
    "spectformer_h_l": (HierarchicalSpectFormer, _H_LARGE),
}
"""For `staged.build_named`. The authors' code has six heads in all vanilla models and a comment that says 4, 6 and 12,
neither of which divides the channels of the largest: it has 8 here, of size 64 like the others'."""
