"""MaxViT: huggingface/pytorch-image-models, which loads the weights of google-research/maxvit too.

model = staged.build_named(MAXVITS, "maxvit_tiny_tf_224", rngs=nnx.Rngs(0))
attnlab.interop.load(model, "maxvit_tiny_tf_224.safetensors")
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention.local.maxvit import PartitionAttention
from attnlab.contract import Layout, Site
from attnlab.interop.names import Interleaved, Mapped, Name, Part, Squeezed, StateDictError
from attnlab.interop.official import ConfigError, Given, Official
from attnlab.models.block import Block
from attnlab.models.maxvit import Bottleneck, Entry, MaxViT, MaxViTRW, attention_of, blocks_of, bottleneck_block
from attnlab.models.staged import Place, Stage, transformer_block
from attnlab.nn.activations import gelu, gelu_tanh, relu, silu
from attnlab.nn.windows import DilatedWindows

Table = dict[Any, Any]
ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu, "swish": silu, "relu": relu}
TRANSFORMER = {
    "dim_head": 32,
    "head_first": True,
    "expand_ratio": 4.0,
    "attn_bias": True,
    "rel_pos_type": "bias",
    "partition_ratio": 32,
    "window_size": None,
    "grid_size": None,
    "no_block_attn": False,
    "init_values": None,
    "act_layer": "gelu",
    "norm_eps": 1e-6,
}
"""Options of timm's attentions and their defaults."""
CONV = {
    "expand_ratio": 4.0,
    "expand_output": True,
    "kernel_size": 3,
    "output_bias": True,
    "stride_mode": "dw",
    "attn_ratio": 0.25,
    "attn_early": False,
    "act_layer": "gelu",
    "norm_eps": None,
    "padding": "",
}
"""Options of timm's bottlenecks and their defaults."""
NET = {"embed_dim": None, "depths": None, "block_type": None, "stem_width": 64, "stem_bias": False}
NET |= {"head_hidden_size": None, "conv_cfg": {}, "transformer_cfg": {}}
"""Options of timm's models and their defaults."""
# What else timm's configurations may say, with the only value that models of MaxViT have; None for any, without effect.
_FIXED: dict[str, Any] = {"pool_type": "avg2", "downsample_pool_type": "avg2", "block_type": "mbconv", "group_size": 1}
_FIXED |= {"pre_norm_act": False, "attn_layer": "se", "attn_act_layer": "silu", "use_nchw_attn": False}
_FIXED |= dict.fromkeys(("attn_drop", "proj_drop", "rel_pos_dim", "expand_first", "shortcut_bias", "init_values"))
_FIXED |= dict.fromkeys(("weight_init", "norm_layer", "norm_layer_cl"))
_STRIDES = {"dw": "convolution", "1x1": "map", "pool": "pool"}


