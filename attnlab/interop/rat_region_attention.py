"""RAT: Yaziwel/Region-Attention-Transformer-for-Medical-Image-Restoration, Model_RAT.py and losses.py."""

from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention.sparse.rat_region_attention import RegionAttention
from attnlab.interop.names import Mapped, Part, Squeezed
from attnlab.interop.official import Given, Inputs, Official, Only, options
from attnlab.models.rat import RAT, NAFBlock, RegionLayer
from attnlab.objectives.focal_region import focal_region_loss


def _per_channel(name: str) -> Any:
    """A factor of channels that is (1, C, 1, 1) there."""
    return Mapped(name, jnp.ravel, lambda a: a.reshape(1, -1, 1, 1))


_REGIONS: dict[Any, Any] = {
    ("query", "key", "value"): Squeezed("qkv", 2, 3),
    "out": Squeezed("project_out", 2, 3),
}
_LAYER: dict[Any, Any] = {
    "norm1": "norm_ra",
    "norm2": "norm_ra_mlp",
    "norm3": "norm_wa",
    "norm4": "norm_wa_mlp",
    "regions": Part("ra", _REGIONS),
    "windows": Part("wa", {("query", "key", "value"): "qkv", "out": "proj_out"}),
    "scale1": _per_channel("lambda_ra"),
    "scale2": _per_channel("lambda_wa"),
}
for _ours, _theirs in (("mlp1", "mlp_ra"), ("mlp2", "mlp_wa")):
    _LAYER |= {f"{_ours}.{fc}": Squeezed(f"{_theirs}.{fc}", 2, 3) for fc in ("fc1", "fc2")}
_NAF: dict[Any, Any] = {f"conv{i}": Squeezed(f"conv{i}", 2, 3) for i in (1, 3, 4, 5)} | {
    "attention": Squeezed("sca.1", 2, 3),
    "beta": _per_channel("beta"),
    "gamma": _per_channel("gamma"),
}
_NET: dict[Any, Any] = {
    "enter": "intro",
    "leave": "ending",
    "encoders.*.parts.*": Part("encoders.*.*", _NAF),
    "decoders.*.parts.*": Part("decoders.*.*", _NAF),
    "middle.*.layers.*": Part("middle_blks.*.layers.*", _LAYER),
    "middle.*.conv": "middle_blks.*.conv",
    "ups.*": Squeezed("ups.*.0", 2, 3),
}


def _with_regions(module: Any, inputs: Inputs, given: Given) -> Any:
    """Labels are numbers with a fraction there."""
    return module(inputs["x"], inputs["regions"].astype(jnp.int32))


def _loss(function: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    return {"loss": function(inputs["pred"], inputs["target"], inputs["regions"].astype(jnp.int32)).mean()}


OFFICIAL = [
    Official(
        "RegionAttention",
        RegionAttention,
        options("num_heads", n_feat="features", bias="use_bias"),
        _REGIONS,
        call=_with_regions,
    ),
    Official(
        "BasicLayer",
        RegionLayer,
        options("num_heads", "mlp_ratio", n_feat="features", window_size="window"),
        _LAYER,
        call=_with_regions,
    ),
    Official(
        "NAFBlock",
        NAFBlock,
        options(c="features", DW_Expand="expansion", FFN_Expand="mlp_expansion", drop_out_rate=None),
        _NAF,
    ),
    Official(
        "RAT",
        RAT,
        options(scale="upscale", img_channel="channels", width="features", middle_blk_num="middle_depth")
        | options(enc_blk_nums="encoder_depths", dec_blk_nums="decoder_depths", loss_fun=Only(None)),
        _NET,
        call=_with_regions,
    ),
    Official("FocalRegionLoss", focal_region_loss, options("beta", epsilon=None), call=_loss),
]
