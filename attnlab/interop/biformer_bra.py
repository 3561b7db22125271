"""rayleizhu/BiFormer (arXiv:2303.08810): its attentions, its block and its backbone.

model = biformer("biformer_tiny", rngs=nnx.Rngs(0))
attnlab.interop.load(model, "biformer_tiny_best.pth", key="model")
"""

import functools
from typing import Any

import jax
from flax import nnx

from attnlab.attention.sparse.biformer_bra import RegionalRoutingAttention
from attnlab.contract import Layout, Site
from attnlab.interop.names import Part, Squeezed
from attnlab.interop.official import ConfigError, Given, Inputs, Official, options, plain, same_as
from attnlab.models.biformer import BIFORMERS, ConvMixer, LocallyEnhancedAttention, biformer_block, stage_mixer
from attnlab.models.biformer_stl import BIFORMER_STLS, BiFormerSTL
from attnlab.models.block import Block


def _routing(module: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    regions, weights = module.routing(inputs["x"])
    return {"y": module(inputs["x"]), "r_idx": regions, "r_weight": weights}


def _position(given: Given) -> dict[str, bool]:
    size = given["before_attn_dwconv"]
    if size not in (0, 3):
        raise ConfigError(f"before_attn_dwconv keeps the size of the map for 0 and 3 alone, got {size}")
    return {"position_conv": size > 0}


def _kind(topk: int) -> str:
    """What an official `topk` that is no number of regions stands for."""
    if topk < -2:
        raise ConfigError(f"topk must be positive, 0, -1 or -2, got {topk}")
    return {0: "convolution", -1: "plain", -2: "local"}.get(topk, "routed")


def _mixers(given: Given) -> dict[str, Any]:
    topks = given["topks"]
    return {"mixers": [_kind(topk) for topk in topks], "topks": [topk if topk > 0 else None for topk in topks]}


def _later_mixers(given: Given) -> dict[str, Any]:
    topks = given["topks"]
    if any(topk < 1 and topk != -1 for topk in topks):
        raise ConfigError(f"topks must be positive or -1, got {topks}")
    kinds = ["regional" if topk > 0 else "local_values" for topk in topks]
    return {"mixers": kinds, "topks": [topk if topk > 0 else None for topk in topks]}


def _norm(name: str, ours: str) -> Any:
    """The option of a norm by the name of its class over there."""

    def option(given: Given) -> dict[str, Any]:
        value = given[name]
        text = getattr(value, "__name__", value)
        kinds = {None: None, "BatchNorm2d": "batch", "LayerNorm2d": "layer"}
        text = text.rpartition(".")[2] if isinstance(text, str) else text
        if text not in kinds:
            raise ConfigError(f"{name} must be BatchNorm2d or LayerNorm2d here, got {value!r}")
        return {ours: kinds[text]}

    return option


def _block(features: int, *, num_heads: int = 8, topk: int = 4, rngs: nnx.Rngs, **given: Any) -> Block:
    own = ("mlp_ratio", "mlp_dwconv", "position_conv", "pre_norm", "layer_scale")
    block = {name: given.pop(name) for name in own if name in given}
    side, routing = given.pop("side_dwconv", 5), {"num_heads": num_heads, "topk": topk, **given}
    mixer = stage_mixer(_kind(topk), Site(features, num_heads), side_dwconv=side, routing=routing, rngs=rngs)
    return biformer_block(mixer, features, rngs=rngs, **block)


_QKV = ("query", "key", "value")
_NAMES = {_QKV: "qkv", "out": "proj"}
_CONFIG = options(dim="features", kv_downsample_kernel=None)
_BRA_NAMES = {_QKV: "qkv.qkv", "router": "router.emb", "out": "wo"}
_NCHW = options(dim="features", qk_dim=same_as("qk_dim", "dim"), auto_pad=None, attn_backend=None)
_NCHW_NAMES = {_QKV: Squeezed("qkv_linear", 2, 3), "out": Squeezed("output_linear", 2, 3)}
_HEADS, _NO_BIAS = {"num_heads": 8}, {"qkv_bias": False}
_IMAGE = {"layout": Layout.IMAGE}
_LOCAL_CONFIG = options(dim="features", side_dwconv="side")
_LOCAL_NAMES = _NAMES | {"local": "lepe"}
_BRA = Official("BiLevelRoutingAttention", "biformer_bra", _CONFIG, _BRA_NAMES, _routing)
_LOCAL = Official("AttentionLePE", LocallyEnhancedAttention, _LOCAL_CONFIG, _LOCAL_NAMES, plain, _HEADS, _NO_BIAS)
_PLAIN = Official("Attention", "softmax_attention", {"dim": "features"}, _NAMES, plain, _HEADS, _NO_BIAS | _IMAGE)
_CONV = Official("Sequential", ConvMixer, names={"conv_in": "1", "conv": "2", "conv_out": "3"})

_BLOCKS = options(before_attn_dwconv=_position, layer_scale_init_value="layer_scale")
_BLOCK_NAMES = {"before": "pos_embed", "mixer": Part("attn", _BRA, _LOCAL, _PLAIN, _CONV)}
_BLOCK_NAMES |= {"mlp.fc1": "mlp.0", "mlp.conv": "mlp.1.dwconv", "mlp.fc2": "mlp.3"}
_BLOCK_NAMES |= {"scale1": "gamma1", "scale2": "gamma2"}
_BLOCK = Official("Block", _block, _CONFIG | _BLOCKS, _BLOCK_NAMES, plain, {"kv_downsample_mode": "ada_avgpool"})
_NET = _BLOCKS | options(in_chans="channels", depth="depths", embed_dim="features", topks=_mixers)
_NET |= dict.fromkeys(("kv_downsample_kernels", "use_checkpoint_stages", "pe", "pe_stages", "representation_size"))
_NET_NAMES = {"stem.parts.*.conv": lambda i: f"downsample_layers.0.{3 * i}"}
_NET_NAMES |= {"stem.parts.*.norm": lambda i: f"downsample_layers.0.{3 * i + 1}"}
_NET_NAMES |= {"stage.*.down.conv": "downsample_layers.*.0", "stage.*.down.norm": "downsample_layers.*.1"}
_NET_NAMES |= {"stage.*.blocks.*": Part("stages.*.*", _BLOCK)}
_GIVEN = {"depth": [3, 4, 8, 3], "embed_dim": [64, 128, 320, 512], "head_dim": 64, "topks": [8, 8, -1, -1]}
_GIVEN |= {"kv_downsample_mode": "ada_avgpool", "kv_per_wins": [2, 2, -1, -1], "mlp_ratios": [4, 4, 4, 4]}

_REGIONAL = Official("nchwBRA", RegionalRoutingAttention, _NCHW, _NCHW_NAMES)
_VALUE_NAMES = {_QKV: Squeezed("qkv", 2, 3), "out": Squeezed("proj", 2, 3), "local": "lepe"}
_VALUES = Official(
    "nchwAttentionLePE",
    LocallyEnhancedAttention,
    _LOCAL_CONFIG,
    _VALUE_NAMES,
    plain,
    _HEADS,
    _NO_BIAS | {"of_values": True},
)
_STL = options(in_chans="channels", depth="depths", embed_dim="features", topks=_mixers, qk_scale=None)
_STL |= {"norm_layer": _norm("norm_layer", "norm"), "pre_head_norm_layer": _norm("pre_head_norm_layer", "last_norm")}
_STL |= {"use_checkpoint_stages": None}
_STL_DOWN = {"stem.conv": "downsample_layers.0.0", "stem.norm": "downsample_layers.0.1"}
_STL_DOWN |= {"stage.*.down.norm": "downsample_layers.*.0", "stage.*.down.conv": "downsample_layers.*.1"}
_STL_BLOCK = {"mixer": _BLOCK_NAMES["mixer"], "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
_LATER_BLOCK = {"mixer": Part("attn", _REGIONAL, _VALUES)}
_LATER_BLOCK |= {"mlp.fc1": Squeezed("mlp.0", 2, 3), "mlp.fc2": Squeezed("mlp.2", 2, 3)}
_STL_NAMES = _STL_DOWN | {"stage.*.blocks.*": Part("stages.*.blocks.*", _STL_BLOCK)}
_LATER_NAMES = _STL_DOWN | {"stage.*.blocks.*": Part("stages.*.blocks.*", _LATER_BLOCK)}
_LATER = _STL | {"topks": _later_mixers}
_STL_GIVEN = {"norm_layer": "LayerNorm2d"}
_LATER_GIVEN = _STL_GIVEN | {"topks": [1, 4, 16, -2]}


def _is_later(options: dict[str, Any]) -> bool:
    return "regional" in options.get("mixers", ())


OFFICIAL = [
    _BRA,
    _REGIONAL,
    _VALUES,
    _PLAIN,
    _LOCAL,
    _BLOCK,
    Official("BiFormer", "biformer_bra.biformer", _NET, _NET_NAMES, plain, _GIVEN),
    *(Official(name, functools.partial(cls, **sizes), _NET, _NET_NAMES) for name, (cls, sizes) in BIFORMERS.items()),
    Official("BiFormerSTL", BiFormerSTL, _STL, _STL_NAMES, plain, _STL_GIVEN),
    Official("nchwBiFormerSTL", BiFormerSTL, _LATER, _LATER_NAMES, plain, _LATER_GIVEN),
    *(
        Official(
            name,
            functools.partial(cls, **sizes),
            _LATER if _is_later(sizes) else _STL,
            _LATER_NAMES if _is_later(sizes) else _STL_NAMES,
        )
        for name, (cls, sizes) in BIFORMER_STLS.items()
    ),
]
