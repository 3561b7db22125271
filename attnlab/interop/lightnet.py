"""LightNet: fla-org/flash-linear-attention, Doraemonzzz/xmixers and Doraemonzzz/xopes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention.linear.lightnet import LightNetAttention, additive_recurrence
from attnlab.interop.official import Official, Only, decode, options
from attnlab.nn.positions import grid_positions
from attnlab.nn.rotary import lrpe
from attnlab.nn.toeplitz import ToeplitzPositions

Inputs = dict[str, jax.Array]
Given = Mapping[str, Any]


def _sizes(given: Given) -> dict[str, int]:
    heads, ratio, width = given["num_heads"], given["expand_ratio"], given["hidden_size"]
    return {
        "num_heads": width // ratio if heads is None else heads,
        "head_dim": width // heads if ratio is None else ratio,
    }


def _conv(given: Given) -> dict[str, int | None]:
    return {"conv_size": given["conv_size"] if given["use_short_conv"] else None}


def _attend(module: LightNetAttention, inputs: Inputs, given: Given) -> jax.Array:
    mask = inputs.get("attention_mask")
    return module(inputs["x"], mask=None if mask is None else mask > 0)


def _decode(module: LightNetAttention, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    y, state = decode(module, inputs["x"], given["prefill"])
    return {"y": y, "state": state.memory, "z": state.carry[0][:, None]}


def _lrpe(turn: Callable[..., jax.Array], inputs: Inputs, given: Given) -> jax.Array:
    at = jnp.pad(jnp.asarray(grid_positions(given["shape"])), ((0, 0), (given["l"], 0), (0, 0)))
    return turn(inputs["x"], inputs["theta"], at)


# norm_eps is not looked at over there: the fused call takes its own.
_OPTIONS = options("conv_bias", hidden_size="features", expand_ratio=_sizes, gate_low_rank_dim="gate_rank")
_OPTIONS |= {"use_short_conv": _conv, **dict.fromkeys(("num_heads", "conv_size", "norm_eps", "mode", "layer_idx"))}
_DEFAULTS = {"hidden_size": 1024, "num_heads": None, "expand_ratio": 128, "use_short_conv": False, "conv_size": 4}
_NAMES = {"gate_down": "g_proj.0", "gate_up": "g_proj.1", "norm": "g_norm", "out": "o_proj"}
for _part in ("query", "key", "value"):
    _NAMES |= {_part: f"{_part[0]}_proj", f"{_part}_conv": f"{_part[0]}_conv1d"}
_DECODED = "LightNetAttention (prefill+decode)"

OFFICIAL = [
    Official("additive_rule_recurrence_torch", additive_recurrence, options("scale")),
    Official("LightNetAttention", LightNetAttention, _OPTIONS, _NAMES, _attend, _DEFAULTS),
    Official(_DECODED, LightNetAttention, _OPTIONS | {"prefill": None}, _NAMES, _decode, _DEFAULTS),
    Official("lrpe_cosine_md_torch", lrpe, options(act=Only("none"), shape=None, l=None), call=_lrpe),
    Official(
        "MdTpe",
        ToeplitzPositions,
        options("num_heads", embed_dim="features", dims="axes"),
        {"along.*": "tpes.*", "along.*.query": "tpes.*.q", "along.*.key": "tpes.*.k", "along.*.out": "tpes.*.o_proj"},
    ),
]
