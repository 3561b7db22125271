"""LeapLabTHU/Agent-Attention: attention modules, blocks and models of four families, and AgentSD.

model = agent_transformer("agent_swin_tiny", rngs=nnx.Rngs(0))
attnlab.interop.load(model, "agent_swin_t.pth", key="model")
"""

import functools
import math
from typing import Any

import jax

from attnlab.attention.linear.agent_attention import AgentCore
from attnlab.contract import Given as Arguments
from attnlab.interop import backbones as vision
from attnlab.interop.names import Part, Squeezed
from attnlab.interop.official import Given, Inputs, Official, Only, on_grid, options, pair, plain
from attnlab.interventions.agent_sd import agent_sd_attention, match_tokens


def _per_block(given: Given) -> dict[str, Any]:
    """Their numbers are those of blocks 0-1, 2-3, 4-9 and 10-11."""
    runs = (0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3)[: given["depth"]]
    return {"num_agents": [int(given["agent_num"][run]) for run in runs]}


def _per_stage(name: str, ours: str, between: str | None = None) -> dict[str, Any]:
    """A number for each stage, in a list or a string."""

    def option(given: Given) -> dict[str, Any]:
        numbers = given[name].split(between) if between else given[name]
        return {ours: [int(number) for number in numbers][: vision.stages_of(given)]}

    return {name: option}


def _agent_sd(mixer: Any, inputs: Inputs, given: Given) -> jax.Array:
    x, agents = inputs["x"], inputs.get("agent")
    q, k, v, _ = mixer.project(x, inputs.get("context", x), Arguments())
    agents = None if agents is None else mixer.query(agents)
    factors = {"broadcast_power": given["k_scale2"], "shortcut": given["k_shortcut"]}
    return mixer.merge(agent_sd_attention(q, k, v, agents, mask=inputs.get("mask"), **factors), x)


def _merge(match: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    merging = match(inputs.get("metric", inputs["x"]))
    tokens, agents = merging.merge(inputs["x"])
    out = {"unmerged": merging.unmerge(tokens), "merged_token_sum": tokens.sum(1)}
    return out if agents is None else out | {"agent_token_sum": agents.sum(1)}


_BIASES = {"aggregate_table": "an_bias", "broadcast_table": "na_bias"}
_BIASES |= {"aggregate_row": Squeezed("ah_bias", 0, 4), "aggregate_column": Squeezed("aw_bias", 0, 3)}
_BIASES |= {"broadcast_row": Squeezed("ha_bias", 0, 3), "broadcast_column": Squeezed("wa_bias", 0, 2)}
_BIASES |= {"aggregate_prefix": Squeezed("ac_bias", 0), "broadcast_prefix": Squeezed("ca_bias", 0)}
_BRANCH = {"core": Part("", Official("AgentAttention", AgentCore, names=_BIASES), {})}
_NAMES = _BRANCH | {"local": "dwc"}
_CORE = {"agent_num": lambda given: {"core": functools.partial(AgentCore, num_agents=given["agent_num"])}}
_CORE |= {"qk_scale": None}
_CONFIG = vision.HEADS | options(agent_num="num_agents", qk_scale=None)
_PVT_CONFIG = _CONFIG | vision.SIDES
_PVT_CONFIG |= {"num_patches": lambda given: {"grid": pair(math.isqrt(given["num_patches"]))}}
_DEIT_CONFIG = _CONFIG | {"window": lambda given: {"grid": pair(given["window"]), "prefix": 1}}
_APART = vision.APART | vision.REDUCED | _NAMES
_FUSED = vision.FUSED | _NAMES
_official = functools.partial(Official, "AgentAttention", "agent_attention")
_PVT = _official(_PVT_CONFIG, _APART, on_grid("H", "W"), vision.EIGHT, when="num_patches")
_SWIN = _official(_CONFIG | vision.WINDOWED, _FUSED, on_grid("window_size"), when="window_size")
_DEIT = _official(_DEIT_CONFIG, _FUSED, plain, vision.EIGHT | {"window": 14})
_CROSS = vision.cross(_CORE, _BRANCH, agent_num=49)

_AGENTS = _per_stage("agent_num", "num_agents")
_PVT_MODEL = _AGENTS | {"attn_type": vision.replaced("AAAA")} | _per_stage("agent_sr_ratios", "agent_reductions")
_SWIN_MODEL = _AGENTS | {"attn_type": vision.replaced("BBBB")} | vision.windows("agent_window")
_CSWIN_MODEL = _AGENTS | {"attn_type": vision.replaced("AAAA")} | _per_stage("la_split_size", "agent_splits", "-")
_DEIT_MODEL = {"agent_layer": lambda given: {"replaced": given["agent_layer"] if given["agent_layer"] > 0 else None}}
_DEIT_MODEL |= {"agent_num": _per_block}
_SWIN_GIVEN, _DEIT_GIVEN = {"agent_num": [9, 16, 49, 49]}, {"agent_num": [49, 49, 49, 49]}
_PVT_GIVEN, _CSWIN_GIVEN = _SWIN_GIVEN | {"agent_sr_ratios": "1111"}, _DEIT_GIVEN | {"la_split_size": "1-2-7-7"}
_SD = options(query_dim="features", heads="num_heads", dim_head="head_dim", context_dim="context_features")
_SD |= dict.fromkeys(("k_scale2", "k_shortcut", "attn_precision"))
_SD_GIVEN = {"heads": 8, "dim_head": 64, "k_scale2": 0.3, "k_shortcut": 0.075}
_SD_FIXED = {"qkv_bias": False}
_SD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
_MERGE = options(r="merged", agent_r="agent_merged", w=None, sx=None, no_rand=Only(True), sy=None)
_MERGE |= {"h": lambda given: {"grid": (given["h"], given["w"]), "cell": (given["sy"], given["sx"])}}
_AGENT = "agent_attention"

OFFICIAL = [
    *vision.SOFTMAX,
    *(_PVT, _SWIN, _DEIT),
    vision.stripe("AgentAttention", _CORE, _BRANCH, agent_num=49),
    *vision.blocks("AB", _PVT, _SWIN, _CROSS),
    vision.block("AgentBlock", plain, {"A": _DEIT}),
    vision.model("pvt", "PyramidVisionTransformer", f"{_AGENT}.pvt", _PVT_MODEL, _PVT, **_PVT_GIVEN),
    vision.model("swin", "AgentSwinTransformer", f"{_AGENT}.swin", _SWIN_MODEL, _SWIN, **_SWIN_GIVEN),
    vision.model("cswin", "CSWinTransformer", f"{_AGENT}.cswin", _CSWIN_MODEL, _CROSS, **_CSWIN_GIVEN),
    vision.model("deit", "VisionTransformer", f"{_AGENT}.deit", _DEIT_MODEL, _DEIT, **_DEIT_GIVEN),
    Official("AgentAttention (patched)", "softmax_attention", _SD, _SD_NAMES, _agent_sd, _SD_GIVEN, _SD_FIXED),
    Official("bipartite_soft_matching_random2d", match_tokens, _MERGE, call=_merge),
]
