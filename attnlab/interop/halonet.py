"""HaloNet: huggingface/pytorch-image-models.

model = staged.build_named(HALONETS, "halonet26t", rngs=nnx.Rngs(0))
attnlab.interop.load(model, "halonet26t.safetensors")
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from attnlab.attention.local.halonet import HaloAttention, HaloDownsampling
from attnlab.interop.names import Name, Part, Squeezed, StateDictError
from attnlab.interop.official import ConfigError, Given, Official, Only, options
from attnlab.models.halonet import Bottleneck, HaloNet
from attnlab.nn.activations import relu, silu

Table = dict[Any, Any]
ACTIVATIONS = {"relu": relu, "silu": silu, "swish": silu}
_KINDS = {"self_attn": "attention", "bottle": "convolution"}
_ATTENTION = options("num_heads", "qk_ratio", "qkv_bias", dim="features", dim_head="head_dim", feat_size=None)
_ATTENTION |= options(block_size="block", halo_size="halo", scale_pos_embed="scale_positions")
_INSIDE = {name: ours for name, ours in _ATTENTION.items() if name not in ("dim", "feat_size")}
_INSIDE |= {"avg_down": "averaged"}
_MIXER: Table = {
    "query": Squeezed("q", 2, 3),
    ("key", "value"): Name("kv", interleaved=True, there=lambda kernel: jnp.expand_dims(kernel, (2, 3))),
    "rows": "pos_embed.height_rel",
    "columns": "pos_embed.width_rel",
}


def _kept(given: Given) -> bool:
    return given.get("stride", 1) == 1 and given.get("dim_out") in (None, given["dim"])


def _branch(branch: Bottleneck) -> Table:
    names: Table = {"after.norm": "post_attn"}
    for ours, theirs in (("reduce", "conv1_1x1"), ("expand", "conv3_1x1")):
        names |= {f"{ours}.conv": f"{theirs}.conv", f"{ours}.norm": f"{theirs}.bn"}
    if branch.after is None:
        return names | {"inner.conv": "conv2_kxk.conv", "inner.norm": "conv2_kxk.bn"}
    if not isinstance(branch.inner, HaloAttention | HaloDownsampling):
        raise StateDictError(f"ByobNet has halo attention here, got a {type(branch.inner).__name__}")
    return names | {"inner": Part("self_attn", _MIXER)}


def _net(model: HaloNet) -> Table:
    names: Table = {"head": "head.fc"}
    for index in range(len(model.stem.parts) - 1):
        names |= {f"stem.parts.{index}.{ours}": f"stem.conv{index + 1}.{theirs}" for ours, theirs in _UNIT}
    for number, stage in enumerate(model.stage):
        base, first = f"stages.{number}", 0
        if stage.down is not None:
            names[f"stage.{number}.down.branch"] = Part(f"{base}.0", _branch(stage.down.branch))
            for ours, theirs in _UNIT:
                names[f"stage.{number}.down.shortcut.{ours}"] = f"{base}.0.shortcut.{theirs}"
            first = 1
        for index, block in enumerate(stage.blocks):
            names[f"stage.{number}.blocks.{index}.mixer"] = Part(f"{base}.{first + index}", _branch(block.mixer))
    return names


_UNIT = (("conv", "conv"), ("norm", "bn"))


def _inside(given: Mapping[str, Any] | None) -> dict[str, Any]:
    given = dict(given or {})
    if unknown := set(given) - set(_INSIDE):
        raise ConfigError(f"self_attn_kwargs must be some of {', '.join(_INSIDE)}, got {sorted(unknown)}")
    return {_INSIDE[name]: value for name, value in given.items()}


def _blocks(given: Given) -> dict[str, Any]:
    """Stages of the description of blocks, each a dictionary for all of a stage, or a list of them."""
    stages: dict[str, list[Any]] = {
        name: [] for name in ("features", "depths", "strides", "kinds", "ratio", "attention")
    }
    groups = set()
    for stage in given["blocks"]:
        parts = [stage] if isinstance(stage, Mapping) else list(stage)
        if any(unknown := set(part) - _FIELDS for part in parts):
            raise ConfigError(f"blocks must be described by {', '.join(sorted(_FIELDS))}, got {sorted(unknown)}")
        kinds = [part["type"] for part in parts for _ in range(part["d"])]
        first = {"gs": None, "br": 1.0, "s": 2, **parts[0]}
        same = ("c", "br", "gs", "self_attn_kwargs")
        if any({"br": 1.0, "gs": None, **part}.get(name) != first.get(name) for part in parts for name in same):
            raise ConfigError(f"the blocks of a stage must have the same {', '.join(same)} here, got {stage}")
        if set(kinds) - set(_KINDS):
            raise ConfigError(f"type must be one of {', '.join(_KINDS)} here, got {kinds}")
        groups.add(first["gs"] or 0)
        inside = first.get("self_attn_kwargs")
        values = (first["c"], len(kinds), first["s"], [_KINDS[kind] for kind in kinds], first["br"])
        values += (_inside(given.get("self_attn_kwargs") if inside is None else inside),)
        for name, value in zip(stages, values, strict=True):
            stages[name].append(value)
    if len(groups) > 1:
        raise ConfigError(f"gs must be the same in all stages here, got {sorted(groups)}")
    return stages | {"group_size": groups.pop()}


_FIELDS = {"type", "d", "c", "s", "gs", "br", "self_attn_layer", "self_attn_kwargs"}


def _activation(given: Given) -> dict[str, Any]:
    if given["act_layer"] not in ACTIVATIONS:
        raise ConfigError(f"act_layer must be one of {', '.join(ACTIVATIONS)} here, got {given['act_layer']!r}")
    return {"activation": ACTIVATIONS[given["act_layer"]]}


OFFICIAL = [
    Official(
        "HaloAttn",
        HaloAttention,
        _ATTENTION | options(dim_out=None, stride=None, avg_down=None),
        _MIXER,
        when=_kept,
    ),
    Official(
        "HaloAttn",
        HaloDownsampling,
        _ATTENTION | options("stride", dim_out="out_features", avg_down="averaged"),
        _MIXER,
        defaults={"stride": 1},
        when=lambda given: not _kept(given),
    ),
    Official(
        "ByobNet",
        HaloNet,
        options(
            "num_classes",
            blocks=_blocks,
            self_attn_kwargs=None,
            self_attn_layer=Only("halo"),
            stem_chs="stem_features",
            stem_type="stem",
            stem_pool=Only("maxpool"),
            in_chans="channels",
            act_layer=_activation,
            downsample=Only("conv1x1"),
            attn_layer=Only(None),
            num_features=Only(0),
            drop_path_rate="drop_path",
            fixed_input_size=None,
            zero_init_last=None,
            img_size="image_size",
        ),
        _net,
        defaults={"stem_chs": 32, "stem_type": "3x3"},
        always={"image_size": None},
    ),
]
