"""CSWin Transformer: microsoft/CSWin-Transformer, for classification and (`dense`) for segmentation.

model = staged.build_named(CSWINS, "cswin_tiny", rngs=nnx.Rngs(0))
attnlab.interop.load(model, "cswin_tiny_224.pth", key="state_dict_ema")
"""

import dataclasses
from typing import Any

import jax

from attnlab.attention.local.cross_shaped_windows import StripeAttention
from attnlab.interop import backbones as vision
from attnlab.interop.names import Part, StateDictError
from attnlab.interop.official import Given, Inputs, Official, on_grid, options, plain
from attnlab.models.cswin import CSwinTransformer
from attnlab.nn.softmax_core import SoftmaxCore


def _on_projected(branch: StripeAttention, inputs: Inputs, given: Given) -> jax.Array:
    return vision.on_stripes(branch, [inputs[name] for name in "qkv"], given)


# The one for segmentation always has biases, pads, and has one window only where it is told so.
_SIZES = options(H=None, W=None, patches_resolution=None, qkv_bias=None)
_DENSE = dataclasses.replace(
    vision.cross(vision.SOFTMAX_CORE | _SIZES, {}), defaults={"qk_scale": None}, always={"padded": True}
)
_OWN, _OPTIONS, _NAMES, _PLACE, _GIVEN = vision.FAMILIES["cswin"]


def _splits(given: Given) -> dict[str, Any]:
    """A number for each stage, of which the last may be left out: that of the stage before is it then."""
    widths, stages = list(given["split_size"]), len(given["depth"])
    return {"splits": widths + widths[-1:] * (stages - len(widths))}


def _net(model: CSwinTransformer) -> dict[Any, Any]:
    cores = {type(branch.core) for block in model.blocks for branch in getattr(block.mixer, "branches", ())}
    if cores != {SoftmaxCore}:
        raise StateDictError(
            f"CSWinTransformer has softmax attention in stripes, here there is {sorted(map(str, cores))}"
        )
    return _NAMES | {"stage.*.blocks.*.mixer": lambda i, j: Part(_PLACE(i, j), _OWN)}


OFFICIAL = [
    dataclasses.replace(vision.stripe("LePEAttention", vision.SOFTMAX_CORE, {}), call=_on_projected, when=None),
    vision.block("CSWinBlock", on_grid("reso"), {"S": vision.CROSS}, ""),
    vision.block("CSWinBlock(dense)", on_grid("H", "W"), {"S": _DENSE}, ""),
    Official(
        "CSWinTransformer",
        CSwinTransformer,
        _OPTIONS | {"split_size": _splits},
        _net,
        plain,
        {"embed_dim": _GIVEN["embed_dim"], "depth": _GIVEN["depth"], "split_size": [3, 5, 7]},
        ignore=vision.TABLES,
    ),
]
