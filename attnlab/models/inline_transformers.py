"""The models of InLine attention (Han et al., NeurIPS 2024, arXiv:2412.06590): PVT, Swin, CSwin and DeiT.

`replaced` says how many of the first blocks of each stage have InLine attention; the others keep that of the original
model. PVT and DeiT have more heads, and DeiT fewer channels, than the models they come from. Names, sizes and training
rates are those of LeapLabTHU/InLine.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention.linear.inline_attention import PAPER, InlineAttention, InlineCore
from attnlab.attention.local.cross_shaped_windows import CrossShapedWindowAttention
from attnlab.contract import Given, Site
from attnlab.models import staged
from attnlab.models.agent_transformers import CSWIN_SIZES, PVT_SIZES, SWIN_SIZES
from attnlab.models.cswin import CSwinTransformer
from attnlab.models.deit import DeiT
from attnlab.models.pvt import PyramidVisionTransformer
from attnlab.models.staged import Choice, Models
from attnlab.models.swin import SwinTransformer, Windowed
from attnlab.nn.norms import LayerNorm
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
      num_heads: heads per stage.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `PyramidVisionTransformer`.
    """

    def __init__(self, *, num_heads: Sequence[int] = (2, 4, 10, 16), rngs: nnx.Rngs, **family: Any):
        super().__init__(num_heads=num_heads, mixers=Choice(InlineAttention), rngs=rngs, **family)


@register(
    "inline_attention.swin",
    summary="Swin with InLine attention in large windows",
    small={**_SMALL, "features": 8, "inline_window": 8},
    **_ENTRY,
)
class InlineSwin(SwinTransformer):
    """InLine-Swin; the defaults are InLine-Swin-T.

    Args:
      replaced: how many of the first blocks of each stage have InLine attention; all where it is None.
      inline_window: tokens on a side of the windows of InLine attention, clipped to the stage's grid (56 at 224 pixels:
        one window). Windows of odd blocks are shifted by half a window.
      feature_map: of queries and keys of InLine attention.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `SwinTransformer`.
    """

    def __init__(
        self,
        *,
        replaced: Sequence[int | None] = (None, None, None, 0),
        inline_window: int = 56,
        feature_map: str = "identity",
        rngs: nnx.Rngs,
        **family: Any,
    ):
        mixers = Windowed(InlineAttention, {"feature_map": feature_map}, inline_window)
        super().__init__(mixers=mixers, replaced=replaced, rngs=rngs, **family)


class NormedInlineAttention(CrossShapedWindowAttention):
    """InLine attention of CSwin: its kernels are computed from the mean of the tokens in front of the norm.

    The norm of its input is part of it.

    Args:
      features: channels C.
      norm_eps: of the norm.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **options: further arguments of `CrossShapedWindowAttention`.
    """

    norms_its_input = True

    def __init__(
        self, features: int, *, norm_eps: float = 1e-5, param_dtype: Any = jnp.float32, rngs: nnx.Rngs, **options: Any
    ):
        common = {"param_dtype": param_dtype, "rngs": rngs}
        super().__init__(features, whole=True, core=InlineCore, **options, **common)
        self.norm = LayerNorm(features, eps=norm_eps, **common)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        return self.attend(self.norm(x), staged.token_mean(x), given)


@register(
    "inline_attention.cswin",
    summary="CSwin with global InLine attention",
    small={**_SMALL, "features": 8, "num_heads": (2, 2, 4, 4)},
    **_ENTRY,
)
class InlineCSwin(CSwinTransformer):
    """InLine-CSwin; the defaults are InLine-CSwin-T. The window of InLine attention is the image.

    Args:
      depths: blocks per stage.
      replaced: how many of the first blocks of each stage have InLine attention; all where it is None.
      norm_eps: of the norms in blocks and of the last.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `CSwinTransformer`.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 4, 18, 1),
        replaced: Sequence[int | None] = (None, None, 0, 0),
        norm_eps: float = 1e-5,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        def inline(site: Site, index: int, *, qkv_bias: bool, dtype: Any, **shared: Any) -> nnx.Module:
            options = {"num_heads": site.num_heads, "grid": site.grid, "qkv_bias": qkv_bias, "dtype": dtype}
            return NormedInlineAttention(
                site.features, norm_eps=norm_eps, param_dtype=param_dtype, rngs=rngs, **options
            )

        options = {"depths": depths, "replaced": replaced, "norm_eps": norm_eps, "param_dtype": param_dtype}
        super().__init__(mixers=inline, rngs=rngs, **options, **family)


@register(
    "inline_attention.deit",
    summary="DeiT with InLine attention",
    small={"features": 16, "num_heads": 2, "depth": 2, "num_classes": 5, "image_size": 32},
    **_ENTRY,
)
class InlineDeiT(DeiT):
    """InLine-DeiT; the defaults are InLine-DeiT-T.

    Args:
      num_heads: heads.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `DeiT`.
    """

    def __init__(self, *, num_heads: int = 6, rngs: nnx.Rngs, **family: Any):
        super().__init__(num_heads=num_heads, mixers=Choice(InlineAttention), rngs=rngs, **family)


INLINE_TRANSFORMERS: Models = {
    **{f"inline_{name}": (InlinePVT, sizes) for name, sizes in PVT_SIZES.items()},
    **{f"inline_{name}": (InlineSwin, sizes) for name, sizes in SWIN_SIZES.items()},
    "inline_swin_base_384": (InlineSwin, SWIN_SIZES["swin_base_384"] | {"inline_window": 96}),
    **{f"inline_{name}": (InlineCSwin, sizes) for name, sizes in CSWIN_SIZES.items()},
    "inline_deit_tiny": (InlineDeiT, {"drop_path": 0.1}),
    "inline_deit_small": (InlineDeiT, {"features": 320, "num_heads": 10, "image_size": 288, "drop_path": 0.1}),
    "inline_deit_base": (InlineDeiT, {"features": 384, "num_heads": 12, "image_size": 448, "drop_path": 0.1}),
}
"""The models of the paper by name: class and constructor arguments."""


def inline_transformer(name: str, *, rngs: nnx.Rngs, **overrides: Any) -> staged.StagedBackbone:
    """A model of `INLINE_TRANSFORMERS` by name; `overrides` replace its constructor arguments.

    Raises:
      KeyError: with the nearest names, if there is none.
    """
    return staged.build_named(INLINE_TRANSFORMERS, name, rngs=rngs, **overrides)
