"""ResNet (He et al., 2016, arXiv:1512.03385): four stages of residual blocks, after a stem of stride 4.

    x = relu(shortcut(x) + b(a(x)))                basic: a, b convolutions 3x3
    x = relu(shortcut(x) + c(b(a(x))))             bottleneck: a, c convolutions 1x1, b 3x3, c to four times as many

Every convolution has a batch norm, all but the last of a block a ReLU. The first block of every stage but the first
halves the sides, in a or in b, and in its shortcut, a convolution 1x1, which stands wherever shapes differ; else the
shortcut is x. The stem is a convolution 7x7 and a maximum of 3x3, each of stride 2. Reference for parameters and names:
torchvision and timm, whose initialisation this is: the last norm of a block starts at 0. It is a trunk of
`attnlab.models.dyn_perceiver`, whose authors have it in narrower sizes too.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention.cross.dyn_perceiver import SOURCE
from attnlab.models import staged
from attnlab.models.staged import Models, Stage, StagedBackbone
from attnlab.nn.activations import relu
from attnlab.nn.chain import Chain, call
from attnlab.nn.conv import ConvNorm, MaxPool, redraw_convolutions
from attnlab.nn.mlp import DropPath
from attnlab.nn.norms import BatchNorm
from attnlab.points import Edits, Layer, visit
from attnlab.registry import Cost, Kind, register

ResNetKind = Literal["basic", "bottleneck"]
EXPANSION = {"basic": 1, "bottleneck": 4}
"""Channels that a block gives over those inside it."""


class ResNetBlock(Layer):
    """Maps `(B, H, W, in_features)` to `(B, ⌈H/stride⌉, ⌈W/stride⌉, EXPANSION[kind] · hidden_features)`.

    Args:
      in_features: channels in.
      hidden_features: channels inside.
      kind: `basic` or `bottleneck`.
      stride: of the first convolution 3x3 and of the shortcut.
      drop_path: probability that the branch is dropped for an example in training.
      dtype: of the computation; that of the map when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if `drop_path` is positive.
    """

    points = frozenset({"stream"})  # type: ignore[assignment]  # of all alike

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        kind: ResNetKind = "bottleneck",
        stride: int = 1,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        conv = {"norm": BatchNorm, "use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        inner, features = hidden_features, hidden_features * EXPANSION[kind]
        self.shortcut = nnx.data(None)
        if in_features != features or stride != 1:
            self.shortcut = ConvNorm(in_features, features, 1, stride=stride, **conv)
        if kind == "basic":
            first = ConvNorm(in_features, inner, 3, stride=stride, activation=relu, **conv)
            self.convs = nnx.List([first, ConvNorm(inner, features, 3, **conv)])
        else:
            first = ConvNorm(in_features, inner, 1, activation=relu, **conv)
            middle = ConvNorm(inner, inner, 3, stride=stride, activation=relu, **conv)
            self.convs = nnx.List([first, middle, ConvNorm(inner, features, 1, **conv)])
        last = self.convs[-1].norm
        last.scale[...] = jnp.zeros_like(last.scale[...])
        self.drop_path = DropPath(drop_path, rngs=rngs) if drop_path > 0 else nnx.data(None)

    def __call__(self, x: jax.Array, *, edits: Edits | None = None, deterministic: bool = True) -> jax.Array:
        x = y = visit(self, edits, "stream", x)
        for conv in self.convs:
            y = call(conv, y, deterministic)
        y = y if self.drop_path is None else self.drop_path(y, deterministic=deterministic)
        return relu((x if self.shortcut is None else call(self.shortcut, x, deterministic)) + y)


@register(
    "dyn_perceiver.resnet",
    kind=Kind.BACKBONE,
    cost=Cost(time="O(H·W·C²)", memory="O(H·W·C)"),
    summary="ResNet, the other convolutional trunk that latents read and are read by",
    small={"kind": "bottleneck", "depths": (1, 1), "hidden_features": (4, 4), "stem_features": 8, "num_classes": 5},
    **SOURCE,
)
class ResNet(StagedBackbone):
    """Images `(B, H, W, channels)` of any size to logits `(B, num_classes)` in float32; the defaults are ResNet-50.

    Args:
      kind: of the blocks, `basic` or `bottleneck`.
      depths: blocks of each stage.
      hidden_features: channels inside the blocks of each stage; what they give is `EXPANSION[kind]` times as many.
      stem_features: channels of the stem.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if `drop_path` is positive.

    Raises:
      ValueError: for another kind, or lists that have not one entry for each stage.
    """

    def __init__(
        self,
        kind: ResNetKind = "bottleneck",
        *,
        depths: Sequence[int] = (3, 4, 6, 3),
        hidden_features: Sequence[int] = (64, 128, 256, 512),
        stem_features: int = 64,
        drop_path: float = 0.0,
        channels: int = 3,
        num_classes: int | None = 1000,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if kind not in EXPANSION:
            raise ValueError(f"kind must be {' or '.join(EXPANSION)}, got {kind!r}")
        staged.per_stage(len(depths), hidden_features=hidden_features)
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.widths = (stem_features, *(inner * EXPANSION[kind] for inner in hidden_features))
        last, made, stages = max(sum(depths) - 1, 1), 0, []
        for stage, (inner, depth) in enumerate(zip(hidden_features, depths, strict=True)):
            blocks = []
            for index in range(depth):
                before, stride = self.widths[stage + bool(index)], 1 if index or not stage else 2
                block = {"kind": kind, "stride": stride, "drop_path": drop_path * made / last, **common}
                blocks.append(ResNetBlock(before, inner, **block))
                made += 1
            stages.append(Stage(blocks))
        stem = {"stride": 2, "norm": BatchNorm, "activation": relu, "use_bias": False}
        super().__init__(
            Chain(ConvNorm(channels, stem_features, 7, **stem, **common), MaxPool()),
            stages,
            head=staged.classifier(self.widths[-1], num_classes, **common),
            channels=channels,
            dtype=dtype,
        )
        redraw_convolutions(self, rngs=rngs)


def resnet_features(share: float) -> dict[str, Any]:
    """Options of a ResNet with that share of the usual channels."""
    inner = tuple(int(share * features) for features in (64, 128, 256, 512))
    return {"hidden_features": inner, "stem_features": inner[0]}


RESNETS: Models = {
    "resnet18": (ResNet, {"kind": "basic", "depths": (2, 2, 2, 2)}),
    "resnet34": (ResNet, {"kind": "basic"}),
    "resnet50": (ResNet, {}),
    "resnet50_0375": (ResNet, resnet_features(0.375)),
    "resnet50_050": (ResNet, resnet_features(0.5)),
    "resnet50_0625": (ResNet, resnet_features(0.625)),
    "resnet50_075": (ResNet, resnet_features(0.75)),
}
"""For `staged.build_named`: 11.7, 21.8, 25.6, 4.1, 6.9, 10.5 and 14.8 M parameters."""
