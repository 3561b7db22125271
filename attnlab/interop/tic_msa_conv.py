"""MSA-Conv of TiC: zs670980918/MSA-Conv, core/op."""

from typing import Any

from attnlab.attention.local.tic_msa_conv import MSAConv, msa_conv
from attnlab.interop.names import Squeezed
from attnlab.interop.official import Given, Inputs, Official, options


def _pair(function: Any, inputs: Inputs, given: Given) -> dict[str, Any]:
    """Both operators of the extension with a softmax between them, on maps of one head."""
    sums = function(*(inputs[name][..., None, :] for name in ("q", "k", "v")))
    return {"dots": sums.scores[..., 0, :], "y": sums.y[..., 0, :]}


OFFICIAL = [
    Official("msa_conv_pair", msa_conv, options("kernel_size", "dilation", im2col_step=None), call=_pair),
    Official(
        "MSA_Conv_2d",
        MSAConv,
        options("kernel_size", "stride", "dilation", "padding", input_channel="in_features", im2col_step=None)
        | options("dropout", output_channel="out_features", bias="use_bias"),
        {("query", "key", "value"): Squeezed("qkv_conv", 2, 3), "out": "mlp"},
        defaults={"padding": 1},
    ),
]
