"""L2ViT: ChuanyangZheng/L2ViT.

model = staged.build_named(L2VITS, "l2vit_tiny", rngs=nnx.Rngs(0))
attnlab.interop.load(model, "l2vit_tiny.pth", key="model")
"""

from typing import Any

from flax import nnx

from attnlab.attention.linear.l2vit import ClampedLinearAttention
from attnlab.attention.local.window_attention import WindowAttention
from attnlab.contract import Layout, Site
from attnlab.interop.names import Name, Part, Squeezed
from attnlab.interop.official import ConfigError, Given, Official, Only, on_grid, options, pair, same_as
from attnlab.models.block import Block
from attnlab.models.l2vit import L2ViT, LocalConcentration, attention_of, options_of
from attnlab.models.staged import Place, transformer_block

_KINDS = {"local": ("local",), "enhanced_vit": ("global",), "mix_local_enhanced_vit": ("local", "global")}


def block(
    features: int,
    *,
    kind: str,
    num_heads: int,
    window: int = 7,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    enhanced: bool = False,
    position_activation: bool = False,
    rngs: nnx.Rngs,
) -> Block:
    """A block of L2ViT, alone."""
    place = Place(Site(features, num_heads, Layout.IMAGE), 0, attention_of(kind, window), 0.0)
    given = options_of(kind, enhanced=enhanced, position_activation=position_activation)
    return transformer_block(place, mlp_ratio=mlp_ratio, shared={"qkv_bias": qkv_bias}, **given, rngs=rngs)


def _mlp_ratio(given: Given) -> dict[str, float]:
    return {"mlp_ratio": given.get("mlp_ratio", 4.0) if given.get("ffn", True) else 0.0}


def _kinds(given: Given) -> dict[str, Any]:
    if given["block_type"] not in _KINDS:
        raise ConfigError(f"block_type must be one of {', '.join(_KINDS)}, got {given['block_type']!r}")
    return {"kinds": _KINDS[given["block_type"]]}


def _entry(given: Given) -> dict[str, str]:
    if not given.get("conv_stem", False):
        return {"entry": "overlapping patches" if given.get("stem_overlapped", False) else "patches"}
    kinds = {"2L": "convolutions", "4L": "four convolutions"}
    if (kind := given.get("conv_stem_type", "2L")) not in kinds:
        raise ConfigError(f"conv_stem_type must be one of {', '.join(kinds)}, got {kind!r}")
    return {"entry": kinds[kind]}


def _last(given: Given) -> dict[str, int | None]:
    return {"last_features": 1280 if given["last_proj"] else None}


def _names(model: L2ViT) -> dict[str, Any]:
    def one(stage: int, index: int) -> Part:
        local = isinstance(model.stage[stage].blocks[index].mixer, WindowAttention)
        return Part(f"stages.{stage}.{index}", _LOCAL if local else _GLOBAL)

    stem, names = "downsample_layers.0", {"stage.*.blocks.*": one, "stage.*.down.conv": "downsample_layers.*.proj"}
    first, *between, _ = model.stem.parts
    if hasattr(first, "parts"):
        for index in range(len(first.parts)):
            names[f"stem.parts.0.parts.{index}.conv"] = f"{stem}.proj.proj.{3 * index}"
            names[f"stem.parts.0.parts.{index}.norm"] = f"{stem}.proj.proj.{3 * index + 1}"
        if between:
            names["stem.parts.1.conv"] = f"{stem}.proj.proj.9"
    else:
        names["stem.parts.0.conv"] = f"{stem}.proj"
    names[f"stem.parts.{1 + len(between)}"] = f"{stem}.norm"
    names["stage.*.down.norm"] = "downsample_layers.*.norm"
    if hasattr(model.norm, "parts"):
        names |= {"norm.parts.0": "norm", "norm.parts.1.conv": _LAST}
    return names


_ATTENTION = {("query", "key", "value"): "qkv", "out": "proj"}
_GLOBAL = {"before": "cpe.0.proj", "before2.parts.0": "norm3", "before2.parts.1": Part("local_mp", {"norm": "bn"})}
_LOCAL = {"before": "cpe.0.proj", "before2": "cpe.1.proj", "mixer": Part("attn", _ATTENTION)}
_GLOBAL |= {"mixer": Part("attn", _ATTENTION | {"temperature": Squeezed("temperature", 1, 2)})}
_LAST = Name("last_proj", there=lambda weight: weight[..., 0])
_ALONE = options(
    "num_heads", "qkv_bias", "enhanced", dim="features", window_size="window", cpe_act="position_activation"
)
_ALONE |= {"mlp_ratio": _mlp_ratio, "ffn": _mlp_ratio}
_WINDOW = options("num_heads", "qkv_bias", dim="features")
_WINDOW |= {"window_size": lambda given: {"window": pair(given["window_size"])}}
_UNUSED = ("cpe", "sub_cpe", "cpe_kernel", "ffn_conv", "rffn_conv", "token_mixer", "channel_mixer")
_NET = dict.fromkeys((*_UNUSED, "layer_scale_init_value", "head_init_scale"))
_NET |= options("num_classes", "mlp_ratio", "depths", "num_heads", in_chans="channels", dims="features")
_NET |= options(cpe_act="position_activation", window_size="window", overlapped="overlapping")
_NET |= {"block_type": _kinds, "last_proj": _last, "norm": Only({"type": "LN"})}
_NET |= dict.fromkeys(("conv_stem", "conv_stem_type", "stem_overlapped"), _entry)

OFFICIAL = [
    Official(
        "LinearAttention",
        ClampedLinearAttention,
        options("num_heads", "qkv_bias", dim="features", qk_scale=None),
        _ATTENTION | {"temperature": Squeezed("temperature", 1, 2)},
        defaults={"num_heads": 8},
    ),
    Official(
        "WindowAttention",
        WindowAttention,
        _WINDOW,
        _ATTENTION,
        on_grid("window_size"),
        always={"relative_bias": False, "shift": 0},
    ),
    Official(
        "LCM",
        LocalConcentration,
        options("kernel_size", in_features="features", hidden_features=None)
        | {"out_features": same_as("out_features", "in_features"), "size": None},
        {"norm": "bn"},
        on_grid("size"),
    ),
    Official("LGABlock", block, _ALONE | {"size": None}, _GLOBAL, on_grid("size"), always={"kind": "global"}),
    Official(
        "LWABlock", block, _ALONE | {"size": None, "enhanced": None}, _LOCAL, on_grid("size"), always={"kind": "local"}
    ),
    Official("L2ViT", L2ViT, _NET, _names, defaults={"conv_stem": False}, always={"image_size": None}),
]
