"""Golden adapter of `agent_attention`: attention modules, blocks and models of four families, and AgentSD."""

import functools
import math

from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.attention.dense.spatial_reduction_attention import SpatialReductionAttention
from attnlab.attention.linear.agent_attention import AgentAttention, AgentCore
from attnlab.attention.local.cross_shaped_windows import CrossShapedWindowAttention, StripeAttention, softmax_core
from attnlab.attention.local.window_attention import WindowAttention
from attnlab.contract import Given
from attnlab.interop import official
from attnlab.interventions.agent_sd import agent_sd_attention, match_tokens
from attnlab.models.agent_transformers import AgentCSwin, AgentDeiT, AgentPVT, AgentSwin
from attnlab.models.swin import swin_window
from tests.golden.adapters import _vision as vision


def run(meta, param, inputs):
    return CLASSES[meta["class"]](meta, param, inputs)


def _attention(meta, param, inputs):
    config, rngs = vision.Config(meta["config"]), nnx.Rngs(0)
    config.drop("qk_scale", "dim_out", "shift_size")
    if "resolution" in config:
        window, side = vision.stripe(config)
        branch = StripeAttention(
            config.take("dim"),
            num_heads=config.take("num_heads", 8),
            window=window,
            core=functools.partial(AgentCore, num_agents=config.take("agent_num", 49)),
            rngs=rngs,
        )
        config.done()
        return vision.run_stripes(branch, side, param, inputs["qkv"])
    features, agents = config.take("dim"), config.take("agent_num", 49)
    if "window_size" in config:
        grid, heads, bias = tuple(config.take("window_size")), config.take("num_heads"), True
        place = {"grid": grid}
    elif "num_patches" in config:
        side = math.isqrt(config.take("num_patches"))
        grid, heads, bias = (side, side), config.take("num_heads", 8), False
        place = {"grid": grid, "reduction": config.take("sr_ratio", 1)}
    else:
        side = config.take("window", 14)
        grid, heads, bias = None, config.take("num_heads", 8), False
        place = {"grid": (side, side), "prefix": 1}
    bias = config.take("qkv_bias", bias)
    config.done()
    mixer = AgentAttention(features, num_heads=heads, num_agents=agents, qkv_bias=bias, **place, rngs=rngs)
    return vision.run_mixer(mixer, param, inputs["x"], grid)


def _swin_block(meta, param, inputs):
    config, rngs = vision.Config(meta["config"]), nnx.Rngs(0)
    features, grid = config.take("dim"), tuple(config.take("input_resolution"))
    window, shift = config.take("window_size", 7), config.take("shift_size", 0)
    if min(grid) <= window:
        window, shift = swin_window(grid, window, 0)
    place = {"num_heads": config.take("num_heads"), "grid": grid, "window": window, "shift": shift}
    bias, scale, agents = config.take("qkv_bias", True), config.take("qk_scale"), config.take("agent_num", 49)
    if config.take("attn_type", "A") == "A":
        mixer = AgentAttention(features, num_agents=agents, qkv_bias=bias, **place, rngs=rngs)
    else:
        mixer = WindowAttention(features, qkv_bias=bias, scale=scale, **place, rngs=rngs)
    return vision.run_block(vision.block_around(mixer, features, config), param, inputs["x"], grid)


def _block(meta, param, inputs):
    config, rngs, call = vision.Config(meta["config"]), nnx.Rngs(0), meta["call"]
    features, heads, bias = config.take("dim"), config.take("num_heads"), config.take("qkv_bias", False)
    if "num_patches" not in config:  # the plain block of DeiT
        mixer = SoftmaxAttention(features, num_heads=heads, qkv_bias=bias, rngs=rngs)
        return vision.run_block(vision.block_around(mixer, features, config), param, inputs["x"])
    side = math.isqrt(config.take("num_patches"))
    options = {"num_heads": heads, "qkv_bias": bias, "reduction": config.take("sr_ratio", 1), "rngs": rngs}
    scale, agents = config.take("qk_scale"), config.take("agent_num", 49)
    if config.take("attn_type", "A") == "A":
        mixer = AgentAttention(features, grid=(side, side), num_agents=agents, **options)
    else:
        mixer = SpatialReductionAttention(features, scale=scale, **options)
    block = vision.block_around(mixer, features, config)
    return vision.run_block(block, param, inputs["x"], (call["H"], call["W"]))


def _deit_block(meta, param, inputs):
    config = vision.Config(meta["config"])
    features, side = config.take("dim"), config.take("window", 14)
    mixer = AgentAttention(
        features,
        num_heads=config.take("num_heads"),
        grid=(side, side),
        prefix=1,
        num_agents=config.take("agent_num", 49),
        qkv_bias=config.take("qkv_bias", False),
        rngs=nnx.Rngs(0),
    )
    return vision.run_block(vision.block_around(mixer, features, config), param, inputs["x"])


