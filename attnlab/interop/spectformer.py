"""SpectFormer: badripatro/SpectFormers, the vanilla and the hierarchical architecture, whose classes share names."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.contract import Layout, Site
from attnlab.interop.backbones import APART, FUSED
from attnlab.interop.names import Flattened, Part
from attnlab.interop.official import Given, Inputs, Official, Only, on_grid, options
from attnlab.mixers.spectformer import SpectralGating
from attnlab.models.block import Block
from attnlab.models.spectformer import HierarchicalSpectFormer, SpectFormer, SpectralBlock, spectral_block
from attnlab.models.staged import Choice, Place, transformer_block
from attnlab.pooling.cait import ClassAttentionBlock


def _grid(given: Given) -> dict[str, tuple[int, int]]:
    """Rows and columns: as they are given, or a square of so many rows."""
    sides = given.get("spatial_size") or ((given["H"], given["W"]) if "H" in given else (given["h"], given["h"]))
    return {"grid": tuple(sides)}


def _on_its_grid(module: Any, inputs: Inputs, given: Given) -> jax.Array:
    x = inputs["x"]
    return module(x.reshape(x.shape[0], *_grid(given)["grid"], -1)).reshape(x.shape)


def _on_a_square(module: Any, inputs: Inputs, given: Given) -> jax.Array:
    x = inputs["x"]
    side = math.isqrt(x.shape[1])
    return module(x.reshape(x.shape[0], side, side, -1)).reshape(x.shape)


def _class_token(module: ClassAttentionBlock, inputs: Inputs, given: Given) -> jax.Array:
    cls, tokens = inputs["x"][:, :1], inputs["x"][:, 1:]
    return jnp.concatenate([module(cls, tokens)[0], tokens], 1)


def _place(dim: int, heads: int, grid: tuple[int, int] | None, mixer: type) -> Place:
    return Place(Site(dim, heads, Layout.IMAGE, grid=grid), 0, Choice(mixer), 0.0)


def _vanilla(*, dim: int, h: int = 14, w: int = 8, mlp_ratio: float = 4.0, rngs: nnx.Rngs) -> SpectralBlock:
    """The vanilla spectral block, alone; w follows from h there."""
    return spectral_block(_place(dim, 1, (h, h), SpectralGating), mlp_ratio=mlp_ratio, norm_eps=1e-5, rngs=rngs)


def _attention(*, dim: int, h: int = 14, w: int = 8, mlp_ratio: float = 4.0, rngs: nnx.Rngs) -> Block:
    """The vanilla block of attention, alone; it always has six heads."""
    return transformer_block(_place(dim, 6, None, SoftmaxAttention), mlp_ratio=mlp_ratio, norm_eps=1e-5, rngs=rngs)


def _hierarchical(
    *, dim: int, num_heads: int, mlp_ratio: float, block_type: str = "wave", H: int, W: int, rngs: nnx.Rngs
) -> Block:
    """A hierarchical block, alone, on the grid of its call."""
    place = _place(dim, num_heads, (H, W), SoftmaxAttention if block_type == "std_att" else SpectralGating)
    return transformer_block(place, mlp_ratio=mlp_ratio, mlp={"depthwise": 3}, norm_eps=1e-5, rngs=rngs)


def _sides(given: Given) -> dict[str, Any]:
    """The authors' code fixes the grids of gates by their channels: those of images of 224 pixels."""
    return {"image_size": given.get("img_size", 224)}


_GATE = {"filter.weight": "complex_weight"}
_VANILLA = {"mixer.filter.weight": "filter.complex_weight"}
_FUSED, _APART = Official("Attention", SoftmaxAttention, {}, FUSED), Official("Attention", SoftmaxAttention, {}, APART)
_PLAIN = {"mixer": Part("attn", _FUSED)}
_GATED = Official("SpectralGatingNetwork", SpectralGating, {}, _GATE)
_STAGED = {"mixer": Part("attn", _GATED, _APART), "mlp.conv": "mlp.dwconv.dwconv"}
_CLASS = {"attention.query": "attn.q", ("attention.key", "attention.value"): "attn.kv", "attention.out": "attn.proj"}
_MODEL = options(img_size="image_size", in_chans="channels", embed_dim="features", representation_size=Only(None))
_MODEL |= options(norm_layer=None, dropcls=None)


def _vanilla_names(model: SpectFormer) -> dict[Any, Any]:
    def block(index: int) -> Part:
        return Part(f"blocks.{index}", _VANILLA if isinstance(model.blocks[index], SpectralBlock) else _PLAIN)

    names = {"stem.conv": "patch_embed.proj", "stage.0.position.table": Flattened("pos_embed")}
    return names | {"stage.0.blocks.*": block}


def _staged_names(model: HierarchicalSpectFormer) -> dict[Any, Any]:
    names: dict[Any, Any] = {f"stem.parts.{i}.conv": f"patch_embed1.conv.{3 * i}" for i in range(3)}
    names |= {f"stem.parts.{i}.norm": f"patch_embed1.conv.{3 * i + 1}" for i in range(3)}
    names |= {"stem.parts.3.conv": "patch_embed1.proj", "stem.parts.3.norm": "patch_embed1.norm"}
    names |= {"stage.*.down.conv": lambda i: f"patch_embed{i + 1}.proj"}
    names |= {"stage.*.down.norm": lambda i: f"patch_embed{i + 1}.norm"}
    names |= {"stage.*.blocks.*": lambda i, j: Part(f"block{i + 1}.{j}", _STAGED)}
    names |= {"stage.*.norm": lambda i: f"norm{i + 1}", "norm": f"norm{len(model.stage)}"}
    return names | {"pool.blocks.*": Part("post_network.*", _CLASS), "token_head": "aux_head"}


_STAGES = options(embed_dims="features", stem_hidden_dim="stem_features", in_chans="channels")
_STAGES |= options(img_size=_sides, sr_ratios=None, num_stages=None, norm_layer=None)

OFFICIAL = [
    Official(
        "SpectralGatingNetwork",
        SpectralGating,
        {"dim": "features", "h": _grid, "w": None, "spatial_size": None},
        _GATE,
        _on_its_grid,
        {"h": 14},
    ),
    Official(
        "SpectralGatingNetwork",
        SpectralGating,
        {"dim": "features", "H": _grid, "W": None},
        _GATE,
        _on_its_grid,
        when="H",
    ),
    Official("Block", _vanilla, {}, _VANILLA, _on_a_square),
    Official("Block", _hierarchical, {"sr_ratio": None}, _STAGED, on_grid("H", "W"), when="H"),
    Official("Block_attention", _attention, {}, _PLAIN, _on_a_square),
    Official(
        "ClassBlock",
        ClassAttentionBlock,
        {"dim": "features"},
        _CLASS,
        _class_token,
        {},
        {"init": None, "norm_eps": 1e-5},
    ),
    Official("SpectFormer", SpectFormer, _MODEL, _vanilla_names, defaults={"embed_dim": 768}),
    Official(
        "SpectFormer",
        HierarchicalSpectFormer,
        _STAGES,
        _staged_names,
        defaults={"img_size": 224},
        always={"norm_eps": 1e-5},
        when="embed_dims",
    ),
]
