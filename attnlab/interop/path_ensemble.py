"""Path ensembles: a stack of timm's blocks, of which the paths' sum is the output."""

from typing import Any

import jax
from flax import nnx

from attnlab.analysis.path_ensemble import residual_paths
from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.contract import Site
from attnlab.interop.backbones import FUSED
from attnlab.interop.names import Part
from attnlab.interop.official import Given, Inputs, Official, options
from attnlab.models.blocks import Blocks
from attnlab.models.staged import Choice, Place, transformer_block


def blocks(
    features: int,
    *,
    num_heads: int,
    depth: int,
    qkv_bias: bool = False,
    layer_scale: float | None = None,
    rngs: nnx.Rngs,
    **block: Any,
) -> Blocks:
    """A stack of blocks alone."""
    place = Place(Site(features, num_heads), 0, Choice(SoftmaxAttention), 0.0)
    options = {"norm_eps": 1e-5, "shared": {"qkv_bias": qkv_bias}, "layer_scale": layer_scale, **block}
    return Blocks([transformer_block(place, **options, rngs=rngs) for _ in range(depth)])


def _paths(module: Blocks, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    paths = residual_paths(module.blocks, inputs["x"])
    found = {"y": paths.sum(0)}
    for layer in range(len(module.blocks)):
        found |= {f"msa_path_{layer}": paths[1 + 2 * layer], f"ffn_path_{layer}": paths[2 + 2 * layer]}
    return found


_STACK = options("num_heads", "depth", "mlp_ratio", "qkv_bias", dim="features", init_values="layer_scale")
_NAMES = {"blocks.*.mixer": Part("blocks.*.attn", FUSED), "blocks.*.scale1": "blocks.*.ls1.gamma"}
_NAMES |= {"blocks.*.scale2": "blocks.*.ls2.gamma"}

OFFICIAL = [Official("Block stack", blocks, _STACK, _NAMES, _paths)]
