"""PATNet: haiduo/PartialNet, models/partialnet.py and models/irpe.py."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.interop.names import Mapped, Name, Part, Squeezed
from attnlab.interop.official import ConfigError, Given, Inputs, Official, Only, options
from attnlab.mixers.patnet import (
    DistanceBiasAttention,
    GaussianChannelGate,
    PartialChannelAttention,
    PartialConv,
    PartialSelfAttention,
    PartialSpatialAttention,
)
from attnlab.models.patnet import ACTIVATIONS, PATNet, partial_block
from attnlab.nn.positions import euclidean_buckets


def _pairs_here(weight: jax.Array) -> jax.Array:
    """A kernel over the pair (mean, deviation), (out, in, 1, 2), to a map of both, (out, 2 in)."""
    return weight[:, :, 0].swapaxes(1, 2).reshape(weight.shape[0], -1)


def _pairs_there(weight: jax.Array) -> jax.Array:
    return weight.reshape(weight.shape[0], 2, -1).swapaxes(1, 2)[:, :, None]


_GATE: dict[Any, Any] = {"mix": Mapped("cfc1", _pairs_here, _pairs_there), "norm": "bn"}
_DISTANCE: dict[Any, Any] = {
    ("query", "key", "value"): "qkv",
    "out": "proj",
    "bias": "rpe_k.lookup_table_bias",
}
_CHANNEL: dict[Any, Any] = {"conv": "partial_conv3", "gate": Part("attn", _GATE)}
_SELF: dict[Any, Any] = {"conv": "partial_conv3", "attend": Part("attn", _DISTANCE)}
_SPATIAL: dict[Any, Any] = {
    "gate": Squeezed("conv_attn", 2, 3),
    "map": Squeezed("conv", 2, 3),
    "gated_norm": "norm",
    "mapped_norm": "norm2",
}


def _mixer_names(mixer: PartialConv) -> dict[Any, Any]:
    if isinstance(mixer, PartialChannelAttention):
        return _CHANNEL
    return _SELF if isinstance(mixer, PartialSelfAttention) else {"conv": "partial_conv3"}


def _block(block: Any) -> dict[Any, Any]:
    names: dict[Any, Any] = {
        "mixer": Part("spatial_mixing", _mixer_names(block.mixer)),
        "mlp.parts.0.map": Squeezed("mlp.0", 2, 3),
        "mlp.parts.0.norm": "mlp.1",
        "mlp.parts.1": Squeezed("mlp.3", 2, 3),
        "scale2": Name("", leaves={"": "layer_scale"}),
    }
    return names | ({"mlp.parts.2": Part("mlp.4", _SPATIAL)} if len(block.mlp.parts) > 2 else {})


def _net(model: PATNet) -> dict[Any, Any]:
    names: dict[Any, Any] = {
        "stem.conv": "patch_embed.proj",
        "stem.norm": "patch_embed.norm",
        "head.proj": Squeezed("avgpool_pre_head.1", 2, 3),
        "head.head": "head",
    }
    for index, stage in enumerate(model.stage):
        if index:
            names |= {
                f"stage.{index}.down.conv": f"stages.{2 * index - 1}.reduction",
                f"stage.{index}.down.norm": f"stages.{2 * index - 1}.norm",
            }
        for place, block in enumerate(stage.blocks):
            names[f"stage.{index}.blocks.{place}"] = Part(f"stages.{2 * index}.blocks.{place}", _block(block))
    return names


def _activation(given: Given) -> dict[str, str]:
    """Names of classes, or of the configuration; anything unknown is a ReLU there."""
    return {"activation": "gelu" if str(given["act_layer"]).upper() == "GELU" else "relu"}


def _block_activation(given: Given) -> dict[str, Any]:
    return {"activation": ACTIVATIONS[_activation(given)["activation"]]}


def _heads(name: str) -> Any:
    def heads(given: Given) -> dict[str, int]:
        return {"num_heads": 4 if given[name] else 6}

    return heads


def _kind(given: Given) -> dict[str, str]:
    if given["channel_type"] not in ("se", "self"):
        raise ConfigError(f"channel_type must be 'se' or 'self' here, got {given['channel_type']!r}")
    return {"kind": "self" if given["channel_type"] == "self" else "channel"}


def _distances(given: Given) -> dict[str, float]:
    """The words of the one table that the code has: Euclidean, a bias for each head, on the keys."""
    words = str(given["rpe"]).split()
    if words[0] != "euc" or "ratio" not in words:
        raise ConfigError(f"rpe must be 'euc ratio NUMBER bias per head on k', got {given['rpe']!r}")
    return {"ratio": float(words[words.index("ratio") + 1])}


def _tables(function: Any, inputs: Inputs, given: Given) -> Mapping[str, jax.Array]:
    return {
        f"ids_{rows}x{columns}_ratio{ratio}": jnp.asarray(euclidean_buckets((rows, columns), ratio))
        for rows, columns, ratio in given["sizes"]
    }


def _of(kind: str | None) -> Any:
    def suits(given: Given) -> bool:
        return (given.get("channel_type") if given.get("use_attn") else None) == kind

    return suits


_PARTIAL = options(dim="features", n_div="divisor", forward_type=Only("split_cat", "slicing"), use_attn=None)
_PARTIAL |= options(channel_type=None)
_UNUSED: dict[str, Any] = dict.fromkeys(("u_regular", "l_gate", "index_div", "print_n_div", "pre_epoch", "img_size"))
_COMMON = options("mlp_ratio", n_div="divisor", layer_scale_init_value="layer_scale", auto_div=Only(False))
_COMMON |= options(norm_layer=None, pconv_fw_type=Only("split_cat", "slicing"), **_UNUSED)
_NET = options("depths", "num_classes", in_chans="channels", embed_dim="features", feature_dim="projection")
_NET |= options(drop_path_rate="drop_path", use_channel_attn="attends", use_spatial_attn="spatial")
_NET |= options(act_layer=_activation, patnet_t0=_heads("patnet_t0"), patch_norm=Only(True), fork_feat=Only(False))
_NET |= options(patch_size=Only(4), patch_stride=Only(4), patch_size2=Only(2), patch_stride2=Only(2))

OFFICIAL = [
    Official("SRM", GaussianChannelGate, options(channel="features"), _GATE),
    Official("Partial_conv3", PartialChannelAttention, _PARTIAL | {"patnet_t0": None}, _CHANNEL, when=_of("se")),
    Official(
        "Partial_conv3",
        PartialSelfAttention,
        _PARTIAL | {"patnet_t0": _heads("patnet_t0")},
        _SELF,
        when=_of("self"),
        defaults={"patnet_t0": False},
    ),
    Official(
        "Partial_conv3",
        PartialConv,
        _PARTIAL | {"patnet_t0": None},
        {"conv": "partial_conv3"},
        when=_of(None),
    ),
    Official(
        "partial_spatial_attn_layer_reverse",
        PartialSpatialAttention,
        options("partial", dim="features", n_head=Only(1)),
        _SPATIAL,
    ),
    Official(
        "RPEAttention",
        DistanceBiasAttention,
        options("num_heads", "qkv_bias", qk_scale="scale", dim="features", rpe=_distances, attn_drop=None)
        | {"proj_drop": None},
        _DISTANCE,
        defaults={"num_heads": 8},
    ),
    Official("irpe euclidean buckets", euclidean_buckets, {"sizes": None}, call=_tables),
    Official(
        "MLPBlock",
        partial_block,
        _COMMON
        | options(use_channel="attends", use_spatial="spatial", channel_type=_kind, patnet_t0=_heads("patnet_t0"))
        | options("drop_path", act_layer=_block_activation),
        _block,
        defaults={"patnet_t0": True},
    ),
    Official(
        "PartialNet",
        PATNet,
        _COMMON | _NET,
        _net,
        defaults={
            "embed_dim": 96,
            "depths": (1, 2, 8, 2),
            "use_spatial_attn": True,
            "drop_path_rate": 0.1,
            "patnet_t0": True,
        },
        always={"image_size": None},
    ),
]