def _cswin_block(meta, param, inputs):
    config = vision.Config(meta["config"])
    features, side = config.take("dim"), config.take("reso")
    agents, scale = config.take("agent_num", 49), config.take("qk_scale")
    if config.take("attn_type", "A") == "A":
        core = functools.partial(AgentCore, num_agents=agents)
    else:
        core = functools.partial(softmax_core, scale=scale)
    mixer = CrossShapedWindowAttention(
        features,
        num_heads=config.take("num_heads"),
        grid=(side, side),
        split=config.take("split_size", 7),
        whole=config.take("last_stage", False),
        qkv_bias=config.take("qkv_bias", False),
        core=core,
        rngs=nnx.Rngs(0),
    )
    block = vision.block_around(mixer, features, config)
    return vision.run_block(block, param, inputs["x"], (side, side), mixer="")


def _pvt(meta, param, inputs):
    config = vision.Config(meta["config"])
    options = vision.pvt_family(config)
    options |= _kinds(config, "AAAA", options)
    reductions = [int(digit) for digit in config.take("agent_sr_ratios", "1111")][: len(options["depths"])]
    config.done()
    return vision.run_model(AgentPVT(**options, agent_reductions=reductions, rngs=nnx.Rngs(0)), param, inputs["x"])


def _swin(meta, param, inputs):
    config = vision.Config(meta["config"])
    options = vision.swin_family(config)
    vision.swin_windows(config, options, "agent_window")
    options |= _kinds(config, "BBBB", options)
    config.done()
    return vision.run_model(AgentSwin(**options, rngs=nnx.Rngs(0)), param, inputs["x"])


def _cswin(meta, param, inputs):
    config = vision.Config(meta["config"])
    options = vision.cswin_family(config)
    options |= _kinds(config, "AAAA", options, [49, 49, 49, 49])
    splits = [int(width) for width in config.take("la_split_size", "1-2-7-7").split("-")]
    config.done()
    return vision.run_model(AgentCSwin(**options, agent_splits=splits, rngs=nnx.Rngs(0)), param, inputs["x"])


def _deit(meta, param, inputs):
    config = vision.Config(meta["config"])
    options = vision.deit_family(config)
    agents, layers = config.take("agent_num", [49, 49, 49, 49]), config.take("agent_layer", -1)
    # Their numbers are those of blocks 0-1, 2-3, 4-9 and 10-11.
    options["num_agents"] = [int(agents[run]) for run in (0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3)][: options["depth"]]
    config.done()
    model = AgentDeiT(**options, replaced=layers if layers > 0 else None, rngs=nnx.Rngs(0))
    return vision.run_model(model, param, inputs["x"])


def _kinds(config, letters, options, agents=(9, 16, 49, 49)):
    stages = len(options["depths"])
    agents = [int(n) for n in config.take("agent_num", agents)][:stages]
    return {"replaced": vision.replaced(config, letters, stages), "num_agents": agents}


def _agent_sd(meta, param, inputs):
    config = vision.Config(meta["config"])
    options = {"broadcast_power": config.take("k_scale2", 0.3), "shortcut": config.take("k_shortcut", 0.075)}
    mixer = SoftmaxAttention(
        config.take("query_dim"),
        num_heads=config.take("heads", 8),
        head_dim=config.take("dim_head", 64),
        context_features=config.take("context_dim"),
        qkv_bias=False,
        rngs=nnx.Rngs(0),
    )
    config.drop("dropout", "attn_precision")
    config.done()
    with official.StateDict(param, into=mixer) as weights:
        for layer, name in ((mixer.query, "q"), (mixer.key, "k"), (mixer.value, "v")):
            official.to_heads([layer], weights, f"to_{name}")
        official.from_heads(mixer.out, weights, "to_out.0")
    x, agents = inputs["x"], inputs.get("agent")
    heads = mixer.project(x, inputs.get("context", x), Given())
    agents = None if agents is None else mixer.query(agents)
    y = agent_sd_attention(heads.q, heads.k, heads.v, agents, mask=inputs.get("mask"), **options)
    return {"y": mixer.merge(y, x)}


def _merge(meta, param, inputs):
    config = meta["config"]
    if not config["no_rand"]:
        raise NotImplementedError("random destinations are drawn from another generator here")
    x = inputs["x"]
    merging = match_tokens(
        inputs.get("metric", x),
        (config["h"], config["w"]),
        merged=config["r"],
        agent_merged=config["agent_r"],
        cell=(config["sy"], config["sx"]),
    )
    tokens, agents = merging.merge(x)
    out = {"unmerged": merging.unmerge(tokens), "merged_token_sum": tokens.sum(1)}
    return out if agents is None else out | {"agent_token_sum": agents.sum(1)}


CLASSES = {
    "AgentAttention": _attention,
    "Attention": vision.softmax_mixer,
    "WindowAttention": vision.softmax_mixer,
    "LePEAttention": vision.softmax_mixer,
    "SwinTransformerBlock": _swin_block,
    "Block": _block,
    "AgentBlock": _deit_block,
    "CSWinBlock": _cswin_block,
    "PyramidVisionTransformer": _pvt,
    "AgentSwinTransformer": _swin,
    "CSWinTransformer": _cswin,
    "VisionTransformer": _deit,
    "AgentAttention (patched)": _agent_sd,
    "bipartite_soft_matching_random2d": _merge,
}
