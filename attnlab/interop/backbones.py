"""What LeapLabTHU/Agent-Attention and LeapLabTHU/InLine share: PVT, Swin, CSwin and DeiT, as both keep them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.attention.dense.spatial_reduction_attention import SpatialReductionAttention
from attnlab.attention.local.cross_shaped_windows import CrossShapedWindowAttention, StripeAttention, softmax_core
from attnlab.attention.local.window_attention import WindowAttention
from attnlab.contract import Layout, Site
from attnlab.interop.names import Flattened, Part, Squeezed
from attnlab.interop.official import Call, ConfigError, Official, Option, options, plain
from attnlab.models.block import Block
from attnlab.models.staged import Place, StagedBackbone, pair, transformer_block
from attnlab.models.swin import swin_window
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.heads import merge_heads, split_heads

Given = Mapping[str, Any]
Inputs = dict[str, jax.Array]
Options = dict[str, Option]
Table = dict[Any, Any]

RATES: Options = dict.fromkeys(("drop", "attn_drop", "proj_drop", "drop_path", "drop_rate", "attn_drop_rate"))
RATES |= dict.fromkeys(("drop_path_rate", "use_checkpoint", "use_chk"))
"""Official arguments that do nothing at inference."""
TABLES = ("attn_mask", "relative_position_index")
"""Tables that the authors' modules store and that are computed here."""
FUSED: Table = {("query", "key", "value"): "qkv", "out": "proj"}
APART: Table = {"query": "q", ("key", "value"): "kv", "out": "proj"}
REDUCED: Table = {"reduce.conv": "sr", "reduce.norm": "norm"}
HEADS = RATES | options("num_heads", "qkv_bias", dim="features", qk_scale="scale")
EIGHT = {"num_heads": 8, "qkv_bias": False}


def on_grid(*names: str) -> Call:
    """The official module takes tokens (B, N, C) of a grid, whose sides, or whose one side, these arguments give."""

    def call(module: nnx.Module, inputs: Inputs, given: Given) -> jax.Array:
        x, sides = inputs["x"], [given[name] for name in names]
        grid = sides if len(sides) == 2 else pair(sides[0])
        return module(x.reshape(x.shape[0], *grid, x.shape[-1])).reshape(x.shape)

    return call


def windowed(given: Given) -> dict[str, Any]:
    """One window, or what a block of Swin makes of its window, shift and grid, as the authors' code clips them."""
    if "input_resolution" not in given:
        return {"grid": pair(given["window_size"]), "window": pair(given["window_size"]), "shift": 0}
    grid, window, shift = pair(given["input_resolution"]), given["window_size"], given["shift_size"]
    if min(grid) <= window:
        window, shift = swin_window(grid, window, 0)
    return {"grid": grid, "window": window, "shift": shift}


WINDOWED: Options = {"window_size": windowed, "input_resolution": None, "shift_size": None}
SPATIAL_REDUCTION = Official(
    "Attention",
    SpatialReductionAttention,
    HEADS | options(sr_ratio="reduction", H=None, W=None),
    APART | REDUCED,
    on_grid("H", "W"),
    defaults=EIGHT,
    when=lambda given: "H" in given,
)
PLAIN = Official("Attention", SoftmaxAttention, HEADS, FUSED, defaults=EIGHT, when=lambda given: "H" not in given)
WINDOW = Official(
    "WindowAttention",
    WindowAttention,
    HEADS | WINDOWED,
    FUSED | {"core.bias.table": "relative_position_bias_table"},
    on_grid("window_size"),
    ignore=TABLES,
)


# The attention of CSwin, which its block has inside, and its branches, on projected tokens (3, B, N, C)


def _stripe(given: Given) -> dict[str, Any]:
    side, split = given["resolution"], given["split_size"]
    return {"window": {-1: (side, side), 0: (side, split), 1: (split, side)}[given["idx"]]}


def _on_stripes(branch: StripeAttention, inputs: Inputs, given: Given) -> jax.Array:
    arrays = [*inputs["qkv"], *([inputs["x_mean"]] if "x_mean" in inputs else [])]
    q, k, v, *extra = (split_heads(array, given["num_heads"]) for array in arrays)
    return merge_heads(branch(Heads(q, k, v, tuple(extra)), pair(given["resolution"])))


