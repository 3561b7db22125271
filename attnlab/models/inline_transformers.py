"""The models of InLine attention (Han et al., NeurIPS 2024, arXiv:2412.06590): PVT, Swin, CSwin and DeiT.

Stages are named by letters, as in the authors' configurations: `I` InLine attention, `S` the softmax attention of the
original model, `M` InLine in the first k blocks only, k behind the letters (`IIMS2`). PVT and DeiT have more heads, and
DeiT fewer channels, than the models they come from. Names, sizes and training rates are those of LeapLabTHU/InLine.
"""

import functools
from collections.abc import Sequence
from typing import Any

from flax import nnx

from attnlab.attention.dense.spatial_reduction_attention import SpatialReductionAttention
from attnlab.attention.linear.inline_attention import PAPER, InlineAttention, InlineCore
from attnlab.attention.local.cross_shaped_windows import CrossShapedWindowAttention, softmax_core
from attnlab.attention.local.window_attention import WindowAttention
from attnlab.models.backbone import Choice, build_named, choices_from_letters
from attnlab.models.cswin import CSwinTransformer
from attnlab.models.deit import DeiT
from attnlab.models.pvt import PyramidVisionTransformer
from attnlab.models.swin import SwinTransformer, swin_grids, swin_window
from attnlab.registry import Cost, Kind, Source, register

_ENTRY = {
    "paper": PAPER,
    "source": Source.AUTHORS_CODE,
    "repository": "LeapLabTHU/InLine",
    "cost": Cost(time="O(N·C·D)", memory="O(C·D)"),
    "kind": Kind.BACKBONE,
}
_SMALL = {"num_heads": (1, 2, 2, 2), "depths": (1, 1, 1, 1), "num_classes": 5, "image_size": 32}


