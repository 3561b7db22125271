"""Dynamic Perceiver on RegNetY and ResNet: LeapLabTHU/Dynamic_Perceiver, whose trunks are torchvision's and timm's."""

import re
from typing import Any

import jax

from attnlab.attention.cross.dyn_perceiver import CrossLatentLayer, LatentAttention, SelfLatentLayer
from attnlab.interop.names import Part, Squeezed
from attnlab.interop.official import ConfigError, Given, Inputs, Official, Only, options
from attnlab.models.dyn_perceiver import RESNET_DEFAULTS, DynamicPerceiver
from attnlab.models.regnet import REGNETS, RegNetY
from attnlab.models.resnet import RESNETS, ResNet, ResNetBlock, resnet_features


def _on_resnet(given: Given) -> bool:
    return str(given.get("cnn_arch")).lower().startswith("resnet")


def _regnet_trunk(given: Given) -> dict[str, Any]:
    """A trunk by its name, or by its sizes in words: `"RegNet-Y depths 1,1,1,1, stem 8, group width 8, …"`."""
    arch = given["cnn_arch"]
    if arch in REGNETS:
        return {"trunk_options": dict(REGNETS[arch][1])}
    words = {"depths": "depths", "widths": "widths", "stem": "stem_features", "group width": "group_width"}
    numbers = {ours: _numbers(arch, word) for word, ours in (words | {"se": "se_ratio"}).items()}
    whole = {ours: tuple(map(int, found)) for ours, found in numbers.items()}
    sizes: dict[str, Any] = {ours: whole[ours] for ours in ("depths", "widths")}
    sizes |= {ours: whole[ours][0] for ours in ("stem_features", "group_width")}
    return {"trunk_options": sizes | {"se_ratio": numbers["se_ratio"][0]}}


def _resnet_trunk(given: Given) -> dict[str, Any]:
    """A trunk by its name, or by its sizes in words: `"ResNet bottleneck depths 1,1,1,1, multiplier 0.5"`."""
    arch = given["cnn_arch"]
    if arch in RESNETS:
        return {"trunk_options": dict(RESNETS[arch][1])}
    depths, share = (_numbers(arch, word) for word in ("depths", "multiplier"))
    kind = "basic" if "basic" in arch else "bottleneck"
    return {"trunk_options": {"kind": kind, "depths": tuple(map(int, depths)), **resnet_features(share[0])}}


def _numbers(arch: str, word: str) -> list[float]:
    """The numbers behind a word."""
    found = re.search(rf"\b{word} ([\d.]+(?:,[\d.]+)*)", arch)
    if found is None:
        names = ", ".join([*REGNETS, *RESNETS])
        raise ConfigError(f"cnn_arch must be one of {names}, or sizes in words, got {arch!r}")
    return [float(number) for number in found[1].split(",")]


def _attend(module: Any, inputs: Inputs, given: Given) -> jax.Array:
    """Over there a mask is True at keys that are missing."""
    arrays = dict(inputs)
    missing = arrays.pop("pad_mask", None)
    return module(*arrays.values(), mask=None if missing is None else ~missing)


