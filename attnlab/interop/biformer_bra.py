"""rayleizhu/BiFormer (arXiv:2303.08810): its attentions, its block and its backbone.

model = biformer("biformer_tiny", rngs=nnx.Rngs(0))
attnlab.interop.load(model, "biformer_tiny_best.pth", key="model")
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.attention.sparse.biformer_bra import BiLevelRoutingAttention, RegionalRoutingAttention
from attnlab.contract import Layout, Site
from attnlab.interop.names import Part, Squeezed
from attnlab.interop.official import ConfigError, Official, options
from attnlab.models.biformer import (
    BIFORMERS,
    BiFormer,
    ConvMixer,
    LocallyEnhancedAttention,
    biformer_block,
    stage_mixer,
)
from attnlab.models.block import Block


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


def _kind(topk: int) -> str:
    """What an official `topk` that is no number of regions stands for."""
    if topk < -2:
        raise ConfigError(f"topk must be positive, 0, -1 or -2, got {topk}")
    return {0: "convolution", -1: "plain", -2: "local"}.get(topk, "routed")


def _mixers(given: Mapping[str, Any]) -> dict[str, Any]:
    topks = given["topks"]
    return {"mixers": [_kind(topk) for topk in topks], "topks": [topk if topk > 0 else None for topk in topks]}


def _block(features: int, *, num_heads: int = 8, topk: int = 4, rngs: nnx.Rngs, **given: Any) -> Block:
    own = ("mlp_ratio", "mlp_dwconv", "position_conv", "pre_norm", "layer_scale")
    block = {name: given.pop(name) for name in own if name in given}
    side, routing = given.pop("side_dwconv", 5), {"num_heads": num_heads, "topk": topk, **given}
    mixer = stage_mixer(_kind(topk), Site(features, num_heads), side_dwconv=side, routing=routing, rngs=rngs)
    return biformer_block(mixer, features, rngs=rngs, **block)


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


_PLAIN_NAMES = {("query", "key", "value"): "qkv", "out": "proj", "local": "lepe"}
_LOCAL = Official(
    "AttentionLePE",
    LocallyEnhancedAttention,
    options("num_heads", dim="features", side_dwconv="side"),
    _PLAIN_NAMES,
    defaults={"num_heads": 8},
    always={"qkv_bias": False},
)
_PLAIN = Official(
    "Attention",
    SoftmaxAttention,
    options("num_heads", dim="features"),
    {name: there for name, there in _PLAIN_NAMES.items() if name != "local"},
    defaults={"num_heads": 8},
    always={"qkv_bias": False, "layout": Layout.IMAGE},
)
_CONV = Official("Sequential", ConvMixer, names={"conv_in": "1", "conv": "2", "conv_out": "3"})
_BLOCK = Official(
    "Block",
    _block,
    options("num_heads", "mlp_ratio", dim="features", drop_path=None) | _ROUTING | _PER_LAYER | _BLOCKS,
    {
        "before": "pos_embed",
        "mixer": Part("attn", _BRA, _LOCAL, _PLAIN, _CONV),
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
        options("num_classes", "head_dim", "qk_dims", "mlp_ratios", "kv_per_wins", "kv_downsample_ratios")
        | options(topks=_mixers, in_chans="channels", depth="depths", embed_dim="features", kv_downsample_kernels=None)
        | dict.fromkeys(unused)
        | _ROUTING
        | _BLOCKS,
        {
            "stem.parts.*.conv": lambda i: f"downsample_layers.0.{3 * i}",
            "stem.parts.*.norm": lambda i: f"downsample_layers.0.{3 * i + 1}",
            "stage.*.down.conv": "downsample_layers.*.0",
            "stage.*.down.norm": "downsample_layers.*.1",
            "stage.*.blocks.*": Part("stages.*.*", _BLOCK),
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
    _PLAIN,
    _LOCAL,
    _BLOCK,
    _model("BiFormer", BiFormer, **_SIZES, **_MORE),
    *(_model(name, functools.partial(cls, **sizes)) for name, (cls, sizes) in BIFORMERS.items()),
]
