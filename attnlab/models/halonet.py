"""HaloNet (Vaswani et al., CVPR 2021, arXiv:2103.12731): a ResNet whose 3x3 convolutions are blocked local attention.

    x = relu(x + BN(W₂ relu(BN(attention(relu(BN(W₁ x)))))))                  a block; with a convolution in its place
    x = relu(BN(W₀ x) + …)                                                    the first block of a stage

whose attention, or convolution, and whose shortcut have the stage's stride. A convolution and a maximum of stride 2
together make the stem; the mean over tokens and a linear classifier end it. Reference: timm's networks of blocks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.local.halonet import PAPER, HaloAttention, HaloDownsampling
from attnlab.contract import Given, Layout, TokenMixer
from attnlab.models import staged
from attnlab.models.block import Block
from attnlab.models.staged import Choice, Mixers, Models, Place, Stage, StagedBackbone
from attnlab.nn.activations import Activation, relu
from attnlab.nn.chain import Chain, call
from attnlab.nn.conv import ConvNorm, MaxPool, divisible
from attnlab.nn.mlp import DropPath
from attnlab.nn.norms import BatchNorm
from attnlab.points import Edits
from attnlab.registry import Cost, Kind, Source, register

STEMS = {"7x7": (7, (1.0,)), "tiered": (3, (0.375, 0.5, 1.0))}
"""Stems by name: the side of their convolutions, and the channels of each over those of the stem."""


def conv_norm(in_features: int, features: int, side: int, **options: Any) -> ConvNorm:
    """A convolution without bias, its batch norm, and maybe an activation."""
    return ConvNorm(in_features, features, side, norm=BatchNorm, use_bias=False, **options)


class Activated(nnx.Module):
    """An activation, behind a norm if there is one."""

    def __init__(self, activation: Activation, norm: nnx.Module | None = None):
        self.activation, self.norm = activation, nnx.data(None) if norm is None else norm

    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`(…, C)` to the same shape."""
        return self.activation(x if self.norm is None else call(self.norm, x, deterministic))


