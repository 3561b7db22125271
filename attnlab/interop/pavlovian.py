"""The references of fla-org/flash-linear-attention for the learning rules that have one there."""

from typing import Any

import jax

from attnlab.attention.linear.pavlovian import linear_memory
from attnlab.interop.official import Given, Inputs, Official, options


def _memory(memory: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    """The result, the state, and where sums are normalised the sum of keys, as a token of its own there."""
    names = {"g": "log_decay"}
    y, state = memory(**{names.get(name, name): value for name, value in inputs.items()})
    if given.get("normalize"):
        return {"y": y, "state": state.kv, "z": state.k[:, None]}
    return {"y": y, "state": state}


_HEBB = options("scale", "normalize")
_DECAY = options("scale", chunk_size=None)

OFFICIAL = [
    Official("naive_recurrent_linear_attn", linear_memory, _HEBB, call=_memory, always={"rule": "hebb"}),
    Official("naive_chunk_simple_gla", linear_memory, _DECAY, call=_memory, always={"rule": "decay"}),
    Official("delta_rule_recurrence", linear_memory, {}, call=_memory, always={"rule": "delta"}),
]
