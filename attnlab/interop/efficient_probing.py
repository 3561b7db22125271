"""Weights of billpsomas/efficient-probing (arXiv:2506.10178): efficient probing and the other poolings of its registry.

The names below `pooling`, the first entry of a probe's `Sequential(pooling, BatchNorm1d, Linear)`, are those expected.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from attnlab.interop.names import Named, Part, Squeezed
from attnlab.interop.official import ConfigError, Official, Only, options
from attnlab.pooling.abmilp import ABMILPPooling
from attnlab.pooling.aim import AIMPooling
from attnlab.pooling.cae import CAEPooling
from attnlab.pooling.cait import CaiTPooling
from attnlab.pooling.cbam import CBAMPooling
from attnlab.pooling.clip import CLIPPooling
from attnlab.pooling.coca import CoCaPooling
from attnlab.pooling.dinovit import DinoViTPooling
from attnlab.pooling.dolg import DOLGPooling
from attnlab.pooling.efficient_probing import EfficientProbing
from attnlab.pooling.jepa import JEPAPooling
from attnlab.pooling.siglip import SigLIPPooling
from attnlab.pooling.simpool import ESimPool, SimPool

Given = Mapping[str, Any]
_MAPS = {"qkv_bias": "use_bias", "qk_scale": "scale"}
_QKV = {("q", "k", "v"): "qkv", "out": "proj"}
_Q_KV = {("k", "v"): "kv", "out": "proj"}
_BLOCK = {"attention": Part("attn", _QKV)}


def _squeezed(module: Any, inputs: dict[str, jax.Array], given: Given) -> jax.Array:
    """The official class loses the batch axis at batch 1."""
    return module(*inputs.values()).squeeze()


# Where official classes return one vector per query, or per head, they stand side by side here.


def _simpool(module: Any, inputs: dict[str, jax.Array], given: Given) -> jax.Array:
    y = module(*inputs.values())
    return (y if module.gamma is None else y.reshape(len(y), module.num_heads, -1)).squeeze()


def _siglip(module: Any, inputs: dict[str, jax.Array], given: Given) -> jax.Array:
    y = module(*inputs.values())
    return y.reshape(len(y), given["latent_len"], -1) if module.reduce == "all" else y


def _jepa(module: Any, inputs: dict[str, jax.Array], given: Given) -> jax.Array:
    y = module(*inputs.values())
    return y if module.num_queries == 1 else y.reshape(len(y), module.num_queries, -1)


def _grid(given: Given) -> dict[str, Any]:
    size = given["feat_size"]
    return {"grid": (size, size) if isinstance(size, int) else tuple(size)}


def _positions(given: Given) -> dict[str, Any]:
    if given["cond"] != "pe":
        return {}
    side = math.isqrt(given["num_patches"])
    return {"positions": True, "grid": (side, side)}


def _same_width(given: Given) -> dict[str, Any]:
    if given["s3_dim"] != given["in_c"]:
        raise ConfigError(f"SpatialAttention2d needs s3_dim equal to in_c, got {given['s3_dim']} and {given['in_c']}")
    return {}


def _hidden(given: Given) -> dict[str, int]:
    divisor = given["rd_divisor"]
    rounded = int(given["channels"] * given["rd_ratio"] + divisor / 2) // divisor * divisor
    return {"hidden_features": given.get("rd_channels") or max(divisor, rounded)}


_SIMPOOL = options("num_heads", "gamma", dim="features", **_MAPS) | {
    "use_beta": lambda given: {"use_beta": given["use_beta"] and given.get("gamma") is not None}
}
_JEPA = Official(
    "AttentivePooler",
    JEPAPooling,
    options(
        *("num_queries", "num_heads", "mlp_ratio", "depth", "complete_block"),
        embed_dim="features",
        qkv_bias="use_bias",
        norm_layer=None,
        init_std=None,
    ),
    {
        "queries": Squeezed("query_tokens", 0),
        "norm1": "cross_attention_block.norm1",
        "norm2": "cross_attention_block.norm2",
        "attention": Part("cross_attention_block.xattn", _Q_KV),
        "mlp": "cross_attention_block.mlp",
        "blocks.*": Part("blocks.*", _BLOCK),
    },
    call=_jepa,
    defaults={"embed_dim": 768},
    when=lambda given: given.get("complete_block", True),
)

OFFICIAL = [
    Official(
        "EfficientProbing",
        EfficientProbing,
        options("num_queries", dim="features", **_MAPS)
        | {"num_heads": Only(1), "d_out": lambda given: {"out_features": given["dim"] // given["d_out"]}},
        {"queries": Squeezed("cls_token", 0), "value": "v"},
    ),
    Official(
        "AttentionPoolingClassifier",
        AIMPooling,
        options("num_heads", "num_queries", dim="features", **_MAPS),
        {"queries": Squeezed("cls_token", 0), "norm": "bn"},
    ),
    Official("SimPool", SimPool, _SIMPOOL, {"norm": "norm_patches", "q": "wq", "k": "wk"}, _simpool),
    Official(
        "SimPool_nolinears",
        ESimPool,
        _SIMPOOL | {"qkv_bias": None},
        {"norm": "norm_patches"},
        _simpool,
        defaults={"num_heads": 1},
    ),
    Official(
        "AttentionPoolLatent",
        SigLIPPooling,
        options("num_heads", "mlp_ratio", "qk_norm", in_features="features", qkv_bias="use_bias")
        | dict.fromkeys(("embed_dim", "out_features", "latent_dim", "pos_embed", "drop"))
        | {
            "latent_len": "num_latents",
            "norm_layer": lambda given: {"use_norm": given["norm_layer"] is not None},
            "pool_type": lambda given: {"reduce": {"token": "first", "avg": "mean"}.get(given["pool_type"], "all")},
        },
        {"latents": Squeezed("latent", 0), "attention": Part("", _Q_KV)},
        _siglip,
        defaults={"latent_len": 1},
    ),
    Official(
        "AttentionPool2d",
        CLIPPooling,
        options("num_heads", "out_features", in_features="features", embed_dim="embed_features", qkv_bias="use_bias")
        | {"feat_size": _grid},
        {"positions": "pos_embed", "attention": Part("", _QKV)},
    ),
    Official(
        "CAPooling",
        CaiTPooling,
        options("num_heads", "iterations", "init_scale", embed_dim="features", mlp_ratio_clstk="mlp_ratio", **_MAPS)
        | dict.fromkeys(("norm_layer", "act_layer")),
        {
            "cls": Squeezed("cls_token", 0, 1),
            "blocks": "blocks_token_only",
            "blocks.*.attention": "blocks_token_only.*.attn",
            "blocks.*.attention.out": "blocks_token_only.*.attn.proj",
            "blocks.*.scale1": "blocks_token_only.*.gamma_1",
            "blocks.*.scale2": "blocks_token_only.*.gamma_2",
        },
    ),
    _JEPA,
    dataclasses.replace(
        _JEPA,
        names=_JEPA.names | {"attention": Part("cross_attention_block", _Q_KV)},
        when=lambda given: not given.get("complete_block", True),
    ),
    Official(
        "CAEAttentiveBlock",
        CAEPooling,
        options("num_heads", dim="features", attn_head_dim="head_dim", **_MAPS)
        | dict.fromkeys(("mlp_ratio", "drop", "attn_drop", "drop_path", "init_values", "act_layer", "norm_layer"))
        | {"window_size": None},
        {
            "query": Squeezed("query_token", 0, 1),
            "norm_*": "norm1_*",
            **{f"attention.{n}": Named("cross_attn", weight=f"{n}.weight", bias=f"{n}_bias") for n in "qkv"},
            "attention.out": "cross_attn.proj",
        },
        _squeezed,
        ignore=("norm2_cross.*",),  # without effect
    ),
    Official(
        "CrossAttention",
        CoCaPooling,
        options(
            dim="out_features",
            dim_head="head_dim",
            heads="num_heads",
            num_img_queries="num_queries",
            parallel_ff="feed_forward",
            ff_mult="mlp_ratio",
            norm_context="context_norm",
            context_dim=lambda given: {"features": given["context_dim"] or given["dim"]},
        ),
        {
            "queries": "img_queries",
            "norm": Named("norm", weight="gamma"),
            "context_norm": Named("context_norm", weight="gamma"),
            "q": "to_q",
            "kv": "to_kv",
            "out": "to_out",
            "mlp_in": "ff.0",
            "mlp_out": "ff.2",
        },
        defaults={"context_dim": None},
        ignore=("norm.beta", "context_norm.beta"),  # fixed at zero
    ),
    Official(
        "ABMILPHead",
        ABMILPPooling,
        options("depth", "activation", dim="features", self_attention_apply_to="self_attention", num_patches=None)
        | {"content": lambda given: {"drop_first": given["content"] == "patch"}, "cond": _positions},
        {"attention": Part("self_attn", _QKV), "layers.*": lambda i: f"attention_predictor.{2 * i}"},
        ignore=("pos_embed",),  # follows from the grid
    ),
    Official(
        "SpatialAttention2d",
        DOLGPooling,
        options(in_c="features", s3_dim=_same_width, with_aspp="context", bn_eps="eps", bn_nom=None)
        | {"act_fn": lambda given: {"activation": "relu" if given["act_fn"].lower() == "relu" else "leaky_relu"}},
        {
            "context.mean": Squeezed("aspp.im_pool.1", 2, 3),
            "context.point": Squeezed("aspp.aspp.0", 2, 3),
            "context.dilated.*": lambda i: f"aspp.aspp.{i + 1}",
            "context.mix": Squeezed("aspp.conv_after.0", 2, 3),
            "map": Squeezed("conv1", 2, 3),
            "norm": "bn",
            "gate": Squeezed("conv2", 2, 3),
        },
        defaults={"s3_dim": 1024},
    ),
    Official(
        "CbamPooling",
        CBAMPooling,
        options(channels="features", spatial_kernel_size="kernel_size", mlp_bias="use_bias", rd_ratio=_hidden)
        | dict.fromkeys(("rd_divisor", "rd_channels", "act_layer", "gate_layer", "output_size")),
        {
            "channel_in": Squeezed("channel.fc1", 2, 3),
            "channel_out": Squeezed("channel.fc2", 2, 3),
            "location": "spatial.conv.conv",
            "norm": "spatial.conv.bn",
        },
        _squeezed,
        defaults={"rd_ratio": 1 / 16, "rd_divisor": 1},
    ),
    Official(
        "DinoViTBlockPooling",
        DinoViTPooling,
        options("num_heads", d_model="features"),
        {"block": Part("dino_block", _BLOCK)},
    ),
]
