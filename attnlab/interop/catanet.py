"""CATANet: EquationWalker/CATANet, basicsr/archs/catanet_arch.py."""

from typing import Any

from attnlab.attention.sparse.catanet import IntraGroupAttention
from attnlab.interop.names import Part, Squeezed
from attnlab.interop.official import Given, Inputs, Official, options
from attnlab.models.catanet import CATANet, OverlappingPatchBlock, TokenAggregationBlock

_QKV = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "proj"}
_FEED_FORWARD = {"conv": "dwconv.depthwise_conv.0"}
_GROUPS: dict[Any, Any] = {
    "centres": "means",
    "ready": "initted",
    "attention": Part("iasa_attn", _QKV),
    "centre_key": "irca_attn.to_k",
    "centre_value": "irca_attn.to_v",
    "proj": Squeezed("conv1x1", 2, 3),
    "mlp_norm": "mlp.norm",
    "mlp": Part("mlp.fn", _FEED_FORWARD),
}
_PATCHES: dict[Any, Any] = {
    "norm": "layer.0.norm",
    "attention": Part("layer.0.fn", _QKV),
    "mlp_norm": "layer.1.norm",
    "mlp": Part("layer.1.fn", _FEED_FORWARD),
}
_HEADS = options(dim="features", qk_dim="qk_features", heads="num_heads")
_SIZES = _HEADS | options(mlp_dim="mlp_features")


def _in_order(module: IntraGroupAttention, inputs: Inputs, given: Given) -> Any:
    return module(inputs["x"], inputs["idx_last"][..., 0], inputs["k_global"], inputs["v_global"])


def _with_centres(module: TokenAggregationBlock, inputs: Inputs, given: Given) -> dict[str, Any]:
    training = given.get("training", False)
    y = module(inputs["x"], deterministic=not training)
    return {"y": y, "means_after": module.centres[...]} if training else {"y": y}


def _setting(given: Given) -> dict[str, Any]:
    names = {"dim": "features", "qk_dim": "qk_features", "mlp_dim": "mlp_features", "heads": "num_heads"}
    setting = dict(given["setting"])
    blocks = setting.pop("block_num", len(setting["patch_size"]))
    return {names.get(name, name): value for name, value in setting.items()} | {
        "patch_size": tuple(setting["patch_size"][:blocks])
    }


def _net_names(model: CATANet) -> dict[str, Any]:
    upward = {"finer.0": "upconv"} if len(model.finer) == 1 else {"finer.*": lambda i: f"upconv{i + 1}"}
    return upward | {
        "enter": "first_conv",
        "blocks.*.groups": Part("blocks.*.0", _GROUPS),
        "blocks.*.patches": Part("blocks.*.1", _PATCHES),
        "blocks.*.conv": "mid_convs.*",
        "leave": "last_conv",
    }


OFFICIAL = [
    Official("IASA", IntraGroupAttention, _HEADS | options("group_size"), _QKV, call=_in_order),
    Official(
        "TAB",
        TokenAggregationBlock,
        _SIZES
        | options("group_size", n_iter="iterations", num_tokens="num_centres", ema_decay="decay")
        | options(training=None, initted=None),
        _GROUPS,
        call=_with_centres,
    ),
    Official("LRSA", OverlappingPatchBlock, _SIZES | options(ps="patch_size"), _PATCHES, defaults={"heads": 1}),
    Official(
        "CATANet",
        CATANet,
        options("upscale", "group_size", n_iters="iterations", num_tokens="num_centres", in_chans="channels")
        | options(setting=_setting),
        _net_names,
    ),
]
