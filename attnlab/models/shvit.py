"""SHViT (Yun and Ro, CVPR 2024, arXiv:2401.16456): few tokens from the start, and one head of attention.

    x = x + BN(DWConv(x));   x = x + SHSA(x);   x = x + BN(W₂ relu(BN(W₁ x)))          a block; of kind "i" without SHSA

Four strided convolutions make tokens of stride 16. Between stages of unequal width a block without attention stands in
front of, and another behind, an inverted bottleneck of stride 2 with squeeze-and-excitation; stages of equal width are
one. Nothing depends on the image's size.
Reference: timm's port of ysj9909/SHViT.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention.dense.shvit import PAPER, SingleHeadAttention
from attnlab.models import staged
from attnlab.models.block import Block
from attnlab.models.staged import Choice, Mixers, Models, Stage, StagedBackbone
from attnlab.nn.activations import relu
from attnlab.nn.chain import Chain, call
from attnlab.nn.conv import ConvNorm, ConvStem, SqueezeExcite, divisible
from attnlab.nn.linear import Linear, trunc_normal
from attnlab.nn.norms import BatchNorm, LayerNorm
from attnlab.registry import Cost, Kind, Source, register


def conv_norm(in_features: int, features: int, side: int, *, zero: bool = False, **options: Any) -> ConvNorm:
    """A convolution without bias and its batch norm, whose scale is zero at the start with `zero`."""
    conv = ConvNorm(in_features, features, side, norm=BatchNorm, use_bias=False, **options)
    if zero:
        conv.norm.scale[...] = jnp.zeros_like(conv.norm.scale[...])
    return conv


def feed_forward(features: int, **common: Any) -> Chain:
    """Two maps with their norms around a ReLU, which begin as nothing."""
    return Chain(
        conv_norm(features, 2 * features, 1, activation=relu, axes=("embed", "mlp"), **common),
        conv_norm(2 * features, features, 1, zero=True, axes=("mlp", "embed"), **common),
    )


def convolved_block(features: int, mixer: nnx.Module | None = None, *, drop_path: float = 0.0, **common: Any) -> Block:
    """A block of SHViT around a mixer, or none.

    Args:
      features: channels C.
      mixer: of the middle branch; one that does not norm its input is given a LayerNorm in front.
      drop_path: stochastic depth rate.
      **common: `dtype`, `param_dtype` and `rngs`.
    """
    own_norm = mixer is None or getattr(mixer, "norms_its_input", False)
    stored = {name: common[name] for name in ("param_dtype", "rngs") if name in common}
    return Block(
        mixer=mixer,
        mlp=feed_forward(features, **common),
        norm1=None if own_norm else LayerNorm(features, **stored),
        norm2=None,
        before=conv_norm(features, features, 3, groups=features, zero=True, **common),
        drop_path=drop_path,
        rngs=common["rngs"],
    )


class Convolved(nnx.Module):
    """x + conv(x), then x + mlp(x): a block without attention, beside the merging of tokens.

    Args:
      features: channels C.
      **common: `dtype`, `param_dtype` and `rngs`.
    """

    def __init__(self, features: int, **common: Any):
        self.before = conv_norm(features, features, 3, groups=features, **common)
        self.mlp = feed_forward(features, **common)

    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        x = x + call(self.before, x, deterministic)
        return x + call(self.mlp, x, deterministic)


class InvertedMerging(nnx.Module):
    """`(B, H, W, C)` to `(B, ⌈H/2⌉, ⌈W/2⌉, C')` by a convolution of each of 4 C channels, which gates and maps follow.

    Args:
      features: channels C.
      out_features: channels C'.
      **common: `dtype`, `param_dtype` and `rngs`.
    """

    def __init__(self, features: int, out_features: int, **common: Any):
        hidden = 4 * features
        self.expand = conv_norm(features, hidden, 1, activation=relu, axes=("embed", "mlp"), **common)
        spatial = {"stride": 2, "groups": hidden, "axes": (None, "mlp"), "activation": relu}
        self.spatial = conv_norm(hidden, hidden, 3, **spatial, **common)
        self.gate = SqueezeExcite(hidden, divisible(features), **common)
        self.reduce = conv_norm(hidden, out_features, 1, axes=("mlp", "embed"), **common)

    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        x = call(self.spatial, call(self.expand, x, deterministic), deterministic)
        return call(self.reduce, self.gate(x), deterministic)


def merging(features: int, out_features: int, **common: Any) -> Chain:
    """What leads from stage to stage."""
    return Chain(
        Convolved(features, **common),
        InvertedMerging(features, out_features, **common),
        Convolved(out_features, **common),
    )


@register(
    "shvit.backbone",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.THIRD_PARTY,
    repository="huggingface/pytorch-image-models",
    cost=Cost(time="O(N²·(D+P) + N·C²)", memory="O(N²)"),
    summary="stages at strides 16, 32 and 64 of convolutions, single-head attention and feed-forwards",
    small={
        "features": (16, 24),
        "partial": (4, 6),
        "key_dim": (4, 4),
        "depths": (1, 1),
        "kinds": ("i", "s"),
        "num_classes": 5,
        "image_size": 32,
    },
)
class SHViT(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are SHViT-S1.

    Args:
      features: channels C of each stage.
      partial: channels P that attend, of each stage.
      key_dim: channels D of queries and keys, of each stage.
      depths: blocks of each stage.
      kinds: of each stage, "s" with attention and "i" without.
      mixers: what takes the place of the attention, in all stages or in each.
      num_heads: heads of each stage for such mixers.
      image_size: pixels on a side, or (rows, columns); None for any.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the lists have different lengths, or a kind is another.
    """

    def __init__(
        self,
        features: Sequence[int] = (128, 224, 320),
        *,
        partial: Sequence[int] = (32, 48, 68),
        key_dim: Sequence[int] = (16, 16, 16),
        depths: Sequence[int] = (2, 4, 5),
        kinds: Sequence[str] = ("i", "s", "s"),
        mixers: Mixers = None,
        num_heads: Sequence[int] | None = None,
        image_size: int | Sequence[int] | None = 224,
        channels: int = 3,
        num_classes: int | None = 1000,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        staged.per_stage(len(depths), partial=partial, key_dim=key_dim, kinds=kinds)
        if set(kinds) - {"s", "i"}:
            raise ValueError(f"kinds must be 's' or 'i', got {tuple(kinds)}")
        size = None if image_size is None else staged.pair(image_size)
        wider = [stage > 0 and features[stage] != features[stage - 1] for stage in range(len(depths))]
        strides = [16 << sum(wider[: stage + 1]) for stage in range(len(depths))]
        own = [
            Choice(SingleHeadAttention, {"partial": channels, "key_dim": keys})
            for channels, keys in zip(partial, key_dim, strict=True)
        ]
        places = staged.places(
            features,
            [None if size is None else (math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in strides],
            num_heads=[1] * len(depths) if num_heads is None else num_heads,
            depths=depths,
            own=own,
            mixers=mixers,
            drop_path=drop_path,
        )
        stages = []
        for stage, here in enumerate(places):
            width, attends = features[stage], kinds[stage] == "s"
            blocks = [
                convolved_block(
                    width,
                    place.mixer(place.site, place.index, **common) if attends else None,
                    drop_path=place.drop_path,
                    **common,
                )
                for place in here
            ]
            stages.append(Stage(blocks, down=merging(features[stage - 1], width, **common) if wider[stage] else None))
        first = features[0]
        head = None
        if num_classes:
            head = Linear(features[-1], num_classes, axes=("embed", None), kernel_init=trunc_normal, **common)
        super().__init__(
            ConvStem(
                channels,
                (first // 8, first // 4, first // 2, first),
                strides=(2, 2, 2, 2),
                activation=relu,
                use_bias=False,
                **common,
            ),
            stages,
            norm=BatchNorm(features[-1], **stored),
            norm_first=False,
            head=head,
            image_size=size,
            channels=channels,
            dtype=dtype,
        )


SHVITS: Models = {
    "shvit_s1": (SHViT, {}),
    "shvit_s2": (SHViT, {"features": (128, 308, 448), "partial": (32, 66, 96)}),
    "shvit_s3": (SHViT, {"features": (192, 352, 448), "partial": (48, 75, 96), "depths": (3, 5, 5)}),
    "shvit_s4": (
        SHViT,
        {"features": (224, 336, 448), "partial": (48, 72, 96), "depths": (4, 7, 6), "image_size": 256},
    ),
}
"""For `staged.build_named`: S1 to S4 have 6.3, 11.4, 14.2, 16.5 M parameters (72.8, 75.2, 77.4, 79.4 % on ImageNet)."""