def _exits(model: DynamicPerceiver, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    found = model.exits(inputs["x"])
    return dict(zip(("y_early3", "y_att", "y_cnn", "y_merge"), found, strict=True))


def _places(given: Given) -> dict[str, Any]:
    return {"key_places": given["feat_w"] * given["feat_h"] if given["rpb"] else None}


def _regnet(stem: str, body: str) -> dict[Any, Any]:
    table: dict[Any, Any] = {"stem.conv": f"{stem}.0", "stem.norm": f"{stem}.1"}
    return table | {"stage.*.blocks.*": lambda i, j: Part(f"{body}.block{i + 1}.block{i + 1}-{j}", _UNIT)}


def _resnet(conv: str, norm: str, stage: str) -> dict[Any, Any]:
    table: dict[Any, Any] = {"stem.parts.0.conv": conv, "stem.parts.0.norm": norm}
    return table | {"stage.*.blocks.*": lambda i, j: Part(f"{stage}{i + 1}.{j}", _RESIDUAL)}


def _model_names(model: DynamicPerceiver) -> dict[Any, Any]:
    on_resnet = isinstance(model.stage[0].trunk.blocks[0], ResNetBlock)
    trunk = _resnet("cnn_stem.0", "cnn_stem.1", "cnn_body_stage") if on_resnet else _regnet("cnn_stem", "cnn_body")
    table = {path.replace("*.blocks", "*.trunk.blocks"): name for path, name in trunk.items()}
    table["stage.*.latents.*"] = lambda i, j: Part(f"self_att{i + 1}.{j}", _SELF)
    table["stage.*.read"] = lambda i: Part(f"cross_att{i + 1}_x2z", _CROSS)
    table["stage.*.written"] = lambda i: Part(f"cross_att{i + 1}_z2x", _CROSS)
    table["stage.*.conv"] = lambda i: f"dwc{i + 1}_x2z"
    for part, name in {"token_norm": "mixer.*.0", "token_map": "mixer.*.1"}.items():
        table[f"stage.*.halving.{part}"] = lambda i, name=name: f"token_{name}".replace("*", str(i - 1))
    for part, name in {"norm": "expander.*.0", "map": "expander.*.1"}.items():
        table[f"stage.*.halving.{part}"] = lambda i, name=name: f"token_{name}".replace("*", str(i - 1))
    table["last_written"] = Part("last_cross_att_z2x", _CROSS)
    table |= {"early_head": "early_classifier3", "latent_head": "classifier_att", "cnn_head": "classifier_cnn"}
    table |= {"merge_norm": "classifier_merge.0", "merge_head": "classifier_merge.1"}
    return table | {"told_map.*": lambda i: f"isc{i + 3}.0", "told_norm.*": lambda i: f"isc{i + 3}.1"}


_HEADS = {f"attention.{ours}": theirs for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))}
_HEADS |= {"attention.out": "o_proj", "places": Squeezed("relative_position_bias", 0)}
_FED = {"mlp_norm": "mlp.layernorm", "mlp": "mlp"}
_CROSS = _FED | {"query_norm": "cross_attn.q_norm", "key_norm": "cross_attn.kv_norm"}
_CROSS |= {"attention": Part("cross_attn.attention", _HEADS)}
_SELF = _FED | {"norm": "self_attn.norm", "attention": Part("self_attn.attention", _HEADS)}
_UNIT = {f"{part}.{ours}": f"f.{part}.{i}" for part in "abc" for i, ours in enumerate(("conv", "norm"))}
_UNIT |= {"shortcut.conv": "proj.0", "shortcut.norm": "proj.1"}
_RESIDUAL: dict[Any, Any] = {"shortcut.conv": "downsample.0", "shortcut.norm": "downsample.1"}
_RESIDUAL |= {"convs.*.conv": lambda i: f"conv{i + 1}", "convs.*.norm": lambda i: f"bn{i + 1}"}
_UNIT |= {f"se.fc{i}": Squeezed(f"f.se.fc{i}", 2, 3) for i in (1, 2)}
_INNER = options("num_heads", num_qk_channels="qk_features", num_v_channels="value_features")
_SOURCES = options(num_q_input_channels="features", num_kv_input_channels="key_features")
_ATTENTION = _INNER | _SOURCES | options(rpb=_places, feat_w=None, feat_h=None)
_LAYER = options("attention_residual", widening_factor="widening")
_NET = options("num_latents", "num_classes", "with_x2z", "with_z2x", "with_dwc", "with_last_CA", "with_isc")
_NET |= options(num_SA_heads="num_heads", depth_factor="depth_factors", SA_widening_factor="widening")
_NET |= options(spatial_reduction=Only(True), num_latent_channels=Only(None), activation_checkpointing=None)
_NET |= options(input_size=None, output_dir=None)
_TREE = _regnet("stem", "trunk_output") | {"head": "fc"}
_BLOCK = options("stride", inplanes="in_features", planes="hidden_features")
_NO_PLACES = {"rpb": False, "feat_w": 32, "feat_h": 32}

OFFICIAL = [
    Official(
        "MultiHeadAttention",
        LatentAttention,
        _ATTENTION | options(num_output_channels="out_features"),
        _HEADS,
        _attend,
        _NO_PLACES,
    ),
    Official("CrossAttentionLayer", CrossLatentLayer, _ATTENTION | _LAYER, _CROSS, _attend, _NO_PLACES),
    Official(
        "SelfAttentionLayer",
        SelfLatentLayer,
        _INNER | options(num_channels="features", widening_factor="widening"),
        _SELF,
        _attend,
    ),
    Official(
        "DynPerceiver",
        DynamicPerceiver,
        _NET | options(cnn_arch=_regnet_trunk),
        _model_names,
        _exits,
        {"cnn_arch": "regnet_y_400mf"},
    ),
    Official(
        "DynPerceiver",
        DynamicPerceiver,
        _NET | options(cnn_arch=_resnet_trunk, exit=Only(-1)),
        _model_names,
        _exits,
        {"depth_factor": RESNET_DEFAULTS["depth_factors"], "SA_widening_factor": RESNET_DEFAULTS["widening"]},
        {"trunk": ResNet},
        _on_resnet,
    ),
    Official("RegNet", RegNetY, names=_TREE),
    Official("BasicBlock", ResNetBlock, _BLOCK, _RESIDUAL, always={"kind": "basic"}),
    Official("Bottleneck", ResNetBlock, _BLOCK, _RESIDUAL, always={"kind": "bottleneck"}),
    Official("ResNet", ResNet, names=_resnet("conv1", "bn1", "layer") | {"head": "fc"}),
]
