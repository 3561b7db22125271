"""RegNetY (Radosavovic et al., 2020, arXiv:2003.13678): four stages of one bottleneck block, widths by a rule.

    x = relu(shortcut(x) + c(se(b(a(x)))))         a, c convolutions 1x1, b 3x3 in groups, se squeeze-and-excitation

Every convolution has a batch norm, a and b a ReLU; the first block of a stage halves the sides in b and in its
shortcut, a convolution 1x1. Widths grow by a log-linear rule that is rounded to few stages, see `regnet_stages`.
Reference for parameters and names: torchvision. It is the trunk of `attnlab.models.dyn_perceiver`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.attention.cross.dyn_perceiver import SOURCE
from attnlab.models import staged
from attnlab.models.staged import Models, Stage, StagedBackbone
from attnlab.nn.activations import relu
from attnlab.nn.chain import call
from attnlab.nn.conv import ConvNorm, SqueezeExcite, redraw_convolutions
from attnlab.nn.norms import BatchNorm
from attnlab.points import Edits, Layer, visit
from attnlab.registry import Cost, Kind, register


def regnet_stages(
    depth: int, initial: int, slope: float, multiplier: float, group_width: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Widths, depths and group widths of the stages that the rule gives.

    Block j would have the width initial + slope·j; it has the nearest initial·multiplier^s instead, rounded to a
    multiple of 8, and blocks of one width are a stage, whose width is then rounded to whole groups.

    Args:
      depth: blocks.
      initial: width of the first block, a multiple of 8.
      slope: of the widths.
      multiplier: between the widths of stages.
      group_width: channels of a group of the convolutions 3x3, at most the stage's.
    """
    wanted = np.arange(depth) * slope + initial
    powers = np.round(np.log(wanted / initial) / math.log(multiplier))
    widths = (np.round(initial * multiplier**powers / 8) * 8).astype(int).tolist()
    found = sorted(set(widths))
    depths = tuple(widths.count(width) for width in found)
    groups = tuple(min(group_width, width) for width in found)
    return tuple(_whole(width, group) for width, group in zip(found, groups, strict=True)), depths, groups


def _whole(width: int, group: int) -> int:
    """The nearest multiple of a group, but not below nine tenths of the width."""
    rounded = max(group, int(width + group / 2) // group * group)
    return rounded + group if rounded < 0.9 * width else rounded


class RegNetBlock(Layer):
    """Maps `(B, H, W, in_features)` to `(B, H/stride, W/stride, features)`.

    Args:
      in_features: channels in.
      features: channels out.
      stride: of the convolution 3x3 and of the shortcut.
      group_width: channels of a group.
      se_ratio: hidden channels of the squeeze-and-excitation over `in_features`; 0 for none.
      dtype: of the computation; that of the map when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if groups do not divide the channels.
    """

    points = frozenset({"stream"})  # type: ignore[assignment]  # of all alike

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        stride: int = 1,
        group_width: int = 8,
        se_ratio: float = 0.25,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % group_width:
            raise ValueError(f"group_width must divide the {features} channels, got {group_width}")
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        conv = {"norm": BatchNorm, "use_bias": False, **common}
        self.shortcut = nnx.data(None)
        if in_features != features or stride != 1:
            self.shortcut = ConvNorm(in_features, features, 1, stride=stride, **conv)
        self.a = ConvNorm(in_features, features, 1, activation=relu, **conv)
        self.b = ConvNorm(features, features, 3, stride=stride, groups=features // group_width, activation=relu, **conv)
        self.se = nnx.data(None)
        if se_ratio:
            self.se = SqueezeExcite(features, round(se_ratio * in_features), **common)
        self.c = ConvNorm(features, features, 1, **conv)

    def __call__(self, x: jax.Array, *, edits: Edits | None = None, deterministic: bool = True) -> jax.Array:
        x = visit(self, edits, "stream", x)
        y = call(self.b, call(self.a, x, deterministic), deterministic)
        y = call(self.c, y if self.se is None else self.se(y), deterministic)
        return relu((x if self.shortcut is None else call(self.shortcut, x, deterministic)) + y)


@register(
    "dyn_perceiver.regnet",
    kind=Kind.BACKBONE,
    cost=Cost(time="O(H·W·C²)", memory="O(H·W·C)"),
    summary="RegNetY, the convolutional trunk that latents read and are read by",
    small={"widths": (8, 8), "depths": (1, 1), "group_width": 4, "stem_features": 8, "num_classes": 5},
    **SOURCE,
)
class RegNetY(StagedBackbone):
    """Images `(B, H, W, channels)` of any size to logits `(B, num_classes)` in float32; the defaults are RegNetY-400MF.

    Args:
      widths: channels of each stage.
      depths: blocks of each stage.
      group_width: channels of a group of the convolutions 3x3, one for all stages or each.
      se_ratio: hidden channels of squeeze-and-excitation over a block's channels in; 0 for none.
      stem_features: channels of the first convolution, 3x3 of stride 2.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for lists that have not one entry for each stage, or groups that do not divide the channels.
    """

    def __init__(
        self,
        widths: Sequence[int] = (48, 104, 208, 440),
        *,
        depths: Sequence[int] = (1, 3, 6, 6),
        group_width: int | Sequence[int] = 8,
        se_ratio: float = 0.25,
        stem_features: int = 32,
        channels: int = 3,
        num_classes: int | None = 1000,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        groups = [group_width] * len(widths) if isinstance(group_width, int) else list(group_width)
        staged.per_stage(len(widths), depths=depths, group_width=groups)
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.widths = (stem_features, *widths)
        stages = []
        for before, width, depth, group in zip(self.widths, widths, depths, groups, strict=False):
            block = {"group_width": group, "se_ratio": se_ratio, **common}
            first = RegNetBlock(before, width, stride=2, **block)
            stages.append(Stage([first, *(RegNetBlock(width, width, **block) for _ in range(depth - 1))]))
        stem = {"stride": 2, "norm": BatchNorm, "activation": relu, "use_bias": False}
        super().__init__(
            ConvNorm(channels, stem_features, 3, **stem, **common),
            stages,
            head=staged.classifier(widths[-1], num_classes, **common),
            channels=channels,
            dtype=dtype,
        )
        redraw_convolutions(self, rngs=rngs)


def _by_rule(depth: int, initial: int, slope: float, multiplier: float, group_width: int) -> tuple[type, Any]:
    widths, depths, groups = regnet_stages(depth, initial, slope, multiplier, group_width)
    return RegNetY, {"widths": widths, "depths": depths, "group_width": groups}


REGNETS: Models = {
    "regnet_y_400mf": _by_rule(16, 48, 27.89, 2.09, 8),
    "regnet_y_800mf": _by_rule(14, 56, 38.84, 2.4, 16),
    "regnet_y_1_6gf": _by_rule(27, 48, 20.71, 2.65, 24),
    "regnet_y_3_2gf": _by_rule(21, 80, 42.63, 2.66, 24),
    "regnet_y_8gf": _by_rule(17, 192, 76.82, 2.19, 56),
}
"""For `staged.build_named`: 4.3, 6.4, 11.2, 19.4 and 39.4 M parameters."""
