"""Phantom attention: ByungKwanLee/Phantom."""

from collections.abc import Mapping
from typing import Any

import jax

from attnlab.attention.dense.phantom import HeadReader, PhantomAttention
from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.interop.official import Inputs, Official, Only, options

_READER = {"query": "linear_q", "key": "linear_k", "value": "linear_v", "out": "linear_o"}


def _attend(module: PhantomAttention, inputs: Inputs, given: Mapping[str, Any]) -> jax.Array:
    return module.attend(inputs["x"], inputs["phantom_position"], mask=inputs.get("mask"))


def _read(module: HeadReader, inputs: Inputs, given: Mapping[str, Any]) -> jax.Array:
    read = module(inputs["q"], inputs["k"])
    return inputs["q"] + read if given.get("is_residual") else read


def _plain(module: SoftmaxAttention, inputs: Inputs, given: Mapping[str, Any]) -> jax.Array:
    return module(inputs["x"], mask=inputs.get("mask"))


_OPTIONS = options(
    "eta",
    hidden_size="features",
    num_attention_heads="num_heads",
    num_key_value_heads="num_kv_heads",
    rope_theta="rotary",
    causal="causal",
    positions=Only("0..N-1"),
    activation=Only("gelu(erf)"),
    turn_on_phantom=None,
)
_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}

OFFICIAL = [
    Official(
        "Qwen2SdpaAttention",
        PhantomAttention,
        _OPTIONS,
        {
            **_PROJECTIONS,
            "core.gate1": "gating_phantom_1",
            "core.gate2": "gating_phantom_2",
            **{
                f"core.{part}.{here}": f"xattn_{part}_phantom.{there}"
                for part in ("query", "key", "value")
                for here, there in _READER.items()
            },
        },
        _attend,
        defaults={"causal": True},
    ),
    # Switched off, it is plain attention, whose weights stand beside those of the phantom.
    Official(
        "Qwen2SdpaAttention",
        SoftmaxAttention,
        _OPTIONS | {"eta": None},
        _PROJECTIONS,
        _plain,
        defaults={"causal": True},
        always={"out_bias": False},
        when=lambda given: not given.get("turn_on_phantom", True),
        ignore=("xattn_*", "gating_phantom_*"),
    ),
    Official(
        "XAttention",
        HeadReader,
        options("eta", in_features="head_dim", activation=Only("gelu(erf)"), is_residual=None),
        _READER,
        _read,
    ),
]
