"""ACMIL: dazhangyu123/ACMIL, architecture/transformer.py."""

from typing import Any

import jax
import jax.numpy as jnp

from attnlab.interop.names import Part, Squeezed
from attnlab.interop.official import Given, Inputs, Official, options
from attnlab.models.mil import ABMIL, ACMIL
from attnlab.pooling.acmil import MultiBranchHeadsPooling

_GATED: dict[Any, Any] = {
    "tanh": "attention_V.0",
    "gate": "attention_U.0",
    "score": "attention_weights",
}
_READ: dict[Any, Any] = {"value": "v_proj", "out": "out_proj", "norm": "layer_norm"}
_CLASSES: dict[Any, Any] = {
    "reduce": "dimreduction.fc1",
    "heads.*": "classifier.*.fc",
    "head": "Slide_classifier.fc",
}
_BRANCHES: dict[Any, Any] = _CLASSES | {"pooling": Part("attention", _GATED)}
_HEADS: dict[Any, Any] = _CLASSES | {
    "pooling.queries": Squeezed("q", 0),
    "pooling.query.*": "sub_attention.*.q_proj",
    "pooling.key.*": "sub_attention.*.k_proj",
    "pooling.reads.*": Part("sub_attention.*", _READ),
    "pooling.bag": Part("bag_attention", _READ),
}


def _draws(inputs: Inputs, heads: bool) -> jax.Array:
    """The draws of one bag: (K, m) of the gated attention; (H, m) of each branch's heads, one array for each."""
    prefix = "stkim_uniform_"
    names = sorted((name for name in inputs if name.startswith(prefix)), key=lambda name: int(name[len(prefix) :]))
    arrays = [inputs[name] for name in names]
    return (jnp.stack(arrays, 1) if heads else arrays[0])[None]


def _bag(model: ACMIL, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    heads = isinstance(model.pooling, MultiBranchHeadsPooling)
    masks = given.get("training_masking") and model.pooling.masked
    found = model(inputs["x"], draws=_draws(inputs, heads) if masks else None)
    return {"sub": found.branches[0], "slide": found.bag, "attn": found.scores[0] if heads else found.scores}


_SIZES = options(D_feat="in_features", D_inner="features", n_class="num_classes", droprate="dropout")
_MASKING = options(n_token="num_branches", n_masked_patch="masked", mask_drop="share", training_masking=None)
_MASKING |= options(use_attention_mask=None)

OFFICIAL = [
    Official(
        "ACMIL_GA",
        ACMIL,
        _SIZES | _MASKING | options(D="hidden_features"),
        _BRANCHES,
        call=_bag,
        defaults={"n_token": 1},
    ),
    Official(
        "ACMIL_MHA",
        ACMIL,
        _SIZES | _MASKING,
        _HEADS,
        call=_bag,
        defaults={"n_token": 1},
        always={"attention": "heads"},
    ),
    Official(
        "ABMIL",
        ABMIL,
        _SIZES | options(D="hidden_features", n_token=None, training_masking=None),
        {
            "reduce": "dimreduction.fc1",
            "pooling": Part("attention", _GATED),
            "head": "classifier.fc",
        },
    ),
]
