"""ULSAM: Nandan91/ULSAM, ulsam.py, where every subspace is a module of its own."""

from typing import Any

import jax

from attnlab.interop.names import Name
from attnlab.interop.official import Given, Inputs, Official, options
from attnlab.mixers.ulsam import SubspaceAttention


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


_CONFIG = options(nin="features", num_splits="groups", nout=None, h=None, w=None, train=None)

OFFICIAL = [
    Official("SubSpace", SubspaceAttention, options(nin="features", train=None), _of_one, _call, always={"groups": 1}),
    Official("ULSAM", SubspaceAttention, _CONFIG, _of_subspaces, _call),
]