class Bottleneck(TokenMixer):
    """The branch of a block: a map to fewer channels, attention or a convolution there, and a map back.

    Args:
      features: channels C.
      hidden_features: channels inside.
      inner: what stands inside, between tokens of these channels.
      activated: whether a batch norm and an activation follow it.
      out_features: channels out; C when None.
      activation: behind norms, but the last.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE

    def __init__(
        self,
        features: int,
        hidden_features: int,
        inner: nnx.Module,
        *,
        activated: bool = True,
        out_features: int | None = None,
        activation: Activation = relu,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        out = features if out_features is None else out_features
        self.features, self.dtype, self.inner = features, dtype, inner
        self.points = getattr(inner, "points", frozenset())
        self.reduce = conv_norm(features, hidden_features, 1, activation=activation, axes=("embed", None), **common)
        after = Activated(activation, BatchNorm(hidden_features, **stored)) if activated else None
        self.after = nnx.data(None) if after is None else after
        self.expand = conv_norm(hidden_features, out, 1, axes=(None, "embed"), **common)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        return self.through(x, edits=given.edits, deterministic=given.deterministic)

    def through(self, x: jax.Array, *, edits: Edits | None = None, deterministic: bool = True) -> jax.Array:
        """`(B, H, W, C)` to `(B, H', W', out_features)`, of whatever stride the inner module has."""
        x = call(self.reduce, x, deterministic)
        told = {"edits": edits} if isinstance(self.inner, TokenMixer) else {}
        if getattr(self.inner, "layout", Layout.IMAGE) is Layout.SEQUENCE:
            x = call(self.inner, x.reshape(x.shape[0], -1, x.shape[-1]), deterministic, **told).reshape(x.shape)
        else:
            x = call(self.inner, x, deterministic, **told)
        x = x if self.after is None else call(self.after, x, deterministic)
        return call(self.expand, x, deterministic)


class Entry(nnx.Module):
    """The first block of a stage, with a shortcut of its own: `(B, H, W, C)` to `(B, ⌈H/s⌉, ⌈W/s⌉, C')`.

    Args:
      branch: of the block.
      features: channels C.
      out_features: channels C'.
      stride: s.
      activation: of the sum.
      drop_path: probability that the branch is dropped for an example in training.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if `drop_path` is positive.
    """

    def __init__(
        self,
        branch: Bottleneck,
        features: int,
        out_features: int,
        *,
        stride: int = 1,
        activation: Activation = relu,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.branch, self.activation = branch, activation
        self.shortcut = conv_norm(features, out_features, 1, stride=stride, padding="VALID", **common)
        self.drop_path = DropPath(drop_path, rngs=rngs) if drop_path > 0 else nnx.data(None)

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        x = jnp.asarray(x)
        y = self.branch.through(x, deterministic=deterministic)
        y = y if self.drop_path is None else self.drop_path(y, deterministic=deterministic)
        return self.activation(y + call(self.shortcut, x, deterministic))


@register(
    "halonet.backbone",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.THIRD_PARTY,
    repository="huggingface/pytorch-image-models",
    cost=Cost(time="O(N·(b+2h)²·C + N·C²)", memory="O(N·(b+2h)²·H)"),
    summary="a residual network whose blocks have blocked local attention in place of convolutions",
    small={
        "features": (16,),
        "depths": (2,),
        "strides": (2,),
        "kinds": ("attention",),
        "ratio": 0.5,
        "stem_features": 16,
        "num_heads": 2,
        "attention": {"block": 2, "halo": 1},
        "image_size": 32,
        "num_classes": 5,
    },
)
class HaloNet(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are HaloNet-H1.

    Args:
      features: channels C of each stage.
      depths: blocks of each stage.
      strides: of each stage, 1 or 2.
      kinds: what stands inside the blocks of each stage, `attention` or `convolution`, or of each of its blocks.
      ratio: channels inside a block over C, in all stages or in each.
      num_heads: heads.
      attention: options of `HaloAttention`, and `averaged` of `HaloDownsampling`: in all stages, or in each.
      group_size: channels that the convolutions inside blocks see together; all for 0.
      stem: `7x7`, one convolution, or `tiered`, three of side 3.
      stem_features: channels that it makes.
      mixers: what takes the place of the attention, in all stages or in each; not in the first block of a stage that
        has a stride.
      activation: behind norms.
      image_size: pixels on a side, or (rows, columns); None for any that the blocks tile.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for lists of different lengths, another stem or kind, or other strides.
    """

    def __init__(
        self,
        features: Sequence[int] = (64, 128, 256, 512),
        *,
        depths: Sequence[int] = (3, 3, 10, 3),
        strides: Sequence[int] = (1, 2, 2, 2),
        kinds: Sequence[str | Sequence[str]] = ("attention",) * 4,
        ratio: float | Sequence[float] = 1.0,
        num_heads: int = 8,
        attention: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        group_size: int = 0,
        stem: str = "7x7",
        stem_features: int = 64,
        mixers: Mixers = None,
        activation: Activation = relu,
        image_size: int | Sequence[int] | None = 256,
        channels: int = 3,
        num_classes: int | None = 1000,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        count = len(depths)
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        ratios = ratio if isinstance(ratio, Sequence) else [ratio] * count
        options = list(attention) if isinstance(attention, Sequence) else [attention or {}] * count
        inside = [
            (kind,) * depth if isinstance(kind, str) else tuple(kind)
            for kind, depth in zip(kinds, depths, strict=False)
        ]
        staged.per_stage(count, features=features, strides=strides, kinds=inside, ratio=ratios, attention=options)
        if any(len(each) != depth or set(each) - {"attention", "convolution"} for each, depth in zip(inside, depths)):  # noqa: B905
            raise ValueError(f"kinds must be attention or convolution, for each stage or block, got {tuple(kinds)}")
        if stem not in STEMS or set(strides) - {1, 2}:
            raise ValueError(f"stem must be one of {', '.join(STEMS)} and strides 1 or 2, got {stem!r} and {strides}")
        hidden = [divisible(width * share) for width, share in zip(features, ratios, strict=True)]
        heads = [dict(each).pop("num_heads", num_heads) for each in options]
        size, grids = None if image_size is None else staged.pair(image_size), []
        sides = None if size is None else (-(-size[0] // 4), -(-size[1] // 4))
        for stride in strides:
            sides = None if sides is None else (-(-sides[0] // stride), -(-sides[1] // stride))
            grids.append(sides)
        places = staged.places(
            hidden,
            grids,
            num_heads=heads,
            depths=depths,
            own=[Choice(HaloAttention, {n: v for n, v in each.items() if n != "averaged"}) for each in options],
            mixers=mixers,
            drop_path=drop_path,
        )

        def branch(place: Place, kind: str, before: int, stage: int, stride: int) -> Bottleneck:
            width = place.site.features
            if kind == "convolution":
                groups = width // group_size if group_size else 1
                inner = conv_norm(
                    width, width, 3, stride=stride, groups=groups, activation=activation, axes=(None, None), **common
                )
            elif stride > 1:
                given = {"num_heads": place.site.num_heads} | dict(options[stage])
                inner = HaloDownsampling(width, stride=stride, **given, **common)
            else:
                inner = place.mixer(place.site, place.index, **common)
            parts = {"out_features": features[stage], "activation": activation, "activated": kind == "attention"}
            return Bottleneck(before, width, inner, **parts, **common)

        stages, before = [], stem_features
        for stage, (here, stride) in enumerate(zip(places, strides, strict=True)):
            down, blocks, width = None, [], features[stage]
            for index, (place, kind) in enumerate(zip(here, inside[stage], strict=True)):
                if index == 0 and (stride > 1 or before != width):
                    first = branch(place, kind, before, stage, stride)
                    shape = {"stride": stride, "activation": activation, "drop_path": place.drop_path}
                    down = Entry(first, before, width, **shape, **common)
                    continue
                mixer = branch(place, kind, width, stage, 1)
                norm = Activated(activation)
                blocks.append(Block(mixer, None, norm, None, order="post", drop_path=place.drop_path, rngs=rngs))
            stages.append(Stage(blocks, down=down))
            before = width
        side, shares = STEMS[stem]
        convs, last = [], channels
        for index, share in enumerate(shares):
            made = int(stem_features * share)
            convs.append(conv_norm(last, made, side, stride=1 if index else 2, activation=activation, **common))
            last = made
        super().__init__(
            Chain(*convs, MaxPool()),
            stages,
            head=staged.classifier(before, num_classes, **common),
            image_size=size,
            channels=channels,
            dtype=dtype,
        )


_26T = {
    "features": (256, 512, 1024, 2048),
    "depths": (2, 2, 2, 2),
    "kinds": ("convolution", "convolution", ("convolution", "attention"), "attention"),
    "ratio": 0.25,
    "attention": {"block": 8, "halo": 2},
    "stem": "tiered",
}
HALONETS: Models = {"halonet_h1": (HaloNet, {}), "halonet26t": (HaloNet, _26T)}
"""For `staged.build_named`: 8.1 and 12.5 M parameters."""