def stripe(symbol: str, core: Options, names: Table, **defaults: Any) -> Official:
    """A branch: official options that make its core, and the names in it."""
    sizes = options("num_heads", dim="features", dim_out=None, idx=None, split_size=None, resolution=_stripe)
    defaults = {"num_heads": 8, "split_size": 7, "qk_scale": None} | defaults
    when, names = (lambda given: "resolution" in given), {"position": "get_v"} | names
    return Official(symbol, StripeAttention, RATES | sizes | core, names, _on_stripes, defaults=defaults, when=when)


def cross(core: Options, names: Table, cls: Any = CrossShapedWindowAttention, **defaults: Any) -> Official:
    """The attention with such branches."""
    sizes = {"split_size": "split", "last_stage": "whole", "reso": lambda given: {"grid": pair(given["reso"])}}
    names = FUSED | {"branches.*": Part("attns.*", {"position": "get_v"} | names)}
    names |= {"norm": "norm1"} if getattr(cls, "norms_its_input", False) else {}
    return Official("CSWinBlock", cls, HEADS | sizes | core, names, defaults=defaults | {"qkv_bias": False})


SOFTMAX_CORE: Options = {"qk_scale": lambda given: {"core": functools.partial(softmax_core, scale=given["qk_scale"])}}
CROSS = cross(SOFTMAX_CORE, {}, qk_scale=None)
SOFTMAX = [SPATIAL_REDUCTION, PLAIN, WINDOW, stripe("LePEAttention", SOFTMAX_CORE, {})]


def block(
    symbol: str, call: Call = plain, base: str = "attn", when: Any = None, defaults: Any = None, **kinds: Official
):
    """A pre-norm block around one of several official attentions, by their letters; the first is the default.

    It takes the arguments of all, and hands each those that it knows.
    """
    known = {name for kind in kinds.values() for name in kind.config}

    def build(*, mlp_ratio: float = 4.0, attn_type: str = next(iter(kinds)), rngs: nnx.Rngs, **config: Any) -> Block:
        if attn_type not in kinds or config.keys() - known:
            raise ConfigError(f"{symbol} has no option {sorted(config.keys() - known)} or no attn_type {attn_type!r}")
        kind = kinds[attn_type]
        mixer = kind.build({name: value for name, value in config.items() if name in kind.config}, rngs=rngs)
        place = Place(Site(config["dim"], 1, Layout.IMAGE), 0, lambda *site, **shared: mixer, 0.0)
        return transformer_block(place, mlp_ratio=mlp_ratio, norm_eps=1e-5, rngs=rngs)

    names = {"mixer": Part(base, *kinds.values())}
    return Official(symbol, build, None, names, call, defaults=defaults or {}, when=when, ignore=TABLES)


def blocks(deit: str, new: str, old: str, attention: Mapping[str, Official], call: Call = plain) -> list[Official]:
    """The blocks of all families, with a `new` attention for each of them in place of the `old` one."""

    def kinds(family: str, own: Official) -> dict[str, Official]:
        return {new: attention[family], old: own}

    swin = {"window_size": 7, "shift_size": 0}
    return [
        block("SwinTransformerBlock", on_grid("input_resolution"), defaults=swin, **kinds("swin", WINDOW)),
        block("Block", on_grid("H", "W"), when=SPATIAL_REDUCTION.when, **kinds("pvt", SPATIAL_REDUCTION)),
        block("Block", when=PLAIN.when, S=PLAIN),
        block("CSWinBlock", on_grid("reso"), "", **kinds("cswin", CROSS)),
        block(deit, call, **{new: attention["deit"]}),
    ]


# Models


def replaced(default: str, depths: str = "depths") -> Callable[[Given], dict[str, Any]]:
    """How many of the first blocks of each stage have the new attention, from the official letters.

    A letter for each stage: `A` or `I` for the new attention, `B` or `S` for the family's, `M` for as many of the first
    as the number behind the letters says; this means nothing unless a stage is mixed.
    """

    def count(given: Given) -> dict[str, Any]:
        types, stages = given["attn_type"] or default, len(given[depths][: given.get("num_stages")])
        mixed = int(types[stages:]) if "M" in types[:stages] else None
        return {"replaced": [{"M": mixed, "A": None, "I": None, "B": 0, "S": 0}[kind] for kind in types[:stages]]}

    return count


_IMAGES = RATES | options("num_classes", "patch_size", img_size="image_size", in_chans="channels")
_SIZES = _IMAGES | options("num_heads", "mlp_ratio", "qkv_bias", embed_dim="features")
_STAGES = {"embed_dims": "features", "sr_ratios": "reductions"} | {n: n for n in ("num_heads", "mlp_ratios", "depths")}


