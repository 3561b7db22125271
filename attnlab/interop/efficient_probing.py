"""Weights of billpsomas/efficient-probing (arXiv:2506.10178): efficient probing and the other poolings of its registry.

The names below `pooling`, the first entry of a probe's `Sequential(pooling, BatchNorm1d, Linear)`, are those expected.
"""

import math
from typing import Any

import jax

from attnlab.interop.names import Named, Part, Squeezed
from attnlab.interop.official import Given, Inputs, Official, Only, options, pair, plain, same_as


def _apart(module: Any, inputs: Inputs, given: Given) -> jax.Array:
    """Some official classes return one vector for each query, latent or head; here they stand side by side."""
    y, parts = module(*inputs.values()), given.get("num_queries", 1)
    if given.get("gamma") is not None:
        parts = module.num_heads
    elif "latent_len" in given and given.get("pool_type", "token") not in ("token", "avg"):
        return y.reshape(len(y), given["latent_len"], -1)
    return y if parts == 1 else y.reshape(len(y), parts, -1)


def _squeezed(module: Any, inputs: Inputs, given: Given) -> jax.Array:
    """Some lose the batch axis at batch 1."""
    return _apart(module, inputs, given).squeeze()


def _hidden(given: Given) -> dict[str, int]:
    divisor = given["rd_divisor"]
    rounded = int(given["channels"] * given["rd_ratio"] + divisor / 2) // divisor * divisor
    return {"hidden_features": given.get("rd_channels") or max(divisor, rounded)}


def _positions(given: Given) -> dict[str, Any]:
    return {"positions": True, "grid": pair(math.isqrt(given["num_patches"]))} if given["cond"] == "pe" else {}


