"""OverLoCK: LMMMEng/OverLoCK, models/overlock.py and models/contmix.py."""

from typing import Any

import jax.numpy as jnp

from attnlab.interop.names import Mapped, Part, Squeezed
from attnlab.interop.official import Given, Inputs, Official, Only, options
from attnlab.models.overlock import ContMixBlock, DynamicConvBlock, OverLoCK, RepConvBlock
from attnlab.nn.reparam import BRANCHES, DilatedReparamConv

_NORM: dict[Any, Any] = {
    ours: Mapped(theirs, jnp.ravel, lambda a: a.reshape(1, -1, 1, 1))
    for ours, theirs in (("scale", "gamma"), ("bias", "beta"))
}


def _large(side: int) -> dict[Any, Any]:
    names: dict[Any, Any] = {"large.conv": "lk_origin", "large.norm": "origin_bn"}
    for index, (k, r) in enumerate(BRANCHES[side]):
        names |= {f"branches.{index}.conv": f"dil_conv_k{k}_{r}", f"branches.{index}.norm": f"dil_bn_k{k}_{r}"}
    return names


def _reparam(module: DilatedReparamConv) -> dict[Any, Any]:
    names = _large(module.kernel_size)
    return {key: value for key, value in names.items() if not (module.merged and key.startswith("branches"))}


def _mlp(ours: str, base: str, first: int) -> dict[Any, Any]:
    return {
        f"{ours}.fc1": Squeezed(f"{base}.{first}", 2, 3),
        f"{ours}.conv": f"{base}.{first + 2}",
        f"{ours}.norm": Part(f"{base}.{first + 3}", _NORM),
        f"{ours}.fc2": Squeezed(f"{base}.{first + 4}", 2, 3),
    }


def _excite(ours: str, base: str) -> dict[Any, Any]:
    return {f"{ours}.fc1": Squeezed(f"{base}.proj.1", 2, 3), f"{ours}.fc2": Squeezed(f"{base}.proj.3", 2, 3)}


def _static(block: RepConvBlock) -> dict[Any, Any]:
    return {
        "conv": "dwconv",
        "norm": "proj.0",
        "large": Part("proj.1", _reparam(block.large)),
        "large_norm": "proj.2",
        **_excite("excite", "proj.3"),
        **_mlp("mlp", "proj", 4),
        "add.scale": "ls",
    }


def _kernels(ours: str) -> dict[Any, Any]:
    return {
        f"{ours}.query.conv": "weight_query.0",
        f"{ours}.query.norm": "weight_query.1",
        f"{ours}.key.conv": "weight_key.1",
        f"{ours}.key.norm": "weight_key.2",
        f"{ours}.taps": Squeezed("weight_proj", 2, 3),
        f"{ours}.small_bias": "rpb1",
        f"{ours}.large_bias": "rpb2",
    }


def _around(block: ContMixBlock | DynamicConvBlock) -> dict[Any, Any]:
    return {
        "conv1": "dwconv1",
        "conv2": "dwconv2",
        "around.gate.conv": "gate.0",
        "around.gate.norm": "gate.1",
        "around.large": Part("lepe.0", _reparam(block.around.large)),
        "around.large_norm": "lepe.1",
        "around.norm": "proj.0",
        "around.out": Squeezed("proj.1", 2, 3),
        **_excite("around.excite", "se_layer"),
        **_mlp("mlp", "mlp", 0),
        "add1.scale": "ls1",
        "add2.scale": "ls2",
    }


def _plugin(block: ContMixBlock) -> dict[Any, Any]:
    return {
        **_around(block),
        **_kernels("mixer.kernels"),
        "mixer.value.conv": "weight_value.0",
        "mixer.value.norm": "weight_value.1",
        "mixer.out.conv": "fusion_proj.0",
        "mixer.out.norm": "fusion_proj.1",
    }


