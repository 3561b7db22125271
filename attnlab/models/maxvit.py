"""MaxViT (Tu et al., ECCV 2022, arXiv:2204.01697): in each block convolutions, attention in windows, and in a grid.

    x = shortcut(x) + W₂ SE(f(BN(DWConv(f(BN(W₁ BN(x)))))))                     an inverted bottleneck, its stride once
    x = x + block attention(LN(x));   x = x + MLP(LN(x));   x = x + grid attention(LN(x));   x = x + MLP(LN(x))

The first bottleneck of a stage has stride 2, and its shortcut is the mean of 2 x 2 tokens, with a linear map if the
channels change. Two convolutions of stride 2 together make the stem; the mean over tokens, a norm and a classifier
with a hidden layer end it. Groups of both attentions have 1/32 of the image's side unless told otherwise.

`MaxViT` is the authors' model, whose TensorFlow weights timm's port loads; `MaxViTRW` is timm's own, of an earlier
reading of the paper: SiLU in convolutions, narrower bottlenecks, a norm of tokens and a linear classifier.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.local.maxvit import PAPER, PartitionAttention
from attnlab.models import staged
from attnlab.models.block import Block
from attnlab.models.staged import Builder, Choice, Mixers, Models, Place, Stage, StagedBackbone
from attnlab.nn.activations import Activation, gelu, gelu_tanh, silu, tanh
from attnlab.nn.chain import Chain, call
from attnlab.nn.conv import ConvNorm, SqueezeExcite, divisible
from attnlab.nn.grids import pad_to_multiple
from attnlab.nn.mlp import MLP, DropPath
from attnlab.nn.norms import BatchNorm, LayerNorm
from attnlab.nn.resampling import avg_pool
from attnlab.registry import Cost, Kind, Source, register


def halved(x: jax.Array) -> jax.Array:
    """Means of 2 x 2 tokens; odd sides are padded with a zero."""
    return avg_pool(pad_to_multiple(x, 2)[0], 2)


class Bottleneck(nnx.Module):
    """The branch of an inverted bottleneck: `(B, H, W, C)` to `(B, ⌈H/s⌉, ⌈W/s⌉, C')`.

    Args:
      features: channels C.
      out_features: channels C'; C when None.
      stride: s, 1 or 2.
      expansion: channels of the depthwise convolution, over C' or C.
      of_output: whether over C'.
      kernel_size: side of the depthwise convolution.
      use_bias: whether the last map, and that of a shortcut, has a bias.
      squeeze: channels inside squeeze-and-excitation over C', or over those of the convolution if these follow from C.
      squeeze_first: whether it stands in front of the convolution's norm.
      stride_at: what has the stride: the "convolution", the first "map", or a "pool" in front of it.
      activation: behind the inner norms.
      norm_eps: of all norms.
      same: whether a strided convolution is padded as TensorFlow does, at the end first; else on both sides.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for another place of the stride.
    """

    def __init__(
        self,
        features: int,
        out_features: int | None = None,
        *,
        stride: int = 1,
        expansion: float = 4.0,
        of_output: bool = True,
        kernel_size: int = 3,
        use_bias: bool = True,
        squeeze: float = 0.25,
        squeeze_first: bool = False,
        stride_at: Literal["convolution", "map", "pool"] = "convolution",
        activation: Activation = gelu_tanh,
        norm_eps: float = 1e-3,
        same: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        places = ("convolution", "map", "pool")
        if stride_at not in places or stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2 and stride_at one of {places}, got {stride} and {stride_at!r}")
        out = features if out_features is None else out_features
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        hidden = divisible(expansion * (out if of_output else features))
        norm = functools.partial(BatchNorm, eps=norm_eps)
        at = {place: stride if place == stride_at else 1 for place in places}
        pads = {"padding": "SAME"} if same and at["convolution"] > 1 else {}
        wide = {"groups": hidden, "stride": at["convolution"], "use_bias": False, "axes": (None, "mlp"), **pads}
        self.pooled, self.activation = stride_at == "pool" and stride > 1, activation
        self.norm = norm(features, **stored)
        inner = {"norm": norm, "activation": activation}
        maps = {"stride": at["map"], "padding": "VALID", "use_bias": False, "axes": ("embed", "mlp")}
        self.expand = ConvNorm(features, hidden, 1, **maps, **inner, **common)
        self.spatial = ConvNorm(
            hidden, hidden, kernel_size, **wide, **({"norm": None} if squeeze_first else inner), **common
        )
        self.late_norm = norm(hidden, **stored) if squeeze_first else nnx.data(None)
        few = int(squeeze * (out if of_output else hidden))
        self.gate = SqueezeExcite(hidden, few, activation=silu, **common)
        self.reduce = ConvNorm(hidden, out, 1, norm=None, use_bias=use_bias, axes=("mlp", "embed"), **common)

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        x = call(self.norm, jnp.asarray(x), deterministic)
        x = call(self.expand, halved(x) if self.pooled else x, deterministic)
        x = call(self.spatial, x, deterministic)
        if self.late_norm is None:
            x = self.gate(x)
        else:
            x = self.activation(call(self.late_norm, self.gate(x), deterministic))
        return call(self.reduce, x, deterministic)


class Entry(nnx.Module):
    """The first bottleneck of a stage, of stride 2, with its shortcut: `(B, H, W, C)` to `(B, ⌈H/2⌉, ⌈W/2⌉, C')`.

    Args:
      features: channels C.
      out_features: channels C'.
      drop_path: probability that the branch is dropped for an example in training.
      conv: options of `Bottleneck`.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if `drop_path` is positive.
    """

    def __init__(
        self,
        features: int,
        out_features: int,
        *,
        drop_path: float = 0.0,
        conv: Mapping[str, Any] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common, conv = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}, dict(conv or {})
        self.branch = Bottleneck(features, out_features, stride=2, **conv, **common)
        self.shortcut = nnx.data(None)
        if features != out_features:
            bias = conv.get("use_bias", True)
            self.shortcut = ConvNorm(features, out_features, 1, norm=None, use_bias=bias, **common)
        self.drop_path = DropPath(drop_path, rngs=rngs) if drop_path > 0 else nnx.data(None)

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        x = jnp.asarray(x)
        y = self.branch(x, deterministic=deterministic)
        y = y if self.drop_path is None else self.drop_path(y, deterministic=deterministic)
        skip = halved(x)
        return y + (skip if self.shortcut is None else self.shortcut(skip))


def bottleneck_block(features: int, *, conv: Mapping[str, Any] | None = None, drop_path: float = 0.0, **common: Any):
    """A bottleneck of stride 1 as a block without a mixer, its norm inside the branch."""
    branch = Bottleneck(features, **(conv or {}), **common)
    return Block(None, branch, None, None, drop_path=drop_path, rngs=common["rngs"])


def blocks_of(
    places: Sequence[Place], *, conv: Mapping[str, Any] | None, per_block: int, entered: bool, **options: Any
) -> list[Block]:
    """The blocks of a stage: in front of each block and grid attention a bottleneck, but for the first if `entered`."""
    common, blocks = {name: options[name] for name in ("dtype", "param_dtype", "rngs")}, []
    for index, place in enumerate(places):
        if index % per_block == 0 and not (entered and index == 0):
            blocks.append(bottleneck_block(place.site.features, conv=conv, drop_path=place.drop_path, **common))
        blocks.append(staged.transformer_block(place, **options))
    return blocks


def attention_of(
    window: int | Sequence[int],
    grid_window: int | Sequence[int] | None = None,
    block_attention: bool = True,
    **more: Any,
) -> list[Choice]:
    """Builders of the attentions of a block, in their order; further options are those of `PartitionAttention`."""
    sizes = {"block": window, "grid": window if grid_window is None else grid_window}
    kinds = ("block", "grid") if block_attention else ("grid",)
    return [
        Choice(PartitionAttention, {"partition": kind, "window": staged.pair(sizes[kind])} | more) for kind in kinds
    ]


def _in_turn(builders: Sequence[Builder]) -> Builder:
    def build(site: Any, index: int = 0, *, rngs: nnx.Rngs, **shared: Any) -> nnx.Module:
        return builders[index % len(builders)](site, index, rngs=rngs, **shared)

    return build


@register(
    "maxvit.backbone",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.THIRD_PARTY,
    repository="huggingface/pytorch-image-models",
    cost=Cost(time="O(N·n·C + N·C²)", memory="O(N·n·H)"),
    summary="stages of inverted bottlenecks, attention in windows and attention in a grid of distant tokens",
    small={
        "features": (8,),
        "depths": (1,),
        "head_dim": 8,
        "stem_features": 8,
        "head_features": 16,
        "window": 2,
        "mlp_ratio": 1.0,
        "conv": {"expansion": 1.0},
        "image_size": 32,
        "num_classes": 5,
    },
)
class MaxViT(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are MaxViT-T.

    Args:
      features: channels C of each stage.
      depths: blocks of each stage, each of a bottleneck and of both attentions.
      head_dim: channels of a head.
      stem_features: channels that the convolutions of the stem make, one number for both.
      stem_bias: whether these have a bias.
      window: rows and columns of the groups of block attention; 1/32 of the image when None.
      grid_window: those of grid attention; `window` when None.
      block_attention: whether there is block attention, beside grid attention.
      mixers: what takes the place of both attentions, in all stages or in each.
      replaced: in how many of the first attentions of each stage; in all where it is None.
      qkv_bias: whether queries, keys and values have a bias.
      out_bias: whether what attention returns has a bias.
      relative_bias: whether scores have the learned bias of offsets.
      mlp_ratio: hidden channels of feed-forwards over channels.
      layer_scale: factors of the channels of attentions and feed-forwards at the start; None for no factors.
      activation: of feed-forwards.
      norm_eps: of the norms of tokens and of the last one.
      conv: options of the bottlenecks, see `Bottleneck`; its activation, norms and padding are those of the stem too.
      head_features: hidden channels of the classifier, behind a norm of the mean; without, a norm of the tokens and a
        linear classifier.
      image_size: pixels on a side, or (rows, columns); None for any that the groups tile, with a `window`.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      attention_dropout: rate on attention weights.
      dropout: rate on what mixers return and inside feed-forwards.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the lists have different lengths, heads do not divide the channels, or there is neither a window
        nor an image size.
    """

    def __init__(
        self,
        features: Sequence[int] = (64, 128, 256, 512),
        *,
        depths: Sequence[int] = (2, 2, 5, 2),
        head_dim: int = 32,
        stem_features: int | Sequence[int] = 64,
        stem_bias: bool = True,
        window: int | Sequence[int] | None = None,
        grid_window: int | Sequence[int] | None = None,
        block_attention: bool = True,
        mixers: Mixers = None,
        replaced: Sequence[int | None] | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        relative_bias: bool = True,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        activation: Activation = gelu_tanh,
        norm_eps: float = 1e-5,
        conv: Mapping[str, Any] | None = None,
        head_features: int | None = 512,
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
        count, conv = len(depths), dict(conv or {})
        staged.per_stage(count, features=features)
        if any(width % head_dim for width in features):
            raise ValueError(f"head_dim must divide the channels {tuple(features)}, got {head_dim}")
        size = None if image_size is None else staged.pair(image_size)
        if window is None and size is None:
            raise ValueError("window follows from image_size: one of them must be given")
        window = (size[0] // 32, size[1] // 32) if window is None else window
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        own = attention_of(window, grid_window, block_attention, out_bias=out_bias, relative_bias=relative_bias)
        strides = [4 << stage for stage in range(count)]
        places = staged.places(
            features,
            [None if size is None else (-(-size[0] // stride), -(-size[1] // stride)) for stride in strides],
            num_heads=[width // head_dim for width in features],
            depths=[len(own) * depth for depth in depths],
            own=[_in_turn(own)] * count,
            mixers=mixers,
            replaced=replaced,
        )
        shared = {"qkv_bias": qkv_bias, "attention_dropout": attention_dropout, "projection_dropout": dropout}
        options = {"mlp_ratio": mlp_ratio, "norm_eps": norm_eps, "dropout": dropout, "layer_scale": layer_scale}
        options |= {"mlp": {"activation": activation}, "shared": shared, **common}
        stem_features = staged.pair(stem_features)
        stages, width, last, block = [], stem_features[1], max(sum(depths) - 1, 1), 0
        for stage, here in enumerate(places):
            rates = [drop_path * (block + index // len(own)) / last for index in range(len(here))]
            here = [dataclasses.replace(place, drop_path=rate) for place, rate in zip(here, rates, strict=True)]
            down = Entry(width, features[stage], drop_path=rates[0], conv=conv, **common)
            blocks = blocks_of(here, conv=conv, per_block=len(own), entered=True, **options)
            stages.append(Stage(blocks, down=down))
            width, block = features[stage], block + depths[stage]
        act, eps = conv.get("activation", gelu_tanh), conv.get("norm_eps", 1e-3)
        pads = {"padding": "SAME"} if conv.get("same", True) else {}
        first = {"stride": 2, "norm": functools.partial(BatchNorm, eps=eps), "activation": act, **pads}
        stem = Chain(
            ConvNorm(channels, stem_features[0], 3, use_bias=stem_bias, **first, **common),
            ConvNorm(*stem_features, 3, norm=None, use_bias=stem_bias, **common),
        )
        head = staged.classifier(width, num_classes, **common)
        if head_features and num_classes:
            head = MLP(width, head_features, out_features=num_classes, activation=tanh, **common)
        super().__init__(
            stem,
            stages,
            norm=LayerNorm(width, eps=norm_eps, **stored),
            norm_first=not head_features,
            head=head,
            image_size=size,
            channels=channels,
            dtype=dtype,
        )


RW_CONV = {
    "of_output": False,
    "use_bias": False,
    "squeeze": 1 / 16,
    "activation": silu,
    "norm_eps": 1e-5,
    "same": False,
}
"""Options of the bottlenecks of `MaxViTRW`."""


class MaxViTRW(MaxViT):
    """timm's own MaxViT; the defaults are its tiny one.

    Args:
      stem_features: channels that the convolutions of the stem make.
      stem_bias: whether these have a bias.
      activation: of feed-forwards.
      norm_eps: of the norms of tokens and of the last one.
      conv: options of the bottlenecks, beside `RW_CONV`.
      head_features: hidden channels of the classifier; none when None.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `MaxViT`.
    """

    def __init__(
        self,
        *,
        stem_features: int | Sequence[int] = (32, 64),
        stem_bias: bool = False,
        activation: Activation = gelu,
        norm_eps: float = 1e-6,
        conv: Mapping[str, Any] | None = None,
        head_features: int | None = None,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        options = {"stem_bias": stem_bias, "activation": activation, "norm_eps": norm_eps} | family
        conv = RW_CONV | dict(conv or {})
        super().__init__(stem_features=stem_features, conv=conv, head_features=head_features, rngs=rngs, **options)


_SMALL = {"features": (96, 192, 384, 768), "head_features": 768}
_DEEP = {"depths": (2, 6, 14, 2)}
_LARGE = _DEEP | {"features": (128, 256, 512, 1024), "stem_features": 128, "head_features": 1024}
_XLARGE = _DEEP | {"features": (192, 384, 768, 1536), "stem_features": 192, "head_features": 1536}
MAXVITS: Models = {
    "maxvit_tiny_tf_224": (MaxViT, {}),
    "maxvit_small_tf_224": (MaxViT, _SMALL),
    "maxvit_base_tf_224": (MaxViT, _SMALL | _DEEP),
    "maxvit_large_tf_224": (MaxViT, _LARGE),
    "maxvit_xlarge_tf_384": (MaxViT, _XLARGE | {"image_size": 384}),
    "maxvit_nano_rw_256": (MaxViTRW, {"depths": (1, 2, 3, 1), "image_size": 256}),
    "maxvit_tiny_rw_224": (MaxViTRW, {}),
}
"""For `staged.build_named`: 30.9, 68.9, 119.5, 211.8, 475.3 M parameters, and timm's 15.4 and 29.1 M."""
