"""SOFT and SOFT++: fudan-zvg/SOFT.

model = staged.build_named(SOFTS, "soft_tiny", rngs=nnx.Rngs(0))
attnlab.interop.load(model, "soft_tiny.pth", key="model")
"""

import jax
from flax import nnx

from attnlab.attention.linear.soft import LandmarkKernel, SoftmaxFreeAttention
from attnlab.contract import Layout, Site
from attnlab.interop.names import Flattened, Part, Squeezed
from attnlab.interop.official import Given, Inputs, Official, Only, on_grid, options
from attnlab.models.block import Block
from attnlab.models.soft import SoftVisionTransformer, soft_block
from attnlab.models.staged import Choice, Place
from attnlab.nn.newton_inverse import newton_inverse, symmetric_newton_inverse


def kernel(
    features: int, *, num_heads: int, conv_size: int = 3, normalized: bool = False, rngs: nnx.Rngs, **options: int
) -> LandmarkKernel:
    """All between the projections, with the start value of the authors."""
    form = {"normalized": normalized, "shared_start": normalized}
    return LandmarkKernel(num_heads, features // num_heads, conv_size=conv_size, **form, **options, rngs=rngs)


def block(
    features: int, *, num_heads: int, ratio: int, conv_size: int = 3, iterations: int = 20, normalized: bool = False,
    rngs: nnx.Rngs,
) -> Block:  # fmt: skip
    """A block of the first three stages, alone."""
    choice = {"ratio": ratio, "conv_size": conv_size, "iterations": iterations}
    choice |= {"normalized": normalized, "shared_start": normalized}
    place = Place(Site(features, num_heads, Layout.IMAGE), 0, Choice(SoftmaxFreeAttention, choice), 0.0)
    return soft_block(place, rngs=rngs)


def _attend(module: LandmarkKernel, inputs: Inputs, given: Given) -> jax.Array:
    grid, q = (given["H"], given["W"]), inputs["q"] * inputs["q"].shape[-1] ** -0.25
    return module(q, module.landmarks(q, grid), inputs["v"], grid)


def _conv(name: str) -> dict[str, object]:
    return {name: lambda given: {"conv_size": int(given[name] or 0)}}


_METHOD = {"kernel_method": Only("torch", "cuda"), "H": None, "W": None}
_KERNEL = options("num_heads", "ratio", dim="features", max_iter="iterations") | _conv("use_conv") | _METHOD
_MIXER = options("num_heads", "ratio", dim="features", max_iter="iterations") | _conv("conv_size") | _METHOD
_INSIDE = {"landmark": "Qlandmark_op", "norm": "Qnorm_act.0", "local": "conv"}
_NAMES = {"query": "W_q", "value": "W_v", "out": "ff", "kernel": Part("attn", _INSIDE)}
_LAYER = {"mixer": Part("mha", _NAMES), "mlp.fc1": "ff1", "mlp.fc2": "ff2"}
_BLOCK = {"mixer": Part("att.mha", _NAMES), "mlp.fc1": "att.ff1", "mlp.fc2": "att.ff2"}
_BLOCK |= {"norm1": "att.norm1", "norm2": "att.norm2"}
_LAST = {"mixer": Part("attn", {"query": "q", ("key", "value"): "kv", "out": "proj"})}
_NET = options("qkv_bias", "depths", "num_heads", "num_classes", img_size="image_size", in_chans="channels")
_NET |= options(embed_dims="features", drop_rate="dropout", drop_path_rate="drop_path", newton_max_iter="iterations")
_NET |= {"mlp_ratios": lambda given: {"mlp_ratio": given["mlp_ratios"][3]}, "patch_size": Only(4)}
_NET |= {"sr_ratios": lambda given: {"ratios": list(given["sr_ratios"])[:3]}, "qk_scale": Only(None)}
_NET |= {"kernel_method": Only("torch", "cuda"), "norm_layer": None}
_TREE = {f"stem.parts.{i}.conv": f"patch_embed1.proj.{3 * i}" for i in range(3)}
_TREE |= {f"stem.parts.{i}.norm": f"patch_embed1.proj.{3 * i + 1}" for i in range(3)}
_TREE |= {"stage.*.down.conv": lambda i: f"patch_embed{i + 1}.proj.0"}
_TREE |= {"stage.*.down.norm": lambda i: f"patch_embed{i + 1}.proj.1"}
_TREE |= {f"stage.{i}.position.table": Flattened(f"pos_embed{i + 1}") for i in range(3)}
_TREE |= {"stage.3.position.table": Squeezed("pos_embed4", 0), "stage.3.prefix.tokens": Squeezed("cls_token", 0)}
_TREE |= {f"stage.{i}.blocks.*": Part(f"block{i + 1}.*", _BLOCK) for i in range(3)}
_TREE |= {"stage.3.blocks.*": Part("block4.*", _LAST)}
_GIVEN = {"embed_dims": [64, 128, 256, 512], "num_heads": [1, 2, 4, 8], "depths": [3, 4, 6, 3], "qkv_bias": False}
_NORM, _GRID = {"normalized": True}, on_grid("H", "W")
_SHARED = _NORM | {"shared_start": True}

OFFICIAL = [
    Official("_NewtonInverseKernel", newton_inverse, options(iter="iterations")),
    Official(
        "SoftmaxFreeNormAttentionKernel.newton_inv",
        symmetric_newton_inverse,
        options(max_iter="iterations"),
        always={"shared_start": True},
    ),
    Official("SoftmaxFreeAttentionKernel", kernel, _KERNEL, _INSIDE, _attend),
    Official("SoftmaxFreeNormAttentionKernel", kernel, _KERNEL, _INSIDE, _attend, always=_NORM),
    Official("SoftmaxFreeAttention", SoftmaxFreeAttention, _MIXER, _NAMES, _GRID),
    Official("SoftmaxFreeNormAttention", SoftmaxFreeAttention, _MIXER, _NAMES, _GRID, always=_SHARED),
    Official("SoftmaxFreeTransformer", block, _MIXER, _LAYER, _GRID),
    Official("SoftmaxFreeNormTransformer", block, _MIXER, _LAYER, _GRID, always=_NORM),
    Official("SoftmaxFreeTransformerBlock", block, _MIXER, _BLOCK, _GRID),
    Official("SoftmaxFreeNormTransformerBlock", block, _MIXER, _BLOCK, _GRID, always=_NORM),
    Official(
        "SoftmaxFreeVisionTransformer",
        SoftVisionTransformer,
        _NET,
        _TREE,
        defaults=_GIVEN,
        always={"norm_eps": 1e-5},
    ),
]
