"""Path patching of jmerullo/circuit_reuse on GPT-2, whose hooks are named as in TransformerLens."""

import re
from typing import Any

import jax

from attnlab.analysis.path_patching import Receiver, path_patching
from attnlab.interop.gpt2 import GPT2_CONFIG, gpt2_names
from attnlab.interop.official import ConfigError, Given, Inputs, Official
from attnlab.models.gpt2 import GPT2


def _receiver(node: Any) -> Receiver:
    where, head = node
    if not isinstance(where, str):
        return int(where), int(head)
    if (found := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", where)) is None:
        raise ConfigError(f"receiver_nodes must be heads, or hook_resid_pre or _post of a block, got {where!r}")
    return "stream", int(found[1]) + (found[2] == "post")


def _patch(model: GPT2, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    found = path_patching(
        model,
        inputs["tokens"],
        inputs["corrupted"],
        inputs["answers"],
        tuple(_receiver(node) for node in given["receiver_nodes"]),
        component=given["component"],
        position=given["position"],
        freeze_mlps=given["freeze_mlps"],
        truncate=given["truncate_to_max_layer"],
        double=True,
    )
    return {"effect": found.effect, "logit_diff_clean": found.clean, "logit_diff_corrupt": found.corrupt}


_CALL = {"component": "z", "position": -1, "freeze_mlps": False, "truncate_to_max_layer": True}

OFFICIAL = [
    Official(
        "path_patching",
        GPT2,
        GPT2_CONFIG | dict.fromkeys((*_CALL, "receiver_nodes")),
        gpt2_names("transformer"),
        _patch,
        _CALL,
        ignore=("attn.bias", "attn.masked_bias", "lm_head.weight"),
    )
]