@register(
    "inline_attention.pvt",
    summary="PVT with InLine attention",
    small={**_SMALL, "features": (8, 8, 16, 16)},
    **_ENTRY,
)
class InlinePVT(PyramidVisionTransformer):
    """InLine-PVT; the defaults are InLine-PVT-T.

    Args:
      features: channels per stage.
      num_heads: heads per stage.
      depths: blocks per stage.
      attention: a letter per stage, `I`, `S` or `M`.
      softmax_reductions: stride of the convolution before keys and values of `S` blocks, per stage.
      qkv_bias: whether queries, keys and values have a bias.
      scale: of the scores of `S` blocks, D^-1/2 when None.
      attention_dropout: rate on the softmax weights of `S` blocks.
      dropout: rate after the positions, in feed-forwards and on what mixers return.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `PyramidVisionTransformer`.
    """

    def __init__(
        self,
        features: Sequence[int] = (64, 128, 320, 512),
        *,
        num_heads: Sequence[int] = (2, 4, 10, 16),
        depths: Sequence[int] = (2, 2, 2, 2),
        attention: str = "IIII",
        softmax_reductions: Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        common = {"qkv_bias": qkv_bias, "projection_dropout": dropout}

        def inline(stage: int, block: int) -> Choice:
            return Choice(InlineAttention, common)

        def softmax(stage: int, block: int) -> Choice:
            options = {"reduction": softmax_reductions[stage], "scale": scale, "attention_dropout": attention_dropout}
            return Choice(SpatialReductionAttention, options | common)

        choices = choices_from_letters(attention, depths, "IS", {"I": inline, "S": softmax})
        super().__init__(features, choices=choices, num_heads=num_heads, dropout=dropout, rngs=rngs, **family)


@register(
    "inline_attention.swin",
    summary="Swin with InLine attention in large windows",
    small={**_SMALL, "features": 8, "window": 8},
    **_ENTRY,
)
class InlineSwin(SwinTransformer):
    """InLine-Swin; the defaults are InLine-Swin-T.

    `I` blocks use `window`, clipped to the stage's grid (56 at 224 pixels: one window); `S` blocks use windows of
    max(7, window // 8). Windows of odd blocks are shifted by half a window.

    Args:
      features: channels of the first stage.
      num_heads: heads per stage.
      depths: blocks per stage.
      attention: a letter per stage, `I`, `S` or `M`.
      window: tokens on a side of the windows of `I` blocks.
      image_size: pixels on a side, or (rows, columns).
      patch_size: pixels on a side of a patch.
      feature_map: of queries and keys of `I` blocks.
      qkv_bias: whether queries, keys and values have a bias.
      scale: of the scores of `S` blocks, D^-1/2 when None.
      attention_dropout: rate on the softmax weights of `S` blocks.
      dropout: rate after the patches, in feed-forwards and on what mixers return.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `SwinTransformer`.
    """

    def __init__(
        self,
        features: int = 96,
        *,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        depths: Sequence[int] = (2, 2, 6, 2),
        attention: str = "IIIS",
        window: int = 56,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        feature_map: str = "identity",
        qkv_bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        common = {"qkv_bias": qkv_bias, "projection_dropout": dropout}
        grids = swin_grids(image_size, patch_size, len(depths))

        def inline(stage: int, block: int) -> Choice:
            size, shift = swin_window(grids[stage], window, block)
            return Choice(InlineAttention, {"window": size, "shift": shift, "feature_map": feature_map} | common)

        def softmax(stage: int, block: int) -> Choice:
            size, shift = swin_window(grids[stage], max(7, window // 8), block)
            options = {"window": size, "shift": shift, "scale": scale, "attention_dropout": attention_dropout}
            return Choice(WindowAttention, options | common)

        super().__init__(
            features,
            choices=choices_from_letters(attention, depths, "IS", {"I": inline, "S": softmax}),
            num_heads=num_heads,
            image_size=image_size,
            patch_size=patch_size,
            dropout=dropout,
            rngs=rngs,
            **family,
        )


@register(
    "inline_attention.cswin",
    summary="CSwin with global InLine attention",
    small={**_SMALL, "features": 8, "num_heads": (2, 2, 4, 4)},
    **_ENTRY,
)
class InlineCSwin(CSwinTransformer):
    """InLine-CSwin; the defaults are InLine-CSwin-T. The window of `I` blocks is the image.

    Args:
      features: channels of the first stage.
      num_heads: heads per stage.
      depths: blocks per stage.
      attention: a letter per stage, `I`, `S` or `M`.
      softmax_splits: width of the stripes of `S` blocks per stage. The last stage always has one window.
      qkv_bias: whether queries, keys and values have a bias.
      scale: of the scores of `S` blocks, D^-1/2 when None.
      attention_dropout: rate on the softmax weights of `S` blocks.
      dropout: rate in feed-forwards.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `CSwinTransformer`.
    """

    def __init__(
        self,
        features: int = 64,
        *,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        depths: Sequence[int] = (2, 4, 18, 1),
        attention: str = "IISS",
        softmax_splits: Sequence[int] = (1, 2, 7, 7),
        qkv_bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        last = len(depths) - 1

        def inline(stage: int, block: int) -> Choice:
            return Choice(CrossShapedWindowAttention, {"core": InlineCore, "whole": True, "qkv_bias": qkv_bias})

        def softmax(stage: int, block: int) -> Choice:
            core = functools.partial(softmax_core, scale=scale, dropout=attention_dropout)
            options = {"core": core, "split": softmax_splits[stage], "whole": stage == last, "qkv_bias": qkv_bias}
            return Choice(CrossShapedWindowAttention, options)

        choices = choices_from_letters(attention, depths, "IS", {"I": inline, "S": softmax})
        super().__init__(features, choices=choices, num_heads=num_heads, dropout=dropout, rngs=rngs, **family)


@register(
    "inline_attention.deit",
    summary="DeiT with InLine attention",
    small={"features": 16, "num_heads": 2, "depth": 2, "num_classes": 5, "image_size": 32},
    **_ENTRY,
)
class InlineDeiT(DeiT):
    """InLine-DeiT; the defaults are InLine-DeiT-T.

    Args:
      features: channels.
      num_heads: heads.
      depth: blocks.
      qkv_bias: whether queries, keys and values have a bias.
      dropout: rate after the positions, in feed-forwards and on what mixers return.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `DeiT`.
    """

    def __init__(
        self,
        features: int = 192,
        *,
        num_heads: int = 6,
        depth: int = 12,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        choices = [Choice(InlineAttention, {"qkv_bias": qkv_bias, "projection_dropout": dropout})] * depth
        super().__init__(features, choices=choices, num_heads=num_heads, dropout=dropout, rngs=rngs, **family)


_SMALL = {"depths": (2, 2, 18, 2), "drop_path": 0.3, "attention": "IISS"}
_BASE = {"features": 128, "num_heads": (4, 8, 16, 32), "depths": (2, 2, 18, 2), "drop_path": 0.5, "attention": "IIMS2"}
_CSWIN_BASE = {"features": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)}

INLINE_TRANSFORMERS: dict[str, tuple[type[nnx.Module], dict[str, Any]]] = {
    "inline_pvt_tiny": (InlinePVT, {"depths": (2, 2, 2, 2), "drop_path": 0.1}),
    "inline_pvt_small": (InlinePVT, {"depths": (3, 4, 6, 3), "drop_path": 0.1}),
    "inline_pvt_medium": (InlinePVT, {"depths": (3, 4, 18, 3), "drop_path": 0.3}),
    "inline_pvt_large": (InlinePVT, {"depths": (3, 8, 27, 3), "drop_path": 0.3}),
    "inline_swin_tiny": (InlineSwin, {"drop_path": 0.2}),
    "inline_swin_small": (InlineSwin, _SMALL),
    "inline_swin_base": (InlineSwin, _BASE),
    "inline_swin_base_384": (InlineSwin, _BASE | {"image_size": 384, "window": 96}),
    "inline_cswin_tiny": (InlineCSwin, {"drop_path": 0.2}),
    "inline_cswin_small": (InlineCSwin, {"depths": (3, 6, 29, 2), "drop_path": 0.4}),
    "inline_cswin_base": (InlineCSwin, _CSWIN_BASE | {"drop_path": 0.5}),
    "inline_cswin_base_384": (
        InlineCSwin,
        _CSWIN_BASE | {"drop_path": 0.7, "image_size": 384, "softmax_splits": (1, 2, 12, 12)},
    ),
    "inline_deit_tiny": (InlineDeiT, {"drop_path": 0.1}),
    "inline_deit_small": (InlineDeiT, {"features": 320, "num_heads": 10, "image_size": 288, "drop_path": 0.1}),
    "inline_deit_base": (InlineDeiT, {"features": 384, "num_heads": 12, "image_size": 448, "drop_path": 0.1}),
}
"""The models of the paper by name: class and constructor arguments."""


def inline_transformer(name: str, *, rngs: nnx.Rngs, **overrides: Any) -> nnx.Module:
    """A model of `INLINE_TRANSFORMERS` by name; `overrides` replace its constructor arguments.

    Raises:
      KeyError: with the nearest names, if there is none.
    """
    return build_named(INLINE_TRANSFORMERS, name, rngs=rngs, **overrides)