def _dynamic(block: DynamicConvBlock) -> dict[Any, Any]:
    return {
        **_around(block),
        **_kernels("kernels"),
        "own_scale": "x_scale",
        "overview_scale": "h_scale",
        "fuse.conv": "fusion.0",
        "fuse.norm": "fusion.1",
        "fuse_out": Squeezed("fusion.3", 2, 3),
        "fuse_norm": Part("fusion.4", _NORM),
        "proj.conv": "dyconv_proj.0",
        "proj.norm": "dyconv_proj.1",
    }


def _net(model: OverLoCK) -> dict[Any, Any]:
    names: dict[Any, Any] = {
        "stem.parts.*.conv": lambda i: f"patch_embed1.{3 * i}",
        "stem.parts.*.norm": lambda i: f"patch_embed1.{3 * i + 1}",
        "downs.*.conv": lambda i: f"patch_embed{i + 2}.0",
        "downs.*.norm": lambda i: f"patch_embed{i + 2}.1",
        "overview": Squeezed("high_level_proj", 2, 3),
        "focus_down.conv": "patch_embedx.x_proj.0",
        "focus_down.norm": "patch_embedx.x_proj.1",
        "context_down.conv": "patch_embedx.h_proj.0",
        "context_down.norm": "patch_embedx.h_proj.1",
        "proj.conv": "head.0",
        "proj.norm": "head.1",
        "head": Squeezed("head.4", 2, 3),
        "aux_norm": "aux_head.0",
        "aux_head": Squeezed("aux_head.2", 2, 3),
    }
    for stage, blocks in enumerate(model.base):
        for index, block in enumerate(blocks):
            names[f"base.{stage}.{index}"] = Part(f"blocks{stage + 1}.{index}", _static(block))
    for turn, blocks in enumerate(model.focus):
        for index, block in enumerate(blocks):
            names[f"focus.{turn}.{index}"] = Part(f"sub_blocks{turn + 3}.{index}", _dynamic(block))
    return names


def _carried(block: DynamicConvBlock, inputs: Inputs, given: Given) -> dict[str, Any]:
    found = block(inputs["x"], inputs["h_x"], inputs["h_r"])
    return {"x": found} if block.is_last else dict(zip(("x", "h_x"), found, strict=True))


_COMMON = options("kernel_size", "mlp_ratio", "res_scale", "drop_path", dim="features", ls_init_value="scale")
_COMMON |= options(deploy="merged", use_gemm=None, use_checkpoint=None, norm_layer=Only(None, "LayerNorm2d"))
_MIXING = _COMMON | options("num_heads", smk_size="small_size")
_NET = options("kernel_size", "mlp_ratio", "res_scale", "num_classes", "projection", depth="depths")
_NET |= options(embed_dim="features", sub_depth="focus_depths", sub_mlp_ratio="focus_mlp_ratio", in_chans="channels")
_NET |= options(sub_num_heads="num_heads", smk_size="small_size", ls_init_value="layer_scale", use_ds="auxiliary")
_NET |= options(deploy="merged", use_gemm=None, use_checkpoint=None, norm_layer=Only(None, "LayerNorm2d"))
_NET |= options(drop_rate=None, drop_path_rate="drop_path")
_OF_NET = {
    "depth": (2, 2, 2, 2),
    "sub_depth": (4, 2),
    "embed_dim": (96, 192, 384, 768),
    "kernel_size": (7, 7, 7, 7),
    "sub_mlp_ratio": (4, 4),
}

OFFICIAL = [
    Official(
        "DilatedReparamBlock",
        DilatedReparamConv,
        options("kernel_size", channels="features", deploy="merged", use_sync_bn=None, attempt_use_lk_impl=None),
        _reparam,
    ),
    Official("RepConvBlock", RepConvBlock, _COMMON, _static),
    Official("ContMixBlock", ContMixBlock, _MIXING, _plugin),
    Official(
        "DynamicConvBlock",
        DynamicConvBlock,
        _MIXING | options("is_first", "is_last", ctx_dim="context_features", pool_size=Only(7)),
        _dynamic,
        call=_carried,
        defaults={"dim": 64, "ctx_dim": 32},
    ),
    Official("OverLoCK", OverLoCK, _NET, _net, defaults=_OF_NET),
]
