"""ULSAM: Nandan91/ULSAM, ulsam.py, where every subspace is a module of its own.

Its hosts: MobileNet-V2 of torchvision, and MobileNet-V1 of timm. Where ULSAM stands in their lists of blocks, it has
the names of ulsam.py.
"""

from collections.abc import Iterable
from typing import Any

import jax

from attnlab.interop.names import Name, Part, Squeezed
from attnlab.interop.official import Given, Inputs, Official, Only, options
from attnlab.mixers.ulsam import SubspaceAttention
from attnlab.models.mobilenet import InvertedResidual, MobileNetV1, MobileNetV2, SeparableBlock


def _of_subspaces(module: SubspaceAttention) -> dict[str, Any]:
    return _names([f"subspaces.{i}." for i in range(module.groups)])


def _of_one(module: SubspaceAttention) -> dict[str, Any]:
    return _names([""])


def _names(subspaces: list[str]) -> dict[str, Any]:
    def joined(name: str) -> tuple[str, ...]:
        return tuple(subspace + name for subspace in subspaces)

    names: dict[str, Any] = {
        ours: Name(joined(theirs)) for ours, theirs in (("local", "conv_dws"), ("local_norm", "bn_dws"))
    }
    names |= {"point_norm": Name(joined("bn_point")), "point_bias": Name(joined("conv_point.bias"))}
    return names | {"point": Name(joined("conv_point.weight"), there=lambda a: a[..., None, None])}


def _call(module: SubspaceAttention, inputs: Inputs, given: Given) -> jax.Array:
    return module(inputs["x"], deterministic=not given.get("train", False))


_SEPARABLE = {
    "spatial.conv": "conv_dw",
    "spatial.norm": "bn1",
    "across.conv": "conv_pw",
    "across.norm": "bn2",
}


def _inverted(block: InvertedResidual) -> dict[Any, Any]:
    """A convolution and its norm are one module there, but for the last, behind which is no activation."""
    names: dict[Any, Any] = {}
    place = 0
    for name in ("spatial",) if block.expand is None else ("expand", "spatial"):
        names |= {f"{name}.conv": f"{place}.0", f"{name}.norm": f"{place}.1"}
        place += 1
    return names | {"reduce.conv": str(place), "reduce.norm": str(place + 1)}


def _blocks(stages: Iterable[Any], base: str, flat: bool) -> dict[Any, Any]:
    """Blocks by stage and index, or by their number among all, of which the first is 1."""
    names: dict[Any, Any] = {}
    number = 0
    for i, stage in enumerate(stages):
        for j, block in enumerate(stage.blocks):
            number += 1
            there = f"{base}.{number}" if flat else f"{base}.{i}.{j}"
            ours = f"stage.{i}.blocks.{j}"
            if isinstance(block, SeparableBlock):
                names[ours] = Part(there, _SEPARABLE)
            elif isinstance(block, InvertedResidual):
                names[ours] = Part(f"{there}.conv", _inverted(block))
            elif isinstance(block.after, SubspaceAttention):
                names[f"{ours}.after"] = Part(there, _of_subspaces(block.after))
    return names


def _v1_names(model: MobileNetV1) -> dict[Any, Any]:
    names: dict[Any, Any] = {"stem.conv": "conv_stem", "stem.norm": "bn1", "head": "classifier"}
    return names | _blocks(model.stage, "blocks", flat=False)


def _v2_names(model: MobileNetV2) -> dict[Any, Any]:
    last = 1 + len(model.blocks)
    names: dict[Any, Any] = {"stem.conv": "features.0.0", "stem.norm": "features.0.1", "head": "classifier.1"}
    names |= {"norm.conv": Squeezed(f"features.{last}.0", 3), "norm.norm": f"features.{last}.1"}
    return names | _blocks(model.stage, "features", flat=True)


_V1 = options("num_classes", "width", in_chans="channels")
_V2 = options("num_classes", width_mult="width", inverted_residual_setting="settings", round_nearest=Only(8))
_V2 |= options(dropout=None)
_CONFIG = options(nin="features", num_splits="groups", nout=None, h=None, w=None, train=None)

OFFICIAL = [
    Official("SubSpace", SubspaceAttention, options(nin="features", train=None), _of_one, _call, always={"groups": 1}),
    Official("ULSAM", SubspaceAttention, _CONFIG, _of_subspaces, _call),
    Official("MobileNetV1", MobileNetV1, _V1, _v1_names),
    Official("MobileNetV2", MobileNetV2, _V2, _v2_names),
]
