"""PPMA: zhongchenzhao/PPMA.

model = staged.build_named(PPMAS, "ppma_tiny", rngs=nnx.Rngs(0))
attnlab.interop.load(model, "ppma_tiny.pth", key="model")
"""

from typing import Any

import jax
from flax import nnx

from attnlab.attention.dense.ppma import (
    PolylineDecays,
    PolylinePathAttention,
    SeparablePolylineAttention,
    polyline_mask,
)
from attnlab.contract import Layout, Site
from attnlab.interop.names import Mapped, Part, Squeezed
from attnlab.interop.official import Given, Inputs, Official, Only, options
from attnlab.models.block import Block
from attnlab.models.ppma import ATTENTIONS, BLOCK, PPMAViT
from attnlab.models.staged import Place, transformer_block
from attnlab.nn.heads import split_heads

_KINDS = {"chunk": "separable", "whole": "whole"}


def block(
    features: int, *, retention: str, num_heads: int, ffn_dim: int, layer_scale: float | None = None, rngs: nnx.Rngs
) -> Block:
    """A block of PPMAViT, alone."""
    place = Place(Site(features, num_heads, Layout.IMAGE), 0, ATTENTIONS[_KINDS[retention]], 0.0)
    ratio = (ffn_dim + 0.5) / features  # rounded down to ffn_dim
    return transformer_block(place, mlp_ratio=ratio, layer_scale=layer_scale, **BLOCK, rngs=rngs)


def _mask(decays: PolylineDecays, inputs: Inputs, given: Given) -> jax.Array:
    return polyline_mask(*decays(split_heads(inputs["x"], given["nheads"])))


def _image(module: Any, inputs: Inputs, given: Given) -> jax.Array:
    return module(inputs["x"])


def _head_dim(given: Given) -> dict[str, int]:
    return {"head_dim": given["embed_dim"] // given["nheads"], "num_heads": given["nheads"]}


def _scale(given: Given) -> dict[str, Any]:
    return {"layer_scale": given["layer_init_values"] if given["layerscale"] else None}


def _scales(given: Given) -> dict[str, Any]:
    return {"layer_scales": [given["layer_init_values"] if there else None for there in given["layerscales"]]}


def _kinds(given: Given) -> dict[str, Any]:
    return {"kinds": ["separable" if chunk else "whole" for chunk in given["chunkwise_recurrents"]]}


_DECAYS = {"map": "dt_linear", "bias": "dt_bias", "log_rate": "A_log"}
_MIXER: dict[Any, Any] = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "local": "lepe.conv",
    "out": "out_proj",
}
_MIXER |= {"decays": Part("path_embed", _DECAYS)}
_BLOCK: dict[Any, Any] = {"before": "pos.conv", "norm1": "retention_layer_norm", "norm2": "final_layer_norm"}
_BLOCK |= {"mixer": Part("retention", _MIXER), "mlp": Part("ffn", {"conv": "dwconv.conv"})}
_BLOCK |= {f"scale{branch}": Squeezed(f"gamma_{branch}", 0, 1, 2) for branch in (1, 2)}
_TREE: dict[Any, Any] = {f"stem.parts.{i}.conv": f"patch_embed.proj.{3 * i}" for i in range(4)}
_TREE |= {f"stem.parts.{i}.norm": f"patch_embed.proj.{3 * i + 1}" for i in range(4)}
_TREE |= {"stage.*.down.conv": lambda i: f"layers.{i - 1}.downsample.reduction"}
_TREE |= {"stage.*.down.norm": lambda i: f"layers.{i - 1}.downsample.norm"}
_TREE |= {"stage.*.blocks.*": Part("layers.*.blocks.*", _BLOCK), "norm.norm": "norm"}
# A linear map there, a convolution of one tap here.
_TREE |= {"norm.conv": Mapped("proj", lambda weight: weight[..., None], lambda weight: weight[..., 0])}
_ATTENTION = options("num_heads", embed_dim="features", value_factor=Only(1))
_NET = options("num_classes", "depths", "num_heads", "projection", in_chans="channels", embed_dims="features")
_NET |= options(mlp_ratios="mlp_ratio", drop_path_rate="drop_path", chunkwise_recurrents=_kinds, layerscales=_scales)
_NET |= options(layer_init_values=_scales, init_values=None, heads_ranges=None, use_checkpoints=None, patch_norm=None)
_GIVEN = {"embed_dims": [96, 192, 384, 768], "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
_GIVEN |= {"mlp_ratios": [3, 3, 3, 3], "chunkwise_recurrents": [True, True, False, False], "layer_init_values": 1e-6}
_GIVEN |= {"layerscales": [False] * 4}
_TABLE = ("Relpos.angle",)

OFFICIAL = [
    Official("PathEmbeding2D", PolylineDecays, options(embed_dim=_head_dim, nheads=_head_dim), _DECAYS, _mask),
    Official("MambaAttentionAllDouble", PolylinePathAttention, _ATTENTION, _MIXER, _image, ignore=_TABLE),
    Official("MambaAttentionChunkDouble", SeparablePolylineAttention, _ATTENTION, _MIXER, _image, ignore=_TABLE),
    Official(
        "BasicBlock",
        block,
        options("retention", "num_heads", "ffn_dim", embed_dim="features", layerscale=_scale, layer_init_values=_scale),
        _BLOCK,
        _image,
        {"layerscale": False, "layer_init_values": 1e-5},
    ),
    Official("PPMAViT", PPMAViT, _NET, _TREE, defaults=_GIVEN, always={"image_size": None}, ignore=_TABLE),
]
