"""TANet: xhuachris/TANet-ACCV-2024, model/TANet.py."""

from typing import Any

from attnlab.interop.names import Part, Squeezed
from attnlab.interop.official import Official, options, same_as
from attnlab.mixers.tanet import HalfInstanceNormBlock, LocalPixelMap, StripGate, TripletAttention
from attnlab.models.tanet import TANet

_STRIPS: dict[Any, Any] = {
    "rows": "conv_1_h",
    "columns": "conv_1_w",
    "fuse": Squeezed("fuse_conv", 2, 3),
    "out": Squeezed("conv_final", 2, 3),
}
_DISTRIBUTION: dict[Any, Any] = {"conv1": "conv_1", "conv2": "conv_2"}
_UNUSED = ("mask_conv_1.*", "mask_conv_2.*", "GDA_Block.identity.*", "decoder.conv_1.*")
_TRIPLET: dict[Any, Any] = {
    "enter": "conv_1",
    "mix_in": Squeezed("conv_4", 2, 3),
    "to_strips": "conv_4_1",
    "to_pixels": "conv_4_2",
    "to_rest": Squeezed("conv_4_3", 2, 3),
    "strips": Part("GSA_Block", _STRIPS),
    "pixels": "LPA_Block",
    "mix_out": Squeezed("conv_2", 2, 3),
    "leave": "conv_3",
    "distribution": Part("GDA_Block", _DISTRIBUTION),
    "shortcut": Squeezed("identity", 2, 3),
}
_NET: dict[Any, Any] = {
    "enter": "conv_1",
    "leave": "conv_2",
    "encoders.*.parts.*": lambda stage, index: f"encoder.RES_Block_e{stage + 1}{index + 1}",
    "downs.*": lambda stage: f"encoder.down_{stage + 1}",
    "attention.*.mixer": lambda index: Part(f"attention.Att_Block_{index + 1}", _TRIPLET),
    "decoders.*.up": lambda stage: f"decoder.up_{stage + 1}.up",
    "decoders.*.merge": lambda stage: Squeezed(f"decoder.up_{stage + 1}.conv_1", 2, 3),
    "decoders.*.blocks.parts.*": lambda stage, index: f"decoder.up_{stage + 1}.conv_block{index + 1}",
}

OFFICIAL = [
    Official("LPA_Block", LocalPixelMap),
    Official(
        "GSA_Block",
        StripGate,
        options(inplanes="features", outplanes=same_as("outplanes", "inplanes")),
        _STRIPS,
        ignore=_UNUSED,
    ),
    Official(
        "GDA_Block",
        HalfInstanceNormBlock,
        options(in_size="features", out_size=same_as("out_size", "in_size")),
        _DISTRIBUTION,
        ignore=("identity.*",),
    ),
    Official(
        "Attention_Block",
        TripletAttention,
        options(in_size="features", out_size=same_as("out_size", "in_size")),
        _TRIPLET,
        ignore=_UNUSED,
    ),
    Official(
        "TANet",
        TANet,
        options(in_size="channels", out_size=same_as("out_size", "in_size")),
        _NET,
        ignore=_UNUSED,
    ),
]
