"""CrossFormer (Wang et al., ICLR 2022, arXiv:2108.00154) and CrossFormer++ (arXiv:2303.06908).

    x = x + attention(LN(x));   x = x + MLP(LN(x));   and in some blocks of ++   x = LN(DWConv(x))          a block

Attention is at short and at long distance in turn. Tokens are made of patches of several sizes at once: convolutions
of one stride and several kernels, whose channels stand side by side, half of them of the smallest kernel, a quarter of
the next, and so on; between stages too, behind a norm there. A norm, the mean over tokens and a linear classifier end
it. The code is at cheerss/CrossFormer.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.local.crossformer import PAPER, LongShortDistanceAttention
from attnlab.contract import Site
from attnlab.models import staged
from attnlab.models.block import Block
from attnlab.models.staged import Builder, Choice, Mixers, Models, Place, Stage, StagedBackbone
from attnlab.nn.conv import Norm
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.grids import pad_to_multiple
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.linear import Conv, trunc_normal
from attnlab.nn.norms import LayerNorm
from attnlab.registry import Cost, Kind, Source, register


def layer_norm(features: int, **stored: Any) -> LayerNorm:
    """The norm of all parts."""
    return LayerNorm(features, eps=1e-5, **stored)


class CrossScaleEmbedding(nnx.Module):
    """Patches of several sizes at one stride, each size with channels of its own: `(B, H, W, C)` to `(B, H', W', C')`.

    Sides are first padded with zeros at their end, up to a multiple of the stride.

    Args:
      in_features: channels C.
      features: channels C'.
      kernel_sizes: sides of the patches; the i-th has C' / 2^(i+1) channels, the last as many as the one before it.
      stride: between patches.
      norm: builds a norm; none when None.
      norm_first: whether it stands in front of the convolutions.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for a kernel that is smaller than the stride, or too few channels.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_sizes: Sequence[int],
        *,
        stride: int,
        norm: Norm | None = layer_norm,
        norm_first: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        last = len(kernel_sizes) - 1
        if last < 0 or min(kernel_sizes) < stride or features % 2**last:
            raise ValueError(
                f"kernel_sizes must be at least the stride {stride}, and 2^{max(last, 0)} must divide the {features} "
                f"channels, got {tuple(kernel_sizes)}"
            )
        common = {"param_dtype": param_dtype, "rngs": rngs}
        self.stride, self.norm_first, self.convs = stride, norm_first, nnx.List([])
        for index, side in enumerate(kernel_sizes):
            width = features // 2 ** min(index + 1, last)
            padding = [((side - stride) // 2,) * 2] * 2
            conv = Conv(in_features, width, (side, side), strides=stride, padding=padding, dtype=dtype, **common)
            self.convs.append(conv)
        self.norm = nnx.data(None if norm is None else norm(in_features if norm_first else features, **common))

    def __call__(self, x: ArrayLike) -> jax.Array:
        x = jnp.asarray(x)
        x = self.norm(x) if self.norm is not None and self.norm_first else x
        x = pad_to_multiple(x, self.stride)[0]
        y = jnp.concatenate([conv(x) for conv in self.convs], -1)
        return y if self.norm is None or self.norm_first else self.norm(y)


class NormedConv(nnx.Module):
    """LN(DWConv3×3(x)); arguments as `LayerNorm`."""

    def __init__(self, features: int, *, dtype: Any = None, **stored: Any):
        self.conv = DepthwiseConv(features, (3, 3), dtype=dtype, **stored)
        self.norm = layer_norm(features, **stored)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(B, H, W, C)` to the same shape."""
        return self.norm(self.conv(x))


def block_at(place: Place, *, convolved: bool = False, **options: Any) -> Block:
    """A block at a place; maybe with the convolution behind it. Further options are those of `transformer_block`."""
    block = staged.transformer_block(place, norm_eps=1e-5, **options)
    if convolved:
        stored = {name: options[name] for name in ("dtype", "param_dtype", "rngs") if name in options}
        block.after = NormedConv(place.site.features, **stored)
    return block


def in_turn(group: Sequence[int], **options: Any) -> Builder:
    """Builds a stage's attention, at short and long distance in turn, with a group size for each block."""

    def build(site: Site, index: int = 0, *, rngs: nnx.Rngs, **shared: Any) -> nnx.Module:
        here = {"group": group[index], "long": index % 2 == 1} | options
        return Choice(LongShortDistanceAttention, here)(site, index, rngs=rngs, **shared)

    return build


@register(
    "crossformer.backbone",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="cheerss/CrossFormer",
    cost=Cost(time="O(N·G²·C)", memory="O(N·G²·H)"),
    summary="four stages of attention at short and long distance in turn, on patches of several sizes",
    small={
        "features": 16,
        "num_heads": (2,),
        "depths": (2,),
        "group": (2,),
        "interval": (2,),
        "patch_sizes": (4, 8),
        "merge_sizes": (),
        "mlp_ratio": 1.0,
        "image_size": 32,
        "num_classes": 5,
    },
)
class CrossFormer(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are CrossFormer-S.

    Args:
      features: channels C of the first stage; each later stage has twice as many.
      num_heads: heads per stage.
      depths: blocks per stage.
      group: tokens on a side of a group, in each stage, or in each block of each stage.
      interval: between the tokens of a group of long distance, in each stage; None for groups that span all rows.
      patch_sizes: sides of the patches of the image; the first is the stride.
      merge_sizes: sides of the patches of tokens between stages, at stride 2, for each stage but the last.
      convolved: whether each third block, but a stage's last, ends with a convolution (CrossFormer++).
      hide_padding: whether what images are padded with for their groups is hidden.
      centred: whether half of that padding stands in front.
      scale: of the scores, D^-1/2 when None.
      mixers: what takes the place of the attention, in all stages or in each.
      replaced: in how many of the first blocks of each stage; in all where it is None.
      qkv_bias: whether queries, keys and values have a bias.
      mlp_ratio: hidden channels over channels, in all stages or in each.
      image_size: pixels on a side, or (rows, columns); None for any.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      attention_dropout: rate on attention weights, in mixers that have them.
      dropout: rate on what mixers return and inside feed-forwards.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the lists have different lengths.
    """

    def __init__(
        self,
        features: int = 96,
        *,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        depths: Sequence[int] = (2, 2, 6, 2),
        group: Sequence[int | Sequence[int]] = (7, 7, 7, 7),
        interval: Sequence[int | None] = (8, 4, 2, 1),
        patch_sizes: Sequence[int] = (4, 8, 16, 32),
        merge_sizes: Sequence[Sequence[int]] = ((2, 4), (2, 4), (2, 4)),
        convolved: bool = False,
        hide_padding: bool = True,
        centred: bool = False,
        scale: float | None = None,
        mixers: Mixers = None,
        replaced: Sequence[int | None] | None = None,
        qkv_bias: bool = True,
        mlp_ratio: float | Sequence[float] = 4.0,
        image_size: int | Sequence[int] | None = 224,
        channels: int = 3,
        num_classes: int | None = 1000,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        count = len(depths)
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        ratios = mlp_ratio if isinstance(mlp_ratio, Sequence) else [mlp_ratio] * count
        staged.per_stage(count, group=group, interval=interval, mlp_ratio=ratios, merge_sizes=[(), *merge_sizes])
        sizes = [
            tuple(size) if isinstance(size, Sequence) else (size,) * depth
            for size, depth in zip(group, depths, strict=True)
        ]
        if any(len(each) != depth for each, depth in zip(sizes, depths, strict=True)):
            raise ValueError(f"group must be one number for each stage or block of the depths {depths}, got {group}")
        options = {"hide_padding": hide_padding, "centred": centred, "scale": scale}
        size = None if image_size is None else staged.pair(image_size)
        strides = [patch_sizes[0] << stage for stage in range(count)]
        widths = [features << stage for stage in range(count)]
        places = staged.places(
            widths,
            [None if size is None else (-(-size[0] // stride), -(-size[1] // stride)) for stride in strides],
            num_heads=num_heads,
            depths=depths,
            own=[in_turn(each, interval=step, **options) for each, step in zip(sizes, interval, strict=True)],
            mixers=mixers,
            replaced=replaced,
            drop_path=drop_path,
        )
        shared = {"qkv_bias": qkv_bias, "attention_dropout": attention_dropout, "projection_dropout": dropout}
        stages = []
        for stage, here in enumerate(places):
            blocks = [
                block_at(
                    place,
                    mlp_ratio=ratios[stage],
                    convolved=convolved and index % 3 == 2 and index < len(here) - 1,
                    dropout=dropout,
                    shared=shared,
                    **common,
                )
                for index, place in enumerate(here)
            ]
            down = None
            if stage:
                kernels = merge_sizes[stage - 1]
                down = CrossScaleEmbedding(
                    widths[stage - 1], widths[stage], kernels, stride=2, norm_first=True, **common
                )
            stages.append(Stage(blocks, down=down))
        super().__init__(
            CrossScaleEmbedding(channels, features, patch_sizes, stride=patch_sizes[0], **common),
            stages,
            norm=layer_norm(widths[-1], **stored),
            head=staged.classifier(widths[-1], num_classes, **common),
            image_size=size,
            channels=channels,
            dtype=dtype,
        )
        redraw_kernels(self, trunc_normal, rngs=rngs)


_TINY = {"features": 64, "num_heads": (2, 4, 8, 16), "depths": (1, 1, 8, 6)}
_BASE = {"depths": (2, 2, 18, 2)}
_LARGE = _BASE | {"features": 128, "num_heads": (4, 8, 16, 32)}
_PLUS = {"group": (4, 4, 14, 7), "interval": (4, 2, 1, 1), "convolved": True}
CROSSFORMERS: Models = {
    "crossformer_tiny": (CrossFormer, _TINY),
    "crossformer_small": (CrossFormer, {}),
    "crossformer_base": (CrossFormer, _BASE),
    "crossformer_large": (CrossFormer, _LARGE),
    "crossformerpp_small": (CrossFormer, _BASE | {"features": 64, "num_heads": (2, 4, 8, 16)} | _PLUS),
    "crossformerpp_base": (CrossFormer, _BASE | _PLUS),
    "crossformerpp_large": (CrossFormer, _LARGE | _PLUS),
    "crossformerpp_huge": (CrossFormer, _LARGE | {"depths": (6, 6, 18, 2)} | _PLUS),
}
"""For `staged.build_named`: 27.8, 30.7, 52.0, 92.0 M parameters, ++ 23.3, 52.0, 92.0, 96.0 M (84.9 % on ImageNet)."""
