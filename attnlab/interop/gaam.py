"""The official classes of gioannides/Gaussian-Adaptive-Attention and their arrays.

Their multi-head class hands eps to an argument of its heads that has no effect, and so does their block: eps is 1e-8
there, whatever is given. With `return_attention_details` they return weights too, without gradient: here always.
"""

from collections.abc import Mapping
from typing import Any

import jax

from attnlab.interop.official import Official, options
from attnlab.mixers.gaam import GaussianAttention, GaussianStack

ANY = {"features": None}
WITHOUT_EFFECT = dict.fromkeys(("mean_offset_init", "return_attention_details"))


def _details(module: Any, inputs: dict[str, jax.Array], given: Mapping[str, Any]) -> dict[str, jax.Array]:
    y, weights = module.weigh(*inputs.values())
    return {"y": y, "attention": jax.lax.stop_gradient(weights)}


def _details_of_layers(module: Any, inputs: dict[str, jax.Array], given: Mapping[str, Any]) -> dict[str, jax.Array]:
    y, weights = module.weigh(*inputs.values())
    return {"y": y, **{f"layer_{i}": jax.lax.stop_gradient(w) for i, w in enumerate(weights)}}


OFFICIAL = [
    Official(
        "GaussianAdaptiveAttention",
        GaussianAttention,
        options("num_gaussians", "padding_value", "eps", norm_axis="axis", num_heads=None) | WITHOUT_EFFECT,
        {"heads.0": "", "heads.0.widths": "c"},
        _details,
        always=ANY,
    ),
    Official(
        "MultiHeadGaussianAdaptiveAttention",
        GaussianAttention,
        options("num_heads", "num_gaussians", "padding_value", norm_axis="axis", eps=None) | WITHOUT_EFFECT,
        {"heads.*": "attention_heads.*", "heads.*.widths": "attention_heads.*.c"},
        _details,
        always=ANY,
    ),
    Official(
        "GaussianBlock",
        GaussianStack,
        options("num_heads", "num_gaussians", "padding_value", norm_axes="axis", num_layers="depth", eps=None)
        | WITHOUT_EFFECT,
        {"layers.*.heads.*": "layers.*.attention_heads.*", "layers.*.heads.*.widths": "layers.*.attention_heads.*.c"},
        _details_of_layers,
        always=ANY,
    ),
]
