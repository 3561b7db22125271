"""What LeapLabTHU/Agent-Attention and LeapLabTHU/InLine share: PVT, Swin, CSwin and DeiT, as both keep them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from attnlab.attention.dense.spatial_reduction_attention import SpatialReductionAttention
from attnlab.attention.local.cross_shaped_windows import CrossShapedWindowAttention, StripeAttention, softmax_core
from attnlab.contract import Layout, Site
from attnlab.interop.names import Flattened, Part, Squeezed
from attnlab.interop.official import Call, ConfigError, Given, Inputs, Official, on_grid, options, pair, plain
from attnlab.models.block import Block
from attnlab.models.staged import Place, transformer_block
from attnlab.models.swin import swin_window
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.heads import merge_heads, split_heads

Table = dict[Any, Any]


def windowed(given: Given) -> dict[str, Any]:
    """One window, or what a block of Swin makes of its window, shift and grid, as the authors' code clips them."""
    grid = pair(given.get("input_resolution", given["window_size"]))
    window, shift = given["window_size"], given.get("shift_size", 0)
    if "input_resolution" in given and min(grid) <= window:
        window, shift = swin_window(grid, window, 0)
    return {"grid": grid, "window": pair(window), "shift": shift}


TABLES = ("attn_mask", "relative_position_index")  # the authors' modules store them; they are computed here
FUSED: Table = {("query", "key", "value"): "qkv", "out": "proj"}
APART: Table = {"query": "q", ("key", "value"): "kv", "out": "proj"}
REDUCED: Table = {"reduce.conv": "sr", "reduce.norm": "norm"}
HEADS = options("num_heads", "qkv_bias", dim="features", qk_scale="scale")
EIGHT = {"num_heads": 8, "qkv_bias": False}
WINDOWED = {"window_size": windowed, "input_resolution": None, "shift_size": None}
SIDES = options(sr_ratio="reduction", H=None, W=None)
_BIASED = FUSED | {"core.bias.table": "relative_position_bias_table"}
_PVT, _SWIN, _BLOCK = on_grid("H", "W"), on_grid("window_size"), on_grid("input_resolution")
WINDOW = Official("WindowAttention", "window_attention", HEADS | WINDOWED, _BIASED, _SWIN, ignore=TABLES)
PLAIN = Official("Attention", "softmax_attention", HEADS, FUSED, plain, EIGHT)
_CONFIG, _NAMES = HEADS | SIDES, APART | REDUCED
REDUCING = Official("Attention", SpatialReductionAttention, _CONFIG, _NAMES, _PVT, EIGHT, when="H")


# The attention of CSwin, which its block has inside, and its branches, on projected tokens (3, B, N, C)


def _window(given: Given) -> dict[str, Any]:
    side, split = given["resolution"], given["split_size"]
    return {"window": {-1: (side, side), 0: (side, split), 1: (split, side)}[given["idx"]]}


def on_stripes(branch: StripeAttention, arrays: Sequence[jax.Array], given: Given) -> jax.Array:
    """A branch on queries, keys, values, and what else its core is given."""
    q, k, v, *extra = (split_heads(array, given["num_heads"]) for array in arrays)
    return merge_heads(branch(Heads(q, k, v, tuple(extra)), pair(given["resolution"])))


def _on_stripes(branch: StripeAttention, inputs: Inputs, given: Given) -> jax.Array:
    return on_stripes(branch, [*inputs["qkv"], *([inputs["x_mean"]] if "x_mean" in inputs else [])], given)


def stripe(symbol: str, core: Table, names: Table, **defaults: Any) -> Official:
    """A branch: official options that make its core, and the names in it."""
    config = options(dim="features", dim_out=None, idx=None, split_size=None, resolution=_window) | core
    defaults = {"num_heads": 8, "split_size": 7, "qk_scale": None} | defaults
    names = {"position": "get_v"} | names
    return Official(symbol, StripeAttention, config, names, _on_stripes, defaults, when="resolution")


