"""CrossViT: timm's port of IBM/CrossViT.

model = staged.build_named(CROSSVITS, "crossvit_18_dagger_408", rngs=nnx.Rngs(0))
attnlab.interop.load(model, "crossvit_18_dagger_408.safetensors")
"""

from typing import Any

import jax

from attnlab.attention.cross.class_fusion import ClassCrossAttention, ClassFusion
from attnlab.interop.backbones import FUSED
from attnlab.interop.names import Part, Squeezed
from attnlab.interop.official import Given, Inputs, Official, Only, options
from attnlab.models.crossvit import CrossViT, MultiScaleBlock
from attnlab.nn.chain import Chain


def _names(block: MultiScaleBlock) -> dict[Any, Any]:
    def fusion(branch: int, index: int) -> Part:
        return Part(f"fusion.{branch}.{index}" if block.fusion_depth else f"fusion.{branch}", _FUSION)

    table = {"branches.*.blocks": "blocks.*", "branches.*.blocks.*.mixer": Part("blocks.*.*.attn", FUSED)}
    table |= {"go.*.norm": "projs.*.0", "go.*.linear": "projs.*.2", "fusions.*.*": fusion}
    return table | {"back.*.norm": "revert_projs.*.0", "back.*.linear": "revert_projs.*.2"}


def _net_names(model: CrossViT) -> dict[Any, Any]:
    blocks = {f"scale.{i}": Part(f"blocks.{i}", _names(block)) for i, block in enumerate(model.scale)}
    names = {"prefix.*.tokens": lambda b: Squeezed(f"cls_token_{b}", 0)}
    names |= {"position.*.table": lambda b: Squeezed(f"pos_embed_{b}", 0)}
    if isinstance(model.stem[0], Chain):
        names |= {"stem.*.parts.*.conv": lambda b, i: f"patch_embed.{b}.proj.{2 * i}"}
    else:
        names |= {"stem.*.conv": "patch_embed.*.proj"}
    return blocks | names


def _blocks(block: MultiScaleBlock, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    return {f"y{branch}": y for branch, y in enumerate(block([*inputs.values()]))}


def _depths(given: Given) -> dict[str, Any]:
    return {"depths": given["depth"][:-1], "fusion_depth": given["depth"][-1]}


def _ratios(given: Given) -> dict[str, Any]:
    return {"mlp_ratios": given["mlp_ratio"][:-1]}


_MIXER = {"attention.query": "wq", "attention.key": "wk", "attention.value": "wv", "attention.out": "proj"}
_FUSION = {"norm": "norm1", "mixer": Part("attn", _MIXER)}
_ATTENTION = options("num_heads", "qkv_bias", dim="features", qk_scale="scale")
_MODULES = dict.fromkeys(("norm_layer", "act_layer"))
_NET = options("num_heads", "qkv_bias", "multi_conv", "num_classes", img_size="image_size", img_scale="image_scales")
_NET |= options(patch_size="patch_sizes", embed_dim="features", in_chans="channels", crop_scale="crop")
_NET |= options(depth="depths", mlp_ratio=_ratios, global_pool=Only("token"), **_MODULES)
_GIVEN = {"patch_size": (8, 16), "embed_dim": (192, 384), "depth": ((1, 3, 1),) * 3, "num_heads": (6, 12)}
_GIVEN |= {"mlp_ratio": (2.0, 2.0, 4.0), "img_size": 224, "img_scale": (1.0, 1.0)}
_ALONE, _EIGHT = {"qkv_bias": False}, {"qkv_bias": False, "num_heads": 8}
_EPS = {"norm_eps": 1e-5}

OFFICIAL = [
    Official("CrossAttention", ClassCrossAttention, _ATTENTION, _MIXER, defaults=_EIGHT),
    Official(
        "CrossAttentionBlock",
        ClassFusion,
        _ATTENTION | {"mlp_ratio": None} | _MODULES,
        _FUSION,
        defaults=_ALONE,
        always=_EPS,
    ),
    Official(
        "MultiScaleBlock",
        MultiScaleBlock,
        options("num_heads", "qkv_bias", dim="features", patches=None, depth=_depths, mlp_ratio=_ratios, **_MODULES),
        _names,
        _blocks,
        _ALONE,
        _EPS,
    ),
    Official("CrossVit", CrossViT, _NET, _net_names, defaults=_GIVEN),
]
