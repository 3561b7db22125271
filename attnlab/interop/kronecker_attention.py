"""Higher-order attention of lucidrains/simplicial-attention, simplicial_attention.py."""

from typing import Any

import jax

from attnlab.attention.dense.kronecker_attention import tensor_attention
from attnlab.interop.official import Given, Inputs, Official, options


def _sets(attend: Any, inputs: Inputs, given: Given) -> jax.Array:
    """Keys and values there are numbered: k1, k2, …, v1, v2, …"""
    sets = [[inputs[name] for name in sorted(inputs) if name[0] == letter and name[1:]] for letter in "kv"]
    return attend(inputs["q"], *sets)


_CALL = options("causal", "scale", order=None)

OFFICIAL = [
    Official("naive_two_simplicial_attend", tensor_attention, _CALL, call=_sets),
    Official("nth_order_attend", tensor_attention, _CALL, call=_sets),
]