def cross(core: Table, names: Table, cls: Any = CrossShapedWindowAttention, **defaults: Any) -> Official:
    """The attention with such branches."""
    sizes = {"split_size": "split", "last_stage": "whole", "reso": lambda given: {"grid": pair(given["reso"])}}
    names = FUSED | {"branches.*": Part("attns.*", {"position": "get_v"} | names)}
    names |= {"norm": "norm1"} if getattr(cls, "norms_its_input", False) else {}
    return Official("CSWinBlock", cls, HEADS | sizes | core, names, plain, defaults | {"qkv_bias": False})


SOFTMAX_CORE: Table = {"qk_scale": lambda given: {"core": functools.partial(softmax_core, scale=given["qk_scale"])}}
CROSS = cross(SOFTMAX_CORE, {}, qk_scale=None)
SOFTMAX = [REDUCING, PLAIN, WINDOW, stripe("LePEAttention", SOFTMAX_CORE, {})]


def block(symbol: str, call: Call, kinds: Mapping[str, Official], base: str = "attn", **more: Any) -> Official:
    """A pre-norm block around one of several official attentions, by their letters; the first is the default.

    It hands each those of the official arguments that are described for it.
    """
    known = {name for kind in kinds.values() for name in kind.config}

    def build(*, mlp_ratio: float = 4.0, attn_type: str = next(iter(kinds)), rngs: nnx.Rngs, **config: Any) -> Block:
        if attn_type not in kinds or config.keys() - known:
            raise ConfigError(f"{symbol} has no option {sorted(config.keys() - known)} or no attn_type {attn_type!r}")
        kind = kinds[attn_type]
        mixer = kind.build({name: value for name, value in config.items() if name in kind.config}, rngs=rngs)
        place = Place(Site(config["dim"], 1, Layout.IMAGE), 0, lambda *site, **shared: mixer, 0.0)
        return transformer_block(place, mlp_ratio=mlp_ratio, norm_eps=1e-5, rngs=rngs)

    return Official(symbol, build, {}, {"mixer": Part(base, *kinds.values())}, call, ignore=TABLES, **more)


def blocks(letters: str, pvt: Official, swin: Official, cswin: Official) -> list[Official]:
    """The blocks of all families but DeiT's, with new attentions or the families' own, by the letters of the two."""
    new, own = letters
    return [
        block("Block", plain, {own: PLAIN}),
        block("Block", _PVT, {new: pvt, own: REDUCING}, when="H"),
        block("SwinTransformerBlock", _BLOCK, {new: swin, own: WINDOW}, defaults={"window_size": 7, "shift_size": 0}),
        block("CSWinBlock", on_grid("reso"), {new: cswin, own: CROSS}, ""),
    ]


# Models


def model(family: str, symbol: str, cls: str, config: Table, mixer: Official, **defaults: Any) -> Official:
    """A model of a family with a mixer beside its own, and with further official options."""
    own, options, names, place, given = FAMILIES[family]
    names = names | {"stage.*.blocks.*.mixer": lambda i, j: Part(place(i, j), mixer, own)}
    always = {"norm_eps": 1e-5} if family == "pvt" else {}
    return Official(symbol, cls, options | config, names, plain, given | defaults, always, ignore=TABLES)


def stages_of(given: Given) -> int:
    """The number of stages."""
    return len(given["depth" if "depth" in given else "depths"][: given.get("num_stages")])


def replaced(default: str) -> Callable[[Given], dict[str, Any]]:
    """How many of the first blocks of each stage have the new attention, from the official letters.

    A letter for each stage: `A` or `I` for the new attention, `B` or `S` for the family's, `M` for as many of the first
    as the number behind the letters says; this means nothing unless a stage is mixed.
    """

    def count(given: Given) -> dict[str, Any]:
        types, stages = given["attn_type"] or default, stages_of(given)
        mixed = int(types[stages:]) if "M" in types[:stages] else None
        return {"replaced": [{"M": mixed, "A": None, "I": None, "B": 0, "S": 0}[kind] for kind in types[:stages]]}

    return count


