"""LeapLabTHU/Agent-Attention: attention modules, blocks and models of four families, and AgentSD.

model = agent_transformer("agent_swin_tiny", rngs=nnx.Rngs(0))
attnlab.interop.load(model, "agent_swin_t.pth", key="model")
"""

import functools
import math
from typing import Any

import jax

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.attention.linear.agent_attention import AgentAttention, AgentCore
from attnlab.contract import Given as Arguments
from attnlab.interop import backbones as vision
from attnlab.interop.backbones import Given, Inputs
from attnlab.interop.names import Part, Squeezed
from attnlab.interop.official import Official, Only, options
from attnlab.interventions.agent_sd import agent_sd_attention, match_tokens
from attnlab.models.agent_transformers import AgentCSwin, AgentDeiT, AgentPVT, AgentSwin

_BIASES = {
    "aggregate_table": "an_bias",
    "broadcast_table": "na_bias",
    "aggregate_row": Squeezed("ah_bias", 0, 4),
    "aggregate_column": Squeezed("aw_bias", 0, 3),
    "broadcast_row": Squeezed("ha_bias", 0, 3),
    "broadcast_column": Squeezed("wa_bias", 0, 2),
    "aggregate_prefix": Squeezed("ac_bias", 0),
    "broadcast_prefix": Squeezed("ca_bias", 0),
}
_CORE = {"core": Part("", Official("AgentAttention", AgentCore, names=_BIASES), {})}
_OPTIONS = vision.HEADS | options(agent_num="num_agents", qk_scale=None)
_STRIPE = {"agent_num": lambda given: {"core": functools.partial(AgentCore, num_agents=given["agent_num"])}}


def _patches(given: Given) -> dict[str, Any]:
    side = math.isqrt(given["num_patches"])
    return {"grid": (side, side)}


def _per_stage(given: Given) -> dict[str, Any]:
    stages = len(given["depth" if "depth" in given else "depths"][: given.get("num_stages")])
    return {"num_agents": [int(number) for number in given["agent_num"]][:stages]}


def _per_block(given: Given) -> dict[str, Any]:
    """Their numbers are those of blocks 0-1, 2-3, 4-9 and 10-11."""
    runs = (0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3)[: given["depth"]]
    return {"num_agents": [int(given["agent_num"][run]) for run in runs]}


def _numbers(name: str, ours: str, between: str | None = None) -> Any:
    """An official string that holds a number per stage."""
    return lambda given: {ours: [int(n) for n in (given[name].split(between) if between else given[name])]}


def _agent_sd(mixer: SoftmaxAttention, inputs: Inputs, given: Given) -> jax.Array:
    x, agents = inputs["x"], inputs.get("agent")
    q, k, v, _ = mixer.project(x, inputs.get("context", x), Arguments())
    agents, factors = None if agents is None else mixer.query(agents), (given["k_scale2"], given["k_shortcut"])
    options = dict(zip(("broadcast_power", "shortcut"), factors, strict=True))
    return mixer.merge(agent_sd_attention(q, k, v, agents, mask=inputs.get("mask"), **options), x)


def _merge(match: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    merging = match(inputs.get("metric", inputs["x"]))
    tokens, agents = merging.merge(inputs["x"])
    out = {"unmerged": merging.unmerge(tokens), "merged_token_sum": tokens.sum(1)}
    return out if agents is None else out | {"agent_token_sum": agents.sum(1)}


_PVT = Official(
    "AgentAttention",
    AgentAttention,
    _OPTIONS | options(num_patches=_patches, sr_ratio="reduction", H=None, W=None),
    vision.APART | vision.REDUCED | _CORE | {"local": "dwc"},
    vision.on_grid("H", "W"),
    defaults=vision.EIGHT,
    when=lambda given: "num_patches" in given,
)
_SWIN = Official(
    "AgentAttention",
    AgentAttention,
    _OPTIONS | vision.WINDOWED,
    vision.FUSED | _CORE | {"local": "dwc"},
    vision.on_grid("window_size"),
    when=lambda given: "window_size" in given,
)
_DEIT = Official(
    "AgentAttention",
    AgentAttention,
    _OPTIONS | {"window": lambda given: {"grid": vision.pair(given["window"]), "prefix": 1}},
    vision.FUSED | _CORE | {"local": "dwc"},
    defaults=vision.EIGHT | {"window": 14},
    when=lambda given: not {"num_patches", "window_size", "resolution"} & given.keys(),
)
_CROSS = vision.cross(_STRIPE | {"qk_scale": None}, _CORE, agent_num=49)
_AGENTS = {"pvt": _PVT, "swin": _SWIN, "deit": _DEIT, "cswin": _CROSS}

OFFICIAL = [
    *vision.SOFTMAX,
    *(_PVT, _SWIN, _DEIT),
    vision.stripe("AgentAttention", _STRIPE | {"qk_scale": None}, _CORE, agent_num=49),
    *vision.blocks("AgentBlock", "A", "B", _AGENTS),
    vision.pvt(
        AgentPVT,
        options(attn_type=vision.replaced("AAAA"), agent_num=_per_stage)
        | {"agent_sr_ratios": _numbers("agent_sr_ratios", "agent_reductions")},
        _PVT,
        agent_num=[9, 16, 49, 49],
        agent_sr_ratios="1111",
    ),
    vision.swin(
        "AgentSwinTransformer",
        AgentSwin,
        options(attn_type=vision.replaced("BBBB"), agent_num=_per_stage),
        "agent_window",
        _SWIN,
        agent_num=[9, 16, 49, 49],
    ),
    vision.cswin(
        AgentCSwin,
        options(attn_type=vision.replaced("AAAA", "depth"), agent_num=_per_stage)
        | {"la_split_size": _numbers("la_split_size", "agent_splits", "-")},
        _CROSS,
        agent_num=[49, 49, 49, 49],
        la_split_size="1-2-7-7",
    ),
    vision.deit(
        AgentDeiT,
        {"agent_num": _per_block}
        | {"agent_layer": lambda given: {"replaced": given["agent_layer"] if given["agent_layer"] > 0 else None}},
        _DEIT,
        agent_num=[49, 49, 49, 49],
    ),
    Official(
        "AgentAttention (patched)",
        SoftmaxAttention,
        options(query_dim="features", heads="num_heads", dim_head="head_dim", context_dim="context_features")
        | dict.fromkeys(("k_scale2", "k_shortcut", "dropout", "attn_precision")),
        {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"},
        _agent_sd,
        defaults={"heads": 8, "dim_head": 64, "k_scale2": 0.3, "k_shortcut": 0.075},
        always={"qkv_bias": False},
    ),
    Official(
        "bipartite_soft_matching_random2d",
        match_tokens,
        options(r="merged", agent_r="agent_merged", w=None, sx=None, no_rand=Only(True))
        | {"h": lambda given: {"grid": (given["h"], given["w"]), "cell": (given["sy"], given["sx"])}, "sy": None},
        call=_merge,
    ),
]
