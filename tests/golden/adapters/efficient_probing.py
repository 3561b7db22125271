"""Golden adapter of `efficient_probing`: the poolings of billpsomas/efficient-probing."""

import math

from flax import nnx

from attnlab.interop.efficient_probing import load_pooling
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


def _efficient_probing(config):
    if config.pop("num_heads", 1) != 1:
        raise ValueError("the official class works for one head alone")
    config["out_features"] = config["features"] // config.pop("d_out", 1)
    return EfficientProbing, config


def _simpool(config):
    if config.get("gamma") is None:
        config.pop("use_beta", None)
    return SimPool, config


def _esimpool(config):
    config.pop("use_bias", None)
    return ESimPool, _simpool(config)[1]


def _siglip(config):
    for name in ("latent_dim", "embed_features", "out_features", "pos_embed", "drop"):
        config.pop(name, None)
    normalised = config.pop("norm_layer", None) is not None
    reduce = {"token": "first", "avg": "mean"}.get(config.pop("pool_type", "token"), "all")
    names = {"latent_len": "num_latents"}
    return SigLIPPooling, {names.get(k, k): v for k, v in config.items()} | {"use_norm": normalised, "reduce": reduce}


def _clip(config):
    size = config.pop("feat_size")
    return CLIPPooling, config | {"grid": (size, size) if isinstance(size, int) else tuple(size)}


def _cait(config):
    for name in ("norm_layer", "act_layer"):
        config.pop(name, None)
    if "mlp_ratio_clstk" in config:
        config["mlp_ratio"] = config.pop("mlp_ratio_clstk")
    return CaiTPooling, config


def _jepa(config):
    for name in ("init_std", "norm_layer"):
        config.pop(name, None)
    return JEPAPooling, {"features": 768} | config


def _cae(config):
    unused = ("mlp_ratio", "drop", "attn_drop", "drop_path", "init_values", "act_layer", "norm_layer", "window_size")
    for name in unused:
        config.pop(name, None)
    return CAEPooling, config


def _coca(config):
    width = config.pop("features")
    context = config.pop("context_dim", None)
    names = {
        "dim_head": "head_dim",
        "heads": "num_heads",
        "num_img_queries": "num_queries",
        "parallel_ff": "feed_forward",
        "ff_mult": "mlp_ratio",
        "norm_context": "context_norm",
    }
    features = width if context is None else context
    return CoCaPooling, {names.get(k, k): v for k, v in config.items()} | {"features": features, "out_features": width}


def _abmilp(config):
    patches = config.pop("num_patches", None)
    config["self_attention"] = config.pop("self_attention_apply_to", "none")
    config["drop_first"] = config.pop("content", "all") == "patch"
    config["positions"] = config.pop("cond", "none") == "pe"
    if config["positions"]:
        config["grid"] = (math.isqrt(patches), math.isqrt(patches))
    return ABMILPPooling, config


def _dolg(config):
    config.pop("bn_nom", None)
    if config.pop("s3_dim", 1024) != config["features"]:
        raise ValueError("the official class needs s3_dim equal to in_c")
    activation = config.pop("act_fn", "relu").lower()
    config["activation"] = "relu" if activation == "relu" else "leaky_relu"
    config["context"] = config.pop("with_aspp", False)
    return DOLGPooling, {{"bn_eps": "eps"}.get(k, k): v for k, v in config.items()}


def _cbam(config):
    for name in ("act_layer", "gate_layer", "output_size"):
        config.pop(name, None)
    ratio, divisor, hidden = (
        config.pop("rd_ratio", 1 / 16),
        config.pop("rd_divisor", 1),
        config.pop("rd_channels", None),
    )
    if not hidden:
        hidden = max(divisor, int(config["features"] * ratio + divisor / 2) // divisor * divisor)
    names = {"spatial_kernel_size": "kernel_size", "mlp_bias": "use_bias"}
    return CBAMPooling, {names.get(k, k): v for k, v in config.items()} | {"hidden_features": hidden}


CLASSES = {
    "EfficientProbing": _efficient_probing,
    "AttentionPoolingClassifier": lambda config: (AIMPooling, config),
    "SimPool": _simpool,
    "SimPool_nolinears": _esimpool,
    "AttentionPoolLatent": _siglip,
    "AttentionPool2d": _clip,
    "CAPooling": _cait,
    "AttentivePooler": _jepa,
    "CAEAttentiveBlock": _cae,
    "CrossAttention": _coca,
    "ABMILPHead": _abmilp,
    "SpatialAttention2d": _dolg,
    "CbamPooling": _cbam,
    "DinoViTBlockPooling": lambda config: (DinoViTPooling, config),
}
NAMES = {
    "dim": "features",
    "embed_dim": "embed_features",
    "in_features": "features",
    "in_c": "features",
    "channels": "features",
    "d_model": "features",
    "qkv_bias": "use_bias",
    "qk_scale": "scale",
    "attn_head_dim": "head_dim",
}

SQUEEZED = (SimPool, ESimPool, CAEPooling, CBAMPooling)
"""Their official classes lose the batch axis at batch 1."""


def run(meta, param, inputs):
    name, x = meta["class"], inputs["x"]
    names = NAMES | ({"embed_dim": "features"} if name in ("CAPooling", "AttentivePooler") else {})
    cls, options = CLASSES[name]({names.get(k, k): v for k, v in meta["config"].items()})
    module = cls(**options, rngs=nnx.Rngs(0))
    load_pooling(module, param)
    y = module(x) if "cls" not in inputs else module(x, inputs["cls"])
    # Where the official class returns one vector per query, or per head, they stand side by side here.
    if name == "AttentivePooler" and options.get("num_queries", 1) > 1:
        y = y.reshape(len(x), options["num_queries"], -1)
    if cls is SigLIPPooling and options["reduce"] == "all":
        y = y.reshape(len(x), options.get("num_latents", 1), -1)
    if cls in (SimPool, ESimPool) and options.get("gamma") is not None:
        y = y.reshape(len(x), module.num_heads, -1)
    if cls in SQUEEZED:
        y = y.squeeze()
    return {"y": y}