def read(config: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of timm's with its defaults.

    Raises:
      ConfigError: for what it has no counterpart of here.
    """
    for name, value in config.items():
        if name in known:
            continue
        if name not in _FIXED or (_FIXED[name] is not None and value != _FIXED[name]):
            allowed = f"must be {_FIXED[name]!r}" if name in _FIXED else f"is none of {', '.join(known)}"
            raise ConfigError(f"{name} {allowed} here, got {value!r}")
    return {**known, **{name: value for name, value in config.items() if name in known}}


def _activation(name: str) -> Any:
    if name not in ACTIVATIONS:
        raise ConfigError(f"act_layer must be one of {', '.join(ACTIVATIONS)} here, got {name!r}")
    return ACTIVATIONS[name]


def _conv(config: Mapping[str, Any]) -> dict[str, Any]:
    given = read(config, CONV)
    if given["padding"] not in ("", "same") or given["stride_mode"] not in _STRIDES:
        raise ConfigError(f"padding must be '' or 'same' and stride_mode one of {', '.join(_STRIDES)}, got {config}")
    return {
        "expansion": given["expand_ratio"],
        "of_output": given["expand_output"],
        "kernel_size": given["kernel_size"],
        "use_bias": given["output_bias"],
        "squeeze": given["attn_ratio"],
        "squeeze_first": given["attn_early"],
        "stride_at": _STRIDES[given["stride_mode"]],
        "activation": _activation(given["act_layer"]),
        "norm_eps": 1e-5 if given["norm_eps"] is None else given["norm_eps"],
        "same": given["padding"] == "same",
    }


def _attention(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the attentions, and of the feed-forwards and norms around them."""
    given = read(config, TRANSFORMER)
    if given["rel_pos_type"] not in ("bias", "bias_tf", "", None):
        raise ConfigError(f"rel_pos_type must be 'bias', 'bias_tf' or none here, got {given['rel_pos_type']!r}")
    mixer = {"window": given["window_size"], "grid_window": given["grid_size"]}
    mixer |= {"block_attention": not given["no_block_attn"], "relative_bias": bool(given["rel_pos_type"])}
    mixer |= {"qkv_bias": given["attn_bias"], "out_bias": given["attn_bias"]}
    around = {"mlp_ratio": given["expand_ratio"], "layer_scale": given["init_values"], "norm_eps": given["norm_eps"]}
    return mixer, around | {"activation": _activation(given["act_layer"])}


def _parts(dim: int, config: Mapping[str, Any], rngs: nnx.Rngs) -> tuple[list[Place], dict[str, Any]]:
    """Places of the attentions of a block that stands alone, and the options of the parts around."""
    mixer, around = _attention(config)
    mixer["window"] = mixer["grid_window"] if mixer["window"] is None else mixer["window"]
    if mixer["window"] is None:
        raise ConfigError("window_size must be given for blocks that stand alone")
    heads = dim // config.get("dim_head", TRANSFORMER["dim_head"])
    site = Site(dim, heads, Layout.IMAGE)
    places = [Place(site, index, build, 0.0) for index, build in enumerate(attention_of(**mixer))]
    activation = around.pop("activation")
    return places, {
        **around,
        "mlp": {"activation": activation},
        "dtype": None,
        "param_dtype": jnp.float32,
        "rngs": rngs,
    }


def partition_block(dim: int, partition_type: str = "block", cfg: Any = None, *, rngs: nnx.Rngs) -> Block:
    """An attention with its feed-forward, alone."""
    if partition_type not in ("block", "grid"):
        raise ConfigError(f"partition_type must be 'block' or 'grid', got {partition_type!r}")
    places, options = _parts(dim, dict(cfg or {}) | {"no_block_attn": False}, rngs)
    return transformer_block(places[partition_type == "grid"], **options)


class MaxViTBlock(nnx.Module):
    """A bottleneck and both attentions, as a stage."""

    def __init__(
        self, dim: int, dim_out: int, stride: int = 1, conv_cfg: Any = None, transformer_cfg: Any = None, *,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        conv = _conv(conv_cfg or {})
        places, options = _parts(dim_out, transformer_cfg or {}, rngs)
        entered = stride == 2
        if not entered and dim != dim_out:
            raise ConfigError(f"dim_out must be dim with stride 1, got {dim} and {dim_out}")
        blocks = blocks_of(places, conv=conv, per_block=len(places), entered=entered, **options)
        self.stage = Stage(blocks, down=Entry(dim, dim_out, conv=conv, rngs=rngs) if entered else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.stage(self.stage.enter(x))


def entry(in_chs: int, out_chs: int, stride: int = 1, cfg: Any = None, *, rngs: nnx.Rngs) -> Entry:
    """A bottleneck of stride 2, alone."""
    return Entry(in_chs, out_chs, conv=_conv(cfg or {}), rngs=rngs)


def bottleneck(in_chs: int, out_chs: int, stride: int = 1, cfg: Any = None, *, rngs: nnx.Rngs) -> Block:
    """One of stride 1."""
    if in_chs != out_chs:
        raise ConfigError(f"out_chs must be in_chs with stride 1, got {in_chs} and {out_chs}")
    return bottleneck_block(in_chs, conv=_conv(cfg or {}), dtype=None, param_dtype=jnp.float32, rngs=rngs)


# Names

_BRANCH: Table = {"norm": "pre_norm", "expand.conv": "conv1_1x1", "expand.norm": "norm1", "spatial.conv": "conv2_kxk"}
_BRANCH |= {"spatial.norm": "norm2", "late_norm": "norm2", "reduce.conv": "conv3_1x1"}


def _branch(part: Bottleneck, base: str) -> Part:
    gate = "se" if part.late_norm is None else "se_early"
    return Part(base, _BRANCH | {f"gate.{fc}": Squeezed(f"{gate}.{fc}", 2, 3) for fc in ("fc1", "fc2")})


def _entry(part: Entry) -> Table:
    return {"branch": _branch(part.branch, ""), "shortcut.conv": "shortcut.expand"}


def _bias(mixer: PartitionAttention, tensorflow: bool) -> str | Name:
    name = "rel_pos.relative_position_bias_table"
    rows, columns = (2 * side - 1 for side in mixer.windows.size)
    if not tensorflow:
        return name
    # Offsets key - query there, query - key here: the same table, flipped along both axes.
    return Mapped(
        name,
        lambda table: jnp.moveaxis(table[:, ::-1, ::-1], 0, -1).reshape(rows * columns, -1),
        lambda table: jnp.moveaxis(table.reshape(rows, columns, -1), -1, 0)[:, ::-1, ::-1],
    )


def _block(block: Block, head_first: bool, tensorflow: bool) -> Table:
    """Names in a block of attention, or in a bottleneck of stride 1."""
    if block.mixer is None:
        return {"mlp": _branch(block.mlp, "")}
    names: Table = {("query", "key", "value"): Interleaved("qkv") if head_first else "qkv", "out": "proj"}
    if block.mixer.core.bias is not None:
        names["core.bias.table"] = _bias(block.mixer, tensorflow)
    return {"mixer": Part("attn", names), "scale1": "ls1.gamma", "scale2": "ls2.gamma"}


def _stage(stage: Stage, block: Callable[[Block], Table], base: str, numbered: bool) -> Table:
    """Names in a stage, whose blocks are numbered, or in one block that stands alone as one."""
    kinds = ("conv", "attn_block", "attn_grid")
    names: Table = {}
    if stage.down is not None:
        names["down"] = Part(f"{base}0.conv" if numbered else "conv", _entry(stage.down))
    outer, first = 0, stage.down is None
    for index, each in enumerate(stage.blocks):
        if each.mixer is None:
            outer, kind = outer if first else outer + 1, "conv"
            first = False
        else:
            if not isinstance(each.mixer, PartitionAttention):
                raise StateDictError(f"MaxxVit has block and grid attention, here there is {type(each.mixer).__name__}")
            kind = kinds[1 + isinstance(each.mixer.windows, DilatedWindows)]
        names[f"blocks.{index}"] = Part(f"{base}{outer}.{kind}" if numbered else kind, block(each))
    return names


def _alone(module: MaxViTBlock, block: Callable[[Block], Table]) -> Table:
    return {"stage": Part("", _stage(module.stage, block, "", numbered=False))}


def _net(model: MaxViT, block: Callable[[Block], Table]) -> Table:
    names: Table = {"stem.parts.0.conv": "stem.conv1", "stem.parts.0.norm": "stem.norm1"}
    names |= {"stem.parts.1.conv": "stem.conv2", "norm": "norm" if model.norm_first else "head.norm"}
    if hasattr(model.head, "fc1"):
        names |= {"head.fc1": "head.pre_logits.fc", "head.fc2": "head.fc"}
    else:
        names["head"] = "head.fc"
    for index, stage in enumerate(model.stage):
        names[f"stage.{index}"] = Part(f"stages.{index}", _stage(stage, block, "blocks.", numbered=True))
    return names


def _net_options(given: Given) -> dict[str, Any]:
    cfg = read(given["cfg"], NET)
    mixer, around = _attention(cfg["transformer_cfg"])
    if set(cfg["block_type"]) != {"M"}:
        raise ConfigError(f"block_type must be 'M' in all stages, got {cfg['block_type']}")
    ratio = cfg["transformer_cfg"].get("partition_ratio", TRANSFORMER["partition_ratio"])
    if mixer["window"] is None:
        size = given.get("img_size", 224)
        rows, columns = (size, size) if isinstance(size, int) else size
        mixer["window"] = mixer["grid_window"] = (rows // ratio, columns // ratio)
    return (
        mixer
        | around
        | {
            "features": cfg["embed_dim"],
            "depths": cfg["depths"],
            "head_dim": read(cfg["transformer_cfg"], TRANSFORMER)["dim_head"],
            "stem_features": cfg["stem_width"],
            "stem_bias": cfg["stem_bias"],
            "head_features": cfg["head_hidden_size"],
            "conv": _conv(cfg["conv_cfg"]),
        }
    )


def _described(head_first: bool, tensorflow: bool) -> list[Official]:
    """timm's classes with one order of heads and one order of offsets, which state dicts do not tell."""
    block = functools.partial(_block, head_first=head_first, tensorflow=tensorflow)

    def so(config: str | None) -> Callable[[Given], bool]:
        def suits(given: Given) -> bool:
            cfg = given["cfg"].get("transformer_cfg", {}) if config is None else given.get(config) or {}
            cfg = TRANSFORMER | dict(cfg)
            return (cfg["head_first"], cfg["rel_pos_type"] == "bias_tf") == (head_first, tensorflow)

        return suits

    net = {"cfg": _net_options, "img_size": "image_size", "in_chans": "channels", "drop_path_rate": "drop_path"}
    cls = MaxViTRW if head_first else MaxViT
    return [
        Official("PartitionAttentionCl", partition_block, {}, block, when=so("cfg")),
        Official("MaxxVitBlock", MaxViTBlock, {}, functools.partial(_alone, block=block), when=so("transformer_cfg")),
        Official("MaxxVit", cls, net, functools.partial(_net, block=block), when=so(None)),
    ]


OFFICIAL = [
    Official("MbConvBlock", entry, {}, _entry, when=lambda given: given.get("stride", 1) == 2),
    Official(
        "MbConvBlock",
        bottleneck,
        {},
        lambda block: {"mlp": _branch(block.mlp, "")},
        when=lambda given: given.get("stride", 1) == 1,
    ),
    *(each for pair in ((True, False), (True, True), (False, True), (False, False)) for each in _described(*pair)),
]
