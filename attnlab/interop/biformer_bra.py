"""rayleizhu/BiFormer (arXiv:2303.08810): its attentions, its block and its backbone.

model = biformer_tiny(rngs=nnx.Rngs(0))
attnlab.interop.load(model, "biformer_tiny_best.pth", key="model")
"""

from collections.abc import Mapping
from typing import Any

import jax

from attnlab.attention.sparse.biformer_bra import BiLevelRoutingAttention, RegionalRoutingAttention
from attnlab.interop.names import Part, Squeezed
from attnlab.interop.official import ConfigError, Official, options
from attnlab.models.biformer import (
    BiFormer,
    BiFormerBlock,
    ConvMixer,
    PlainAttention,
    biformer_base,
    biformer_small,
    biformer_tiny,
)


def _routing(module: BiLevelRoutingAttention, inputs: dict[str, jax.Array], given: Any) -> dict[str, jax.Array]:
    regions, weights = module.routing(inputs["x"])
    return {"y": module(inputs["x"]), "r_idx": regions, "r_weight": weights}


def _same_width(given: Mapping[str, Any]) -> dict[str, Any]:
    if given["qk_dim"] not in (None, given["dim"]):
        raise ConfigError(f"nchwBRA needs qk_dim equal to dim, got {given['qk_dim']} and {given['dim']}")
    return {}


def _position(given: Mapping[str, Any]) -> dict[str, bool]:
    size = given["before_attn_dwconv"]
    if size not in (0, 3):
        raise ConfigError(f"before_attn_dwconv keeps the size of the map for 0 and 3 alone, got {size}")
    return {"position_conv": size > 0}


_ROUTING = options(
    "n_win", "qk_scale", "kv_downsample_mode", "param_attention", "param_routing", "diff_routing", "soft_routing"
) | options("auto_pad", "side_dwconv")
_BLOCKS = options("mlp_dwconv", "pre_norm", before_attn_dwconv=_position, layer_scale_init_value="layer_scale")
_PER_LAYER = options("kv_per_win", "kv_downsample_ratio", "topk", "qk_dim", kv_downsample_kernel=None)

_QKV = ("query", "key", "value")
_BRA = Official(
    "BiLevelRoutingAttention",
    BiLevelRoutingAttention,
    options("num_heads", dim="features") | _ROUTING | _PER_LAYER,
    {_QKV: "qkv.qkv", "router": "router.emb", "out": "wo"},
    _routing,
)


def _plain(symbol: str, size: int) -> Official:
    return Official(
        symbol,
        PlainAttention,
        options("num_heads", dim="features", side_dwconv="local_size"),
        {"out": "proj", "local": "lepe"},
        defaults={"side_dwconv": size},
    )


_CONV = Official("Sequential", ConvMixer, names={"conv_in": "1", "conv": "2", "conv_out": "3"})
_BLOCK = Official(
    "Block",
    BiFormerBlock,
    options("num_heads", "mlp_ratio", dim="features", drop_path=None) | _ROUTING | _PER_LAYER | _BLOCKS,
    {
        "position": "pos_embed",
        "attention": Part("attn", _BRA, _plain("Attention", 0), _CONV),
        "mlp.fc1": "mlp.0",
        "mlp.conv": "mlp.1.dwconv",
        "mlp.fc2": "mlp.3",
        "scale1": "gamma1",
        "scale2": "gamma2",
    },
    defaults={"kv_downsample_mode": "ada_avgpool"},
)
_SIZES = {"depth": [3, 4, 8, 3], "embed_dim": [64, 128, 320, 512], "head_dim": 64, "topks": [8, 8, -1, -1]}
_MORE = {"kv_downsample_mode": "ada_avgpool", "kv_per_wins": [2, 2, -1, -1], "mlp_ratios": [4, 4, 4, 4]}


def _model(symbol: str, cls: Any, **defaults: Any) -> Official:
    unused = ("drop_rate", "drop_path_rate", "use_checkpoint_stages", "pe", "pe_stages", "representation_size")
    return Official(
        symbol,
        cls,
        options("num_classes", "head_dim", "topks", "qk_dims", "mlp_ratios", "kv_per_wins", "kv_downsample_ratios")
        | options(in_chans="channels", depth="depths", embed_dim="widths", kv_downsample_kernels=None)
        | dict.fromkeys(unused)
        | _ROUTING
        | _BLOCKS,
        {
            "stem.conv": "downsample_layers.0.0",
            "stem.norm": "downsample_layers.0.1",
            "downsamples.*.conv": lambda i: f"downsample_layers.{i}.{0 if i else 3}",
            "downsamples.*.norm": lambda i: f"downsample_layers.{i}.{1 if i else 4}",
            "stages.*.*": Part("stages.*.*", _BLOCK),
        },
        defaults=defaults,
    )


OFFICIAL = [
    _BRA,
    Official(
        "nchwBRA",
        RegionalRoutingAttention,
        options("num_heads", "n_win", "topk", "qk_scale", "side_dwconv", dim="features", qk_dim=_same_width)
        | dict.fromkeys(("auto_pad", "attn_backend")),
        {_QKV: Squeezed("qkv_linear", 2, 3), "out": Squeezed("output_linear", 2, 3)},
    ),
    _plain("Attention", 0),
    _plain("AttentionLePE", 5),
    _BLOCK,
    _model("BiFormer", BiFormer, **_SIZES, **_MORE),
    _model("biformer_tiny", biformer_tiny),
    _model("biformer_small", biformer_small),
    _model("biformer_base", biformer_base),
]
