"""RALA and RAVLT: qhfan/RALA.

model = staged.build_named(RAVLTS, "ravlt_tiny", rngs=nnx.Rngs(0))
attnlab.interop.load(model, "RAVLT_T.pth", key="model")
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention.linear.rala import ModulatedAttention, ModulatedSoftmaxAttention, RankAugmentedLinearAttention
from attnlab.contract import Layout, Site
from attnlab.interop.names import Part, Squeezed
from attnlab.interop.official import Given, Inputs, Official, options
from attnlab.models.block import Block
from attnlab.models.ravlt import ATTENTIONS, BLOCK, Ravlt
from attnlab.models.staged import Place, transformer_block
from attnlab.nn.positions import grid_positions
from attnlab.nn.rotary import rotary_angles

_KINDS = {"l": "linear", "v": "softmax"}
_ATTENTIONS = {"GateLinearAttentionNoSilu": RankAugmentedLinearAttention}
_ATTENTIONS |= {"VanillaSelfAttention": ModulatedSoftmaxAttention}


def block(
    features: int, *, flag: str, num_heads: int, ffn_dim: int, layer_scale: float | None = None, rngs: nnx.Rngs
) -> Block:
    """A block of RAVLT, alone."""
    place = Place(Site(features, num_heads, Layout.IMAGE), 0, ATTENTIONS[_KINDS[flag]], 0.0)
    ratio = ffn_dim / features
    return transformer_block(place, mlp_ratio=ratio, layer_scale=layer_scale, **BLOCK, rngs=rngs)


def _with_table(mixer: ModulatedAttention, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    at, size = grid_positions(inputs["x"].shape[1:-1]), mixer.features // mixer.num_heads
    angles = jnp.repeat(rotary_angles(at, size, theta=mixer.rotary.theta, inclusive=True)[0], 2, axis=-1)
    return {"y": mixer(inputs["x"]), "sin": jnp.sin(angles), "cos": jnp.cos(angles)}


def _scale(given: Given) -> dict[str, Any]:
    return {"layer_scale": given["layer_init_value"] if given["layerscale"] else None}


def _scales(given: Given) -> dict[str, Any]:
    pairs = zip(given["layerscales"], given["layer_init_values"], strict=True)
    return {"layer_scales": [value if there else None for there, value in pairs]}


def _kinds(given: Given) -> dict[str, Any]:
    lists = zip(given["flagss"], given["depths"], strict=True)
    return {"kinds": [tuple(_KINDS[flag] for flag in flags[:depth]) for flags, depth in lists]}


_MIXER = {("query", "key", "value", "gate"): Squeezed("qkvo", 2, 3), "local": "lepe", "out": Squeezed("proj", 2, 3)}
_NAMES = {"before": "pos", "mixer": Part("attn", _MIXER), "norm1": "norm1.norm", "norm2": "norm2.norm"}
_NAMES |= {"mlp.fc1": Squeezed("ffn.fc1", 2, 3), "mlp.fc2": Squeezed("ffn.fc2", 2, 3), "mlp.conv": "ffn.dwconv"}
_NAMES |= {f"scale{branch}": Squeezed(f"gamma_{branch}", 0, 2, 3) for branch in (1, 2)}
_ALONE = {("query", "key", "value", "gate"): Squeezed("attn.qkvo", 2, 3), "local": "attn.lepe"}
_ALONE |= {"out": Squeezed("attn.proj", 2, 3)}
_BLOCK = {name: f"block.{place}" for name, place in _NAMES.items() if isinstance(place, str)}
_BLOCK |= {"mixer": Part("block.attn", _MIXER)}
_BLOCK |= {f"mlp.{name}": Squeezed(f"block.ffn.{name}", 2, 3) for name in ("fc1", "fc2")}
_BLOCK |= {f"scale{branch}": Squeezed(f"block.gamma_{branch}", 0, 2, 3) for branch in (1, 2)}
_NET = options("num_classes", "depths", "num_heads", "projection", in_chans="channels", embed_dims="features")
_NET |= options(mlp_ratios="mlp_ratio", drop_path_rate="drop_path", flagss=_kinds)
_NET |= options(layerscales=_scales, layer_init_values=_scales)
_TREE = {f"stem.parts.{i}.conv": f"patch_embed.proj.{3 * i}" for i in range(4)}
_TREE |= {f"stem.parts.{i}.norm": f"patch_embed.proj.{3 * i + 1}" for i in range(4)}
_TREE |= {"stage.*.down.conv": lambda i: f"layers.{i - 1}.downsample.reduction"}
_TREE |= {"stage.*.down.norm": lambda i: f"layers.{i - 1}.downsample.norm"}
_TREE |= {"stage.*.blocks.*": Part("layers.*.blocks.*", _NAMES), "norm.norm": "norm"}
_TREE |= {"norm.conv": Squeezed("proj", 3), "head": Squeezed("head", 2, 3)}
_GIVEN = {"layerscales": [False] * 4, "layer_init_values": [1e-6] * 4, "depths": [2, 2, 6, 2]}
_GIVEN |= {"flagss": [["l"] * 10, ["l"] * 10, ["v"] * 20, ["v"] * 10], "mlp_ratios": [3, 3, 3, 3]}
_GIVEN |= {"embed_dims": [96, 192, 384, 768], "num_heads": [3, 6, 12, 24]}
_TABLE = ("RoPE.angle",)

OFFICIAL = [
    *(
        Official(name, cls, {"dim": "features"}, _ALONE, _with_table, ignore=_TABLE)
        for name, cls in _ATTENTIONS.items()
    ),
    Official(
        "Block",
        block,
        {"embed_dim": "features", "layerscale": _scale, "layer_init_value": _scale},
        _BLOCK,
        defaults={"layerscale": False, "layer_init_value": 1e-6},
        ignore=_TABLE,
    ),
    Official("RAVLT", Ravlt, _NET, _TREE, defaults=_GIVEN, always={"image_size": None}, ignore=_TABLE),
]
