"""LeapLabTHU/InLine: attention modules, blocks and models of four families.

model = inline_transformer("inline_swin_tiny", rngs=nnx.Rngs(0))
attnlab.interop.load(model, "inline_swin_t.pth", key="model")
"""

import functools
import math
from typing import Any

import jax
from flax import nnx

from attnlab.attention.linear.inline_attention import InlineCore
from attnlab.interop import backbones as vision
from attnlab.interop.names import Part
from attnlab.interop.official import Call, ConfigError, Given, Inputs, Official, Only, on_grid, options, pair
from attnlab.models.inline_transformers import NormedInlineAttention


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


_NAMES = {"describe": "residual.0", "kernels": "residual.2"}
_CORE = {"core": Part("", Official("InLineAttention", InlineCore, names=_NAMES), {})}
_APART = vision.APART | _CORE
_FUSED = vision.FUSED | _CORE
_CONFIG = vision.HEADS | {"qk_scale": None}
_PVT_CONFIG = _CONFIG | options(sr_ratio=Only(1), H=lambda given: {"grid": (given["H"], given["W"])}, W=None)
_MAPS = {"identity": "identity", "relu": "relu", "leakyrelu": "leaky_relu", "exp": "exp"}
_SWIN_CONFIG = _CONFIG | vision.WINDOWED
_SWIN_CONFIG |= {"kernel_func": lambda given: {"feature_map": _MAPS[given["kernel_func"]]}}
_DEIT_CONFIG = _CONFIG | options(window=None, sr_ratio=Only(1), side=lambda given: {"grid": pair(given["side"])})
_GIVEN = vision.EIGHT | {"side": 1}
_official = functools.partial(Official, "InLineAttention", "inline_attention")
_PVT = _official(_PVT_CONFIG, _APART, on_grid("H", "W"), vision.EIGHT, when="H")
_SWIN = _official(_SWIN_CONFIG, _FUSED, on_grid("window_size"), when="window_size")
_DEIT = _official(_DEIT_CONFIG, _FUSED, _prefixed(), _GIVEN, {"prefix": 1})
_CROSS = vision.cross(dict.fromkeys(("qk_scale", "split_size", "last_stage")), _CORE, NormedInlineAttention)
_LETTERS = {"attn_type": vision.replaced("IIII")}
_PVT_MODEL = _LETTERS | {"la_sr_ratios": _reductions}
_SWIN_MODEL = _LETTERS | vision.windows("inline_window")
# The only split sizes that work there are the stages' sides, and the window is always the image here.
_CSWIN_MODEL = _LETTERS | {"la_split_size": None}
_INLINE = "inline_attention"

OFFICIAL = [
    *vision.SOFTMAX,
    *(_PVT, _SWIN, _DEIT),
    vision.stripe("InLineAttention", {"qk_scale": lambda given: {"core": InlineCore}}, _CORE),
    *vision.blocks("IS", _PVT, _SWIN, _CROSS),
    vision.block("InLineBlock", _prefixed(), {"I": _DEIT}),
    vision.model("pvt", "PyramidVisionTransformer", f"{_INLINE}.pvt", _PVT_MODEL, _PVT, la_sr_ratios="8421"),
    vision.model("swin", "InLineSwin", f"{_INLINE}.swin", _SWIN_MODEL, _SWIN),
    vision.model("cswin", "CSWinTransformer", f"{_INLINE}.cswin", _CSWIN_MODEL, _CROSS),
    vision.model("deit", "VisionTransformer", f"{_INLINE}.deit", {}, _DEIT),
]
