"""CrossFormer and CrossFormer++: cheerss/CrossFormer.

model = staged.build_named(CROSSFORMERS, "crossformer_small", rngs=nnx.Rngs(0))
attnlab.interop.load(model, "crossformer-s.pth", key="model")
"""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from attnlab.attention.local.crossformer import DynamicPositionBias
from attnlab.contract import Layout, Site
from attnlab.interop.names import Part
from attnlab.interop.official import ConfigError, Given, Inputs, Official, Only, on_grid, options, pair
from attnlab.models.block import Block
from attnlab.models.crossformer import CrossFormer, CrossScaleEmbedding, block_at, in_turn
from attnlab.models.staged import Place

TYPES = ("constant", "linear", "linear_div", "alter", "7_14")


def block(
    features: int,
    *,
    num_heads: int,
    group: int = 7,
    interval: int | None = 8,
    long: bool = False,
    mlp_ratio: float = 4.0,
    convolved: bool = True,
    hide_padding: bool = True,
    centred: bool = False,
    scale: float | None = None,
    qkv_bias: bool = True,
    rngs: nnx.Rngs,
) -> Block:
    """A block, alone."""
    own = in_turn([group], interval=interval, long=long, hide_padding=hide_padding, centred=centred, scale=scale)
    place = Place(Site(features, num_heads, Layout.IMAGE), 0, own, 0.0)
    return block_at(place, mlp_ratio=mlp_ratio, convolved=convolved, shared={"qkv_bias": qkv_bias}, rngs=rngs)


def group_sizes(kind: str, sizes: list[int], depths: list[int], side: int) -> list[list[int]]:
    """Group sizes of all blocks, of a side of `side` tokens in the first stage.

    All but "constant" let a group's share of the image's side grow with the layer, linearly from 4 tokens to the whole
    ("linear"), of shares above a half only the half and the whole being left, as a threshold ("linear_div") or the
    parity of the layer ("alter") decides in the third stage; or halve the first four of the third stage ("7_14").
    """
    if kind not in TYPES:
        raise ConfigError(f"group_type must be one of {', '.join(TYPES)}, got {kind!r}")
    least = 4 / side
    shares, result, layer = np.arange(least, 1.0, (1 - least) / sum(depths)), [], 0
    for stage, depth in enumerate(depths):
        here, now = [], side // 2**stage
        for index in range(depth):
            size = sizes[stage]
            if kind == "7_14" and stage == 2 and index < 4:
                size //= 2
            elif kind not in ("constant", "7_14"):
                exact = now * shares[layer]
                whole = stage != 2 or (exact > now * 3 / 4 if kind == "linear_div" else layer % 2 != 0)
                if kind != "linear" and exact > now // 2:
                    exact = now if whole else now // 2
                size = max(4, math.ceil(exact))
            here.append(size)
            layer += 1
        result.append(here)
    return result


def _tokens(module: nnx.Module, x: jax.Array) -> jax.Array:
    y = module(x)
    return y.reshape(y.shape[0], -1, y.shape[-1])


def _embed(module: CrossScaleEmbedding, inputs: Inputs, given: Given) -> jax.Array:
    return _tokens(module, inputs["x"])


def _merge(module: CrossScaleEmbedding, inputs: Inputs, given: Given) -> jax.Array:
    x = inputs["x"]
    return _tokens(module, x.reshape(x.shape[0], *given["input_resolution"], x.shape[-1]))


def _interval(given: Given) -> dict[str, Any]:
    return {"interval": None if given.get("adaptive_interval", False) else given.get("interval", 8)}


def _intervals(given: Given) -> dict[str, Any]:
    steps = given["crs_interval"]
    return {"interval": [None] * len(given["depths"]) if given.get("adaptive_interval", False) else steps}


def _groups(given: Given) -> dict[str, Any]:
    side = pair(given["img_size"])[0] // given["patch_size"][0]
    return {"group": group_sizes(given["group_type"], list(given["group_size"]), list(given["depths"]), side)}


