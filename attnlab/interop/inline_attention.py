"""LeapLabTHU/InLine: attention modules, blocks and models of four families.

model = inline_transformer("inline_swin_tiny", rngs=nnx.Rngs(0))
attnlab.interop.load(model, "inline_swin_t.pth", key="model")
"""

import math
from typing import Any

import jax
from flax import nnx

from attnlab.attention.linear.inline_attention import InlineAttention, InlineCore
from attnlab.interop import backbones as vision
from attnlab.interop.backbones import Given, Inputs
from attnlab.interop.names import Part
from attnlab.interop.official import Call, ConfigError, Official, Only, options
from attnlab.models.inline_transformers import InlineCSwin, InlineDeiT, InlinePVT, InlineSwin, NormedInlineAttention

_NAMES = {"describe": "residual.0", "kernels": "residual.2"}
_CORE = {"core": Part("", Official("InLineAttention", InlineCore, names=_NAMES), {})}
_OPTIONS = vision.HEADS | {"qk_scale": None}
_FEATURE_MAPS = {"identity": "identity", "relu": "relu", "leakyrelu": "leaky_relu", "exp": "exp"}


def _prefixed() -> Call:
    """The official class takes what stands behind the class token for a square map, of whatever side."""

    def call(module: nnx.Module, inputs: Inputs, given: Given) -> jax.Array:
        official = next(each for each in OFFICIAL if each.call is call)
        sized = official.build({**given, "side": math.isqrt(inputs["x"].shape[1] - 1)})
        nnx.update(sized, nnx.state(module, nnx.Param))
        return sized(inputs["x"])

    return call


def _reductions(given: Given) -> dict[str, Any]:
    for letter, reduction in zip(given["attn_type"] or "IIII", given["la_sr_ratios"], strict=False):
        if letter == "I" and reduction != "1":
            raise ConfigError("PyramidVisionTransformer: the authors' InLine attention fails with spatial reduction")
    return {}


_PVT = Official(
    "InLineAttention",
    InlineAttention,
    _OPTIONS | options(sr_ratio=Only(1), H=lambda given: {"grid": (given["H"], given["W"])}, W=None),
    vision.APART | _CORE,
    vision.on_grid("H", "W"),
    defaults=vision.EIGHT,
    when=lambda given: "H" in given,
)
_SWIN = Official(
    "InLineAttention",
    InlineAttention,
    _OPTIONS | vision.WINDOWED | {"kernel_func": lambda given: {"feature_map": _FEATURE_MAPS[given["kernel_func"]]}},
    vision.FUSED | _CORE,
    vision.on_grid("window_size"),
    when=lambda given: "window_size" in given,
)
_DEIT = Official(
    "InLineAttention",
    InlineAttention,
    _OPTIONS | options(window=None, sr_ratio=Only(1), side=lambda given: {"grid": vision.pair(given["side"])}),
    vision.FUSED | _CORE,
    _prefixed(),
    defaults=vision.EIGHT | {"side": 1},
    always={"prefix": 1},
    when=lambda given: not {"H", "window_size", "resolution"} & given.keys(),
)
_CROSS = vision.cross(dict.fromkeys(("qk_scale", "split_size", "last_stage")), _CORE, NormedInlineAttention)
_INLINE = {"pvt": _PVT, "swin": _SWIN, "deit": _DEIT, "cswin": _CROSS}

OFFICIAL = [
    *vision.SOFTMAX,
    *(_PVT, _SWIN, _DEIT),
    vision.stripe("InLineAttention", {"qk_scale": lambda given: {"core": InlineCore}}, _CORE),
    *vision.blocks("InLineBlock", "I", "S", _INLINE, _prefixed()),
    vision.pvt(
        InlinePVT, options(attn_type=vision.replaced("IIII"), la_sr_ratios=_reductions), _PVT, la_sr_ratios="8421"
    ),
    vision.swin("InLineSwin", InlineSwin, {"attn_type": vision.replaced("IIII")}, "inline_window", _SWIN),
    # The only split sizes that work there are the stages' sides, and the window is always the image here.
    vision.cswin(InlineCSwin, options(attn_type=vision.replaced("IIII", "depth"), la_split_size=None), _CROSS),
    vision.deit(InlineDeiT, {}, _DEIT),
]
