"""MobileNet-V1 and V2 (arXiv:1704.04861, 1801.04381), the hosts of ULSAM (Saini et al., WACV 2020, arXiv:2006.15102).

    x = c(b(x))                                     V1:  b a convolution 3x3 per channel, c one of 1x1
    x = x + c(b(a(x)))                              V2:  a widens by 1x1, b per channel, c narrows and has no activation

Every convolution has a batch norm, and but for V2's c a ReLU6; the sum is where the shape stays. Subspace attention,
`ulsam`, stands after chosen layers or in the place of some that keep their shape. Layers are counted from the first
convolution, which is 1: V1's blocks are 2 to 14, V2's are 2 to 18.
References: torchvision for V2, timm for V1.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Layout, Site
from attnlab.mixers.ulsam import PAPER, SubspaceAttention
from attnlab.models import staged
from attnlab.models.block import Block
from attnlab.models.staged import Builder, Choice, Models, Stage, StagedBackbone
from attnlab.nn.activations import relu6
from attnlab.nn.chain import call
from attnlab.nn.conv import ConvNorm, divisible, redraw_convolutions
from attnlab.nn.norms import BatchNorm, LayerNorm
from attnlab.points import Edits, Layer, visit
from attnlab.registry import Cost, Kind, Source, register


class SeparableBlock(Layer):
    """Maps `(B, H, W, in_features)` to `(B, ⌈H/stride⌉, ⌈W/stride⌉, features)`: spatially, then across channels.

    Args:
      in_features: channels in.
      features: channels out.
      stride: of the convolution 3x3.
      dtype: of the computation; that of the map when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    points = frozenset({"stream"})  # type: ignore[assignment]  # of all alike

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        stride: int = 1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        conv: dict[str, Any] = {"norm": BatchNorm, "activation": relu6, "use_bias": False}
        conv |= {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.spatial = ConvNorm(in_features, in_features, 3, stride=stride, groups=in_features, **conv)
        self.across = ConvNorm(in_features, features, 1, **conv)

    def __call__(self, x: jax.Array, *, edits: Edits | None = None, deterministic: bool = True) -> jax.Array:
        x = visit(self, edits, "stream", x)
        return call(self.across, call(self.spatial, x, deterministic), deterministic)


class InvertedResidual(Layer):
    """Maps `(B, H, W, in_features)` to `(B, ⌈H/stride⌉, ⌈W/stride⌉, features)`; a residual where the shape stays.

    Args:
      in_features: channels in.
      features: channels out.
      stride: of the convolution 3x3.
      expansion: channels of that over `in_features`; 1 for no map in front of it.
      dtype: of the computation; that of the map when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    points = frozenset({"stream"})  # type: ignore[assignment]  # of all alike

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        stride: int = 1,
        expansion: int = 6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        conv: dict[str, Any] = {"norm": BatchNorm, "use_bias": False}
        conv |= {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        hidden, self.residual = expansion * in_features, stride == 1 and in_features == features
        self.expand = nnx.data(None)
        if expansion != 1:
            self.expand = ConvNorm(in_features, hidden, 1, activation=relu6, axes=("embed", "mlp"), **conv)
        spatial: dict[str, Any] = {"stride": stride, "groups": hidden, "axes": (None, "mlp"), "activation": relu6}
        self.spatial = ConvNorm(hidden, hidden, 3, **spatial, **conv)
        self.reduce = ConvNorm(hidden, features, 1, axes=("mlp", "embed"), **conv)

    def __call__(self, x: jax.Array, *, edits: Edits | None = None, deterministic: bool = True) -> jax.Array:
        x = visit(self, edits, "stream", x)
        y = x if self.expand is None else call(self.expand, x, deterministic)
        y = call(self.reduce, call(self.spatial, y, deterministic), deterministic)
        return x + y if self.residual else y


class Row(NamedTuple):
    """A block of a MobileNet: its channels out, its stride, and V2's expansion, 0 for a block of V1."""

    features: int
    stride: int
    expansion: int = 0

    def build(self, in_features: int, **common: Any) -> Layer:
        """The block."""
        if not self.expansion:
            return SeparableBlock(in_features, self.features, stride=self.stride, **common)
        return InvertedResidual(in_features, self.features, stride=self.stride, expansion=self.expansion, **common)


def attending(mixer: nnx.Module, features: int, **stored: Any) -> Block:
    """A block of a mixer alone; one that does not keep its input, as `ulsam` does, is given a norm and a residual."""
    if isinstance(mixer, SubspaceAttention):
        return Block(None, None, None, None, after=mixer)
    return Block(mixer, None, LayerNorm(features, **stored), None)


class MobileNet(StagedBackbone):
    """Images `(B, H, W, channels)` of any size to logits `(B, num_classes)` in float32.

    Args:
      stem_features: channels of the first convolution, 3x3 of stride 2.
      rows: the blocks; one of stride 2 opens a stage.
      last_features: channels of a convolution 1x1 behind the blocks; 0 for none.
      after: layers that subspace attention follows.
      instead: layers in whose place it stands.
      groups: its subspaces.
      mixer: name of a registered mixer, or a builder of one, that takes its place.
      num_heads: heads of such a mixer.
      image_size: pixels on a side, or (rows, columns), for mixers that are built for a grid; None for any.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if such a mixer has any.

    Raises:
      ValueError: for layers that are not there, or do not keep their shape and so cannot be left out, or groups that do
        not divide the channels.
    """

    def __init__(
        self,
        stem_features: int,
        rows: Sequence[Row],
        *,
        last_features: int = 0,
        after: Sequence[int] = (),
        instead: Sequence[int] = (),
        groups: int = 4,
        mixer: str | Builder | None = None,
        num_heads: int = 1,
        image_size: int | Sequence[int] | None = None,
        channels: int = 3,
        num_classes: int | None = 1000,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        widths = [stem_features, *(row.features for row in rows)]
        keeping = [
            layer for layer, (row, before) in enumerate(zip(rows, widths, strict=False), 2) if row[:2] == (before, 1)
        ]
        if set(after) - set(range(2, len(rows) + 2)):
            raise ValueError(f"after must name layers from 2 to {len(rows) + 1}, got {tuple(after)}")
        if set(instead) - set(keeping):
            raise ValueError(f"instead must name layers that keep their shape, some of {keeping}, got {tuple(instead)}")
        stored: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        size = None if image_size is None else staged.pair(image_size)
        build: Builder = Choice(SubspaceAttention, {"groups": groups})
        if mixer is not None:
            build = Choice(mixer) if isinstance(mixer, str) else mixer
        count, made = len(after) + len(instead), 0
        stages: list[list[Any]] = [[]]
        stride = 2
        for layer, (row, before) in enumerate(zip(rows, widths, strict=False), 2):
            if row.stride != 1:
                stages.append([])
                stride *= row.stride
            if layer not in instead:
                stages[-1].append(row.build(before, **common))
            for _ in range((layer in instead) + (layer in after)):
                grid = None if size is None else (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
                site = Site(row.features, num_heads, Layout.IMAGE, False, grid, 0, made, count)
                stages[-1].append(attending(build(site, made, **common), row.features, **stored))
                made += 1
        conv: dict[str, Any] = {"norm": BatchNorm, "activation": relu6, "use_bias": False}
        last = None
        if last_features:
            last = ConvNorm(widths[-1], last_features, (1,), **conv, **common)
        super().__init__(
            ConvNorm(channels, stem_features, 3, stride=2, **conv, **common),
            [Stage(blocks) for blocks in stages if blocks],
            norm=last,
            head=staged.classifier(last_features or widths[-1], num_classes, **common),
            image_size=size,
            channels=channels,
            dtype=dtype,
        )
        redraw_convolutions(self, rngs=rngs)


@register(
    "ulsam.mobilenet_v1",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.THIRD_PARTY,
    repository="huggingface/pytorch-image-models",
    cost=Cost(time="O(N·C²)", memory="O(N·C)"),
    summary="MobileNet-V1 with subspace attention after layers, or in their place",
    small={"features": ((8, 1), (16, 2), (16, 1)), "stem_features": 8, "instead": (4,), "num_classes": 5},
)
class MobileNetV1(MobileNet):
    """Images `(B, H, W, channels)` of any size to logits `(B, num_classes)` in float32; the defaults have no attention.

    Args:
      features: channels out and stride of each block.
      stem_features: channels of the first convolution, 3x3 of stride 2.
      width: factor of all channels.
      after: layers that subspace attention follows.
      instead: layers in whose place it stands.
      groups: its subspaces.
      mixer: name of a registered mixer, or a builder of one, that takes its place.
      num_heads: heads of such a mixer.
      image_size: pixels on a side, or (rows, columns), for mixers that are built for a grid; None for any.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if such a mixer has any.

    Raises:
      ValueError: as `MobileNet`.
    """

    def __init__(
        self,
        features: Sequence[tuple[int, int]] = (
            *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
            *[(512, 1)] * 5,
            *((1024, 2), (1024, 1)),
        ),
        *,
        stem_features: int = 32,
        width: float = 1.0,
        after: Sequence[int] = (),
        instead: Sequence[int] = (),
        groups: int = 4,
        mixer: str | Builder | None = None,
        num_heads: int = 1,
        image_size: int | Sequence[int] | None = None,
        channels: int = 3,
        num_classes: int | None = 1000,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        rows = [Row(divisible(wide * width), stride) for wide, stride in features]
        super().__init__(
            divisible(stem_features * width),
            rows,
            after=after,
            instead=instead,
            groups=groups,
            mixer=mixer,
            num_heads=num_heads,
            image_size=image_size,
            channels=channels,
            num_classes=num_classes,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )


@register(
    "ulsam.mobilenet_v2",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.THIRD_PARTY,
    repository="pytorch/vision",
    cost=Cost(time="O(N·C²)", memory="O(N·C)"),
    summary="MobileNet-V2 with subspace attention after layers, or in their place",
    small={"settings": ((1, 8, 1, 1), (2, 8, 3, 2)), "stem_features": 8, "last_features": 16, "instead": (4,)}
    | {"after": (3,), "num_classes": 5},
)
class MobileNetV2(MobileNet):
    """Images `(B, H, W, channels)` of any size to logits `(B, num_classes)` in float32; the defaults have no attention.

    Args:
      settings: expansion, channels out, number and first stride of blocks alike.
      stem_features: channels of the first convolution, 3x3 of stride 2.
      last_features: channels of the last convolution, 1x1, which a `width` below 1 leaves as it is.
      width: factor of all channels.
      after: layers that subspace attention follows.
      instead: layers in whose place it stands.
      groups: its subspaces.
      mixer: name of a registered mixer, or a builder of one, that takes its place.
      num_heads: heads of such a mixer.
      image_size: pixels on a side, or (rows, columns), for mixers that are built for a grid; None for any.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if such a mixer has any.

    Raises:
      ValueError: as `MobileNet`.
    """

    def __init__(
        self,
        settings: Sequence[tuple[int, int, int, int]] = (
            *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
            *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
        ),
        *,
        stem_features: int = 32,
        last_features: int = 1280,
        width: float = 1.0,
        after: Sequence[int] = (),
        instead: Sequence[int] = (),
        groups: int = 4,
        mixer: str | Builder | None = None,
        num_heads: int = 1,
        image_size: int | Sequence[int] | None = None,
        channels: int = 3,
        num_classes: int | None = 1000,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        rows = [
            Row(divisible(wide * width), stride if index == 0 else 1, expansion)
            for expansion, wide, number, stride in settings
            for index in range(number)
        ]
        super().__init__(
            divisible(stem_features * width),
            rows,
            last_features=divisible(last_features * max(1.0, width)),
            after=after,
            instead=instead,
            groups=groups,
            mixer=mixer,
            num_heads=num_heads,
            image_size=image_size,
            channels=channels,
            num_classes=num_classes,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )


def _places(name: str, cls: type, options: dict[str, Any], **layers: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """A host, and it with attention at each of some choices of layers."""
    models: dict[str, Any] = {name: (cls, options)}
    for how, choices in layers.items():
        word = {"after": "after", "instead": "for"}[how]
        for chosen in choices:
            models[f"ulsam_{name}_{word}_{'_'.join(map(str, chosen))}"] = (cls, {**options, how: chosen})
    return models


MOBILENETS: Models = {
    **_places("mobilenet_v1_100", MobileNetV1, {}, after=[(11,), (12,), (13,)], instead=[(12,)]),
    **_places("mobilenet_v1_075", MobileNetV1, {"width": 0.75}, instead=[(12,)]),
    **_places("mobilenet_v1_050", MobileNetV1, {"width": 0.5}, instead=[(12,)]),
    **_places(
        "mobilenet_v2",
        MobileNetV2,
        {},
        after=[(17,)],
        instead=[(14,), (17,), (11, 14), (16, 17), (14, 17), (13, 14, 16, 17)],
    ),
}
"""For `staged.build_named`: the hosts, and variants of the tables in the paper's slides with g = 4, attention `after`
layers or in their place, `for` them. The tables' parameters and multiply-adds say of which shape a layer is; which of
several alike is our reading: the last ones, and 11 and 12 where two of them stand apart. In place of layers 14 and 17
V2 has 13 % fewer of either, and 71.5 % on ImageNet-1K against 71.3."""