def _merges(given: Given) -> dict[str, Any]:
    return {"merge_sizes": given["merge_size"][: len(given["depths"]) - 1]}


_PADDING = {
    "pad_type": lambda given: {"centred": given["pad_type"] != 0},
    "no_mask": lambda given: {"hide_padding": not given["no_mask"]},
    "use_cpe": Only(False),
}
_NORM = {"norm_layer": lambda given: {"norm": None} if given["norm_layer"] is None else {}}
_BIAS: dict[Any, Any] = {"project": "pos_proj", "last": "pos3.2"}
_BIAS |= {"norm.*": lambda i: f"pos{i + 1}.0", "map.*": lambda i: f"pos{i + 1}.2"}
_MIXER = {("query", "key", "value"): "qkv", "out": "proj", "core.bias.network": Part("pos", _BIAS)}
_BLOCK = {"mixer": Part("attn", _MIXER), "after.conv": "ex_conv", "after.norm": "ex_ln"}
_ALONE = options("num_heads", "mlp_ratio", "qkv_bias", dim="features", qk_scale="scale", group_size="group")
_ALONE |= options(
    interval=_interval, adaptive_interval=_interval, lsda_flag=lambda given: {"long": given["lsda_flag"] == 1}
)
_ALONE |= options(use_extra_conv="convolved", input_resolution=None, num_patch_size=None, **_PADDING)
_NET = options("num_classes", "depths", "num_heads", "mlp_ratio", "qkv_bias", img_size="image_size", qk_scale="scale")
_NET |= options(patch_size="patch_sizes", in_chans="channels", embed_dim="features", drop_path_rate="drop_path")
_NET |= options(merge_size=_merges, group_size=_groups, group_type=_groups, crs_interval=_intervals)
_NET |= options(adaptive_interval=_intervals, use_acl="convolved", use_checkpoint=None, **_PADDING)
_NET |= options(ape=Only(False), patch_norm=Only(True))
_GIVEN = {"img_size": 224, "patch_size": [4], "depths": [2, 2, 6, 2], "group_size": [7] * 4, "group_type": "constant"}
_GIVEN |= {"crs_interval": [8, 4, 2, 1], "merge_size": [[2]] * 3}

OFFICIAL = [
    Official(
        "DynamicPosBias",
        DynamicPositionBias,
        {"dim": lambda given: {"features": given["dim"] // 4}},
        _BIAS,
        defaults={"residual": False},
    ),
    Official("CrossFormerBlock", block, _ALONE, _BLOCK, on_grid("input_resolution")),
    Official(
        "PatchEmbed",
        CrossScaleEmbedding,
        options(
            img_size=None,
            in_chans="in_features",
            embed_dim="features",
            patch_size=lambda given: {"kernel_sizes": given["patch_size"], "stride": given["patch_size"][0]},
            **_NORM,
        ),
        {"convs": "projs"},
        _embed,
        {"img_size": 224, "patch_size": [4], "in_chans": 3, "embed_dim": 96, "norm_layer": None},
    ),
    Official(
        "PatchMerging",
        CrossScaleEmbedding,
        options(
            input_resolution=None,
            num_input_patch_size=None,
            norm_layer=None,
            dim=lambda given: {"in_features": given["dim"], "features": 2 * given["dim"]},
            patch_size="kernel_sizes",
        ),
        {"convs": "reductions"},
        _merge,
        {"patch_size": [2]},
        {"stride": 2, "norm_first": True},
    ),
    Official(
        "CrossFormer",
        CrossFormer,
        _NET,
        {
            "stem": Part("patch_embed", {"convs": "projs"}),
            "stage.*.down": lambda i: Part(f"layers.{i - 1}.downsample", {"convs": "reductions"}),
            "stage.*.blocks.*": Part("layers.*.blocks.*", _BLOCK),
        },
        defaults=_GIVEN,
    ),
]