_EP = "efficient_probing"
_FIRST = Squeezed("cls_token", 0)
_QKV = {("query", "key", "value"): "qkv", "out": "proj"}
_Q_KV = {"query": "q", ("key", "value"): "kv", "out": "proj"}
_Q_K_V = {"query": "q", "key": "k", "value": "v", "out": "proj"}
_BLOCK = {"attention": Part("attn", _QKV)}
_CONFIG = options(dim="features", qkv_bias="use_bias", qk_scale="scale")
_WIDTH = {"d_out": lambda given: {"out_features": given["dim"] // given["d_out"]}, "num_heads": Only(1)}
_SIMPOOL = _CONFIG | {"use_beta": lambda given: {"use_beta": given["use_beta"] and given.get("gamma") is not None}}
_ESIMPOOL, _NORM = _SIMPOOL | {"qkv_bias": None}, {"norm": "norm_patches"}

_SIGLIP = options(in_features="features", qkv_bias="use_bias", latent_len="num_latents")
_SIGLIP |= dict.fromkeys(("embed_dim", "out_features", "latent_dim", "pos_embed"))
_SIGLIP |= {"norm_layer": lambda given: {"use_norm": given["norm_layer"] is not None}}
_SIGLIP |= {"pool_type": lambda given: {"reduce": {"token": "first", "avg": "mean"}.get(given["pool_type"], "all")}}
_SIGLIP_NAMES = {"latents": Squeezed("latent", 0), "attention": Part("", _Q_KV)}
_CLIP = options(in_features="features", embed_dim="embed_features", qkv_bias="use_bias")
_CLIP |= {"feat_size": lambda given: {"grid": pair(given["feat_size"])}}
_CLIP_NAMES = {"positions": "pos_embed", "attention": Part("", _QKV)}

_CAIT = _CONFIG | options(embed_dim="features", mlp_ratio_clstk="mlp_ratio", norm_layer=None, act_layer=None)
_CAIT_NAMES = {"cls": Squeezed("cls_token", 0, 1), "blocks": "blocks_token_only"}
_CAIT_NAMES |= {"blocks.*.attention": Part("blocks_token_only.*.attn", _Q_K_V)}
_CAIT_NAMES |= {f"blocks.*.scale{number}": f"blocks_token_only.*.gamma_{number}" for number in (1, 2)}
_JEPA = options(embed_dim="features", qkv_bias="use_bias", norm_layer=None, init_std=None)
_JEPA_NAMES = {name: f"cross_attention_block.{name}" for name in ("norm1", "norm2", "mlp")}
_JEPA_NAMES |= {"queries": Squeezed("query_tokens", 0), "blocks.*": Part("blocks.*", _BLOCK)}
_CAE = _CONFIG | {"attn_head_dim": "head_dim"}
_CAE |= dict.fromkeys(("mlp_ratio", "init_values", "act_layer", "norm_layer", "window_size"))
_CAE_NAMES = {"query": Squeezed("query_token", 0, 1), "norm_*": "norm1_*", "attention.out": "cross_attn.proj"}
for _name in ("query", "key", "value"):
    _letter = _name[0]
    _CAE_NAMES[f"attention.{_name}"] = Named("cross_attn", weight=f"{_letter}.weight", bias=f"{_letter}_bias")
_COCA = options(dim="out_features", dim_head="head_dim", heads="num_heads", num_img_queries="num_queries")
_COCA |= options(parallel_ff="feed_forward", ff_mult="mlp_ratio", norm_context="context_norm")
_COCA |= {"context_dim": lambda given: {"features": given["context_dim"] or given["dim"]}}
_COCA_NAMES = {"queries": "img_queries", "q": "to_q", "kv": "to_kv", "out": "to_out"}
_COCA_NAMES |= {"mlp_in": "ff.0", "mlp_out": "ff.2"}
_COCA_NAMES |= {name: Named(name, weight="gamma") for name in ("norm", "context_norm")}
_FIXED = ("norm.beta", "context_norm.beta")  # at zero
_ABMILP = options(dim="features", self_attention_apply_to="self_attention", cond=_positions, num_patches=None)
_ABMILP |= {"content": lambda given: {"drop_first": given["content"] == "patch"}}
_ABMILP_NAMES = {"attention": Part("self_attn", _QKV), "layers.*": lambda i: f"attention_predictor.{2 * i}"}
_DOLG = options(in_c="features", s3_dim=same_as("s3_dim", "in_c"), with_aspp="context", bn_eps="eps", bn_nom=None)
_DOLG |= {"act_fn": lambda given: {"activation": "relu" if given["act_fn"].lower() == "relu" else "leaky_relu"}}
_DOLG_NAMES = {"context.dilated.*": lambda i: f"aspp.aspp.{i + 1}", "norm": "bn"}
for _ours, _theirs in (("mean", "im_pool.1"), ("point", "aspp.0"), ("mix", "conv_after.0")):
    _DOLG_NAMES[f"context.{_ours}"] = Squeezed(f"aspp.{_theirs}", 2, 3)
_DOLG_NAMES |= {"map": Squeezed("conv1", 2, 3), "gate": Squeezed("conv2", 2, 3)}
_CBAM = options(channels="features", spatial_kernel_size="kernel_size", mlp_bias="use_bias", rd_ratio=_hidden)
_CBAM |= dict.fromkeys(("rd_divisor", "rd_channels", "act_layer", "gate_layer", "output_size"))
_CBAM_NAMES = {"channel_in": Squeezed("channel.fc1", 2, 3), "channel_out": Squeezed("channel.fc2", 2, 3)}
_CBAM_NAMES |= {"location": "spatial.conv.conv", "norm": "spatial.conv.bn"}
_RATIO = {"rd_ratio": 1 / 16, "rd_divisor": 1}


def _jepa(complete: bool, attention: str) -> Official:
    """The official class, whose attention has another name without the rest of a block."""
    when, names = (lambda given: given["complete_block"] == complete), {"attention": Part(attention, _Q_KV)}
    usual = {"embed_dim": 768, "complete_block": True}
    return Official("AttentivePooler", f"{_EP}.jepa", _JEPA, _JEPA_NAMES | names, _apart, usual, when=when)


OFFICIAL = [
    Official("EfficientProbing", _EP, _CONFIG | _WIDTH, {"queries": _FIRST, "value": "v"}),
    Official("AttentionPoolingClassifier", f"{_EP}.aim", _CONFIG, {"queries": _FIRST, "norm": "bn"}),
    Official("SimPool", f"{_EP}.simpool", _SIMPOOL, _NORM | {"q": "wq", "k": "wk"}, _squeezed),
    Official("SimPool_nolinears", f"{_EP}.esimpool", _ESIMPOOL, _NORM, _squeezed, {"num_heads": 1}),
    Official("AttentionPoolLatent", f"{_EP}.siglip", _SIGLIP, _SIGLIP_NAMES, _apart, {"latent_len": 1}),
    Official("AttentionPool2d", f"{_EP}.clip", _CLIP, _CLIP_NAMES),
    Official("CAPooling", f"{_EP}.cait", _CAIT, _CAIT_NAMES),
    _jepa(True, "cross_attention_block.xattn"),
    _jepa(False, "cross_attention_block"),
    # Its last norm is without effect there.
    Official("CAEAttentiveBlock", f"{_EP}.cae", _CAE, _CAE_NAMES, _squeezed, ignore=("norm2_cross.*",)),
    Official("CrossAttention", f"{_EP}.coca", _COCA, _COCA_NAMES, plain, {"context_dim": None}, ignore=_FIXED),
    Official("ABMILPHead", f"{_EP}.abmilp", _ABMILP, _ABMILP_NAMES, ignore=("pos_embed",)),  # follows from the grid
    Official("SpatialAttention2d", f"{_EP}.dolg", _DOLG, _DOLG_NAMES, defaults={"s3_dim": 1024}),
    Official("CbamPooling", f"{_EP}.cbam", _CBAM, _CBAM_NAMES, _squeezed, _RATIO),
    Official("DinoViTBlockPooling", f"{_EP}.dinovit", {"d_model": "features"}, {"block": Part("dino_block", _BLOCK)}),
]
