"""DependencyViT: fffffgggg54/pytorch-image-models, branch dependencyvit, an implementation of a third party."""

from typing import Any

import jax
from flax import nnx

from attnlab.attention.dense.dependencyvit import ReversedAttention
from attnlab.interop.names import Flattened, Part
from attnlab.interop.official import Given, Inputs, Official, Only, options
from attnlab.models.dependencyvit import DependencyBlock, DependencyViT


def _eps(given: Given) -> dict[str, Any]:
    """The eps of norms: that of `"LayerNorm eps 1e-6"`, or PyTorch's own."""
    words = str(given["norm_layer"]).split()
    return {"norm_eps": float(words[-1]) if "eps" in words else 1e-5}


def block(features: int, *, num_heads: int, prune: Any = None, rngs: nnx.Rngs, **options: Any) -> DependencyBlock:
    """A block whose pruning is an argument of the call over there."""
    prune = None if prune is None else (float(prune[0]), int(prune[1]))
    return DependencyBlock(features, num_heads=num_heads, prune=prune, **options, rngs=rngs)


def _attend(module: ReversedAttention, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    x, message = inputs["x"], inputs.get("m")
    y, after = module(x, message)
    return {"y": y, "m_out": after, "dependency_mask": module.dependencies(x, message)}


def _through(module: DependencyBlock, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    y, message = module(inputs["x"], inputs.get("m"))
    return {"y": y, "m_out": message}


_SAME = options("num_heads", "qkv_bias", "qk_norm", norm_layer=_eps)
_MIXER: dict[Any, Any] = {("query", "key", "value"): "qkv", "out": "proj", "selector": "head_selector"}
_MIXER |= {"controller": "message_controller", "query_norm": "q_norm", "key_norm": "k_norm"}
_BLOCK = {"mixer": Part("attn", _MIXER), "scale1": "ls1.gamma", "scale2": "ls2.gamma"}
_SIZES = _SAME | options("mlp_ratio", "prune", dim="features", init_values="layer_scale", act_layer=None)
_NET = _SAME | options("depth", "patch_size", "num_classes", "mlp_ratio", "prune_layers", "prune_ratio")
_NET |= options(img_size="image_size", in_chans="channels", embed_dim="features", init_values="layer_scale")
_NET |= options(class_token=Only(False), global_pool=Only("avg"), fc_norm=Only(None, False), act_layer=None)
_NAMES = {"stem.conv": "patch_embed.proj", "stage.0.position.table": Flattened("pos_embed")}
_NAMES |= {"stage.0.blocks.*": Part("blocks.*", _BLOCK)}
_EIGHT = {"num_heads": 8, "norm_layer": "LayerNorm"}

OFFICIAL = [
    Official("ReversedAttention", ReversedAttention, _SAME | options(dim="features"), _MIXER, _attend, _EIGHT),
    Official("DependencyViTBlock", block, _SIZES, _BLOCK, _through, {"norm_layer": "LayerNorm", "init_values": None}),
    Official("DependencyViT", DependencyViT, _NET, _NAMES, defaults={"norm_layer": "LayerNorm eps 1e-6"}),
]