def _pvt_stages(given: Given) -> dict[str, Any]:
    return {ours: list(given[theirs])[: given["num_stages"]] for theirs, ours in _STAGES.items()}


def pvt(cls: type[StagedBackbone], config: Options, *mixers: Official, **defaults: Any) -> Official:
    """PVT with these mixers beside its own."""
    stages = {"num_stages": 4, "embed_dims": [64, 128, 256, 512], "num_heads": [1, 2, 4, 8], "mlp_ratios": [4] * 4}
    stages |= {"depths": [3, 4, 6, 3], "sr_ratios": [8, 4, 2, 1], "patch_size": 16, "qkv_bias": False}
    return Official(
        "PyramidVisionTransformer",
        cls,
        _IMAGES | options("qkv_bias", qk_scale="scale", num_stages=_pvt_stages) | dict.fromkeys(_STAGES) | config,
        {
            "stem.conv": "patch_embed1.proj",
            "stem.norm": "patch_embed1.norm",
            "stage.*.down.conv": lambda i: f"patch_embed{i + 1}.proj",
            "stage.*.down.norm": lambda i: f"patch_embed{i + 1}.norm",
            "stage.*.position.table": lambda i: Flattened(f"pos_embed{i + 1}"),
            "stage.*.blocks": lambda i: f"block{i + 1}",
            "stage.*.blocks.*.mixer": lambda i, j: Part(f"block{i + 1}.{j}.attn", *mixers, SPATIAL_REDUCTION),
        },
        defaults=stages | {"attn_type": None} | defaults,
        always={"norm_eps": 1e-5},
    )


def swin(symbol: str, cls: type[StagedBackbone], config: Options, window: str, *mixers: Official, **defaults: Any):
    """Swin with these mixers beside its own, in windows of which our option is called `window`."""
    windows = {"window_size": lambda given: {window: given["window_size"], "window": max(7, given["window_size"] // 8)}}
    return Official(
        symbol,
        cls,
        _SIZES | options("depths", "patch_norm", qk_scale="scale", ape="position_table") | windows | config,
        {
            "stem.conv": "patch_embed.proj",
            "stem.norm": "patch_embed.norm",
            "stage.0.position.table": Flattened("absolute_pos_embed"),
            "stage.*.blocks": "layers.*.blocks",
            "stage.*.blocks.*.mixer": Part("layers.*.blocks.*.attn", *mixers, WINDOW),
            "stage.*.down": lambda i: f"layers.{i - 1}.downsample",
        },
        defaults={"depths": [2, 2, 6, 2], "window_size": 7, "attn_type": None} | defaults,
        ignore=TABLES,
    )


def cswin(cls: type[StagedBackbone], config: Options, *mixers: Official, **defaults: Any) -> Official:
    """CSwin with these mixers beside its own; some of its arguments are stored or ignored there."""
    sizes = options(depth="depths", split_size="splits", qk_scale="scale", patch_size=None, hybrid_backbone=None)
    return Official(
        "CSWinTransformer",
        cls,
        _SIZES | sizes | config,
        {
            "stem.conv": "stage1_conv_embed.0",
            "stem.norm": "stage1_conv_embed.2",
            "stage.*.down": "merge*",
            "stage.*.blocks": lambda i: f"stage{i + 1}",
            "stage.*.blocks.*.mixer": lambda i, j: Part(f"stage{i + 1}.{j}", *mixers, CROSS),
        },
        defaults={"embed_dim": 96, "depth": [2, 2, 6, 2], "split_size": [1, 2, 7, 7], "attn_type": None} | defaults,
    )


def deit(cls: type[StagedBackbone], config: Options, *mixers: Official, **defaults: Any) -> Official:
    """DeiT with these mixers beside its own."""
    return Official(
        "VisionTransformer",
        cls,
        _SIZES | {"depth": "depth"} | config,
        {
            "stem.conv": "patch_embed.proj",
            "stage.0.prefix.tokens": Squeezed("cls_token", 0),
            "stage.0.position.table": Squeezed("pos_embed", 0),
            "stage.0.blocks": "blocks",
            "stage.0.blocks.*.mixer": Part("blocks.*.attn", *mixers, PLAIN),
        },
        defaults={"embed_dim": 768, "num_heads": 12, "depth": 12} | defaults,
    )