def windows(name: str) -> Table:
    """The windows of the new attention, whose option here has that name, and of Swin's own."""
    return {"window_size": lambda given: {name: given["window_size"], "window": max(7, given["window_size"] // 8)}}


def _stages(given: Given) -> dict[str, Any]:
    return {ours: list(given[theirs])[: given["num_stages"]] for theirs, ours in _STAGES.items()}


_STAGES = {"embed_dims": "features", "sr_ratios": "reductions"} | {n: n for n in ("num_heads", "mlp_ratios", "depths")}
_MODEL = options(img_size="image_size", in_chans="channels", embed_dim="features")
_MODEL |= dict.fromkeys(("use_checkpoint", "use_chk", "hybrid_backbone"))
_SCALED = _MODEL | {"qk_scale": "scale"}
_PVT_MODEL = _SCALED | dict.fromkeys(_STAGES) | {"num_stages": _stages}
_PVT_NAMES = {"stem.conv": "patch_embed1.proj", "stem.norm": "patch_embed1.norm"}
_PVT_NAMES |= {"stage.*.down.conv": lambda i: f"patch_embed{i + 1}.proj"}
_PVT_NAMES |= {"stage.*.down.norm": lambda i: f"patch_embed{i + 1}.norm"}
_PVT_NAMES |= {"stage.*.position.table": lambda i: Flattened(f"pos_embed{i + 1}")}
_PVT_NAMES |= {"stage.*.blocks": lambda i: f"block{i + 1}"}
_PVT_GIVEN = {"num_stages": 4, "patch_size": 16, "qkv_bias": False, "attn_type": None, "mlp_ratios": [4, 4, 4, 4]}
_PVT_GIVEN |= {"embed_dims": [64, 128, 256, 512], "num_heads": [1, 2, 4, 8], "depths": [3, 4, 6, 3]}
_PVT_GIVEN |= {"sr_ratios": [8, 4, 2, 1]}
_SWIN_MODEL = _SCALED | {"ape": "position_table"}
_SWIN_NAMES = {"stem.conv": "patch_embed.proj", "stem.norm": "patch_embed.norm", "stage.*.blocks": "layers.*.blocks"}
_SWIN_NAMES |= {"stage.*.down": lambda i: f"layers.{i - 1}.downsample"}
_SWIN_NAMES |= {"stage.0.position.table": Flattened("absolute_pos_embed")}
_SWIN_GIVEN = {"depths": [2, 2, 6, 2], "window_size": 7, "attn_type": None}
_CSWIN_MODEL = _SCALED | options(depth="depths", split_size="splits", patch_size=None)
_CSWIN_NAMES = {"stem.conv": "stage1_conv_embed.0", "stem.norm": "stage1_conv_embed.2"}
_CSWIN_NAMES |= {"stage.*.down": "merge*", "stage.*.blocks": lambda i: f"stage{i + 1}"}
_CSWIN_GIVEN = {"embed_dim": 96, "depth": [2, 2, 6, 2], "split_size": [1, 2, 7, 7], "attn_type": None}
_DEIT_NAMES = {"stem.conv": "patch_embed.proj", "stage.0.blocks": "blocks"}
_DEIT_NAMES |= {"stage.0.prefix.tokens": Squeezed("cls_token", 0), "stage.0.position.table": Squeezed("pos_embed", 0)}
_DEIT_GIVEN = {"embed_dim": 768, "num_heads": 12, "depth": 12}
# Its own attention, options, names around the mixers and of them, official defaults.
FAMILIES: dict[str, tuple[Official, Table, Table, Callable[[int, int], str], dict[str, Any]]] = {
    "pvt": (REDUCING, _PVT_MODEL, _PVT_NAMES, lambda i, j: f"block{i + 1}.{j}.attn", _PVT_GIVEN),
    "swin": (WINDOW, _SWIN_MODEL, _SWIN_NAMES, lambda i, j: f"layers.{i}.blocks.{j}.attn", _SWIN_GIVEN),
    "cswin": (CROSS, _CSWIN_MODEL, _CSWIN_NAMES, lambda i, j: f"stage{i + 1}.{j}", _CSWIN_GIVEN),
    "deit": (PLAIN, _MODEL, _DEIT_NAMES, lambda i, j: f"blocks.{j}.attn", _DEIT_GIVEN),
}
