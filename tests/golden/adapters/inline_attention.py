"""Golden adapter of `inline_attention`: attention modules, blocks and models of four families."""

import functools
import math

from flax import nnx

from attnlab.attention.dense.spatial_reduction_attention import SpatialReductionAttention
from attnlab.attention.linear.inline_attention import InlineAttention, InlineCore
from attnlab.attention.local.cross_shaped_windows import CrossShapedWindowAttention, StripeAttention, softmax_core
from attnlab.attention.local.window_attention import WindowAttention
from attnlab.models.inline_transformers import InlineCSwin, InlineDeiT, InlinePVT, InlineSwin, NormedInlineAttention
from attnlab.models.swin import swin_window
from tests.golden.adapters import _vision as vision

FEATURE_MAPS = {"identity": "identity", "relu": "relu", "leakyrelu": "leaky_relu", "exp": "exp"}


def run(meta, param, inputs):
    return CLASSES[meta["class"]](meta, param, inputs)


def _attention(meta, param, inputs):
    config, rngs, call = vision.Config(meta["config"]), nnx.Rngs(0), meta["call"]
    config.drop("qk_scale", "dim_out", "shift_size", "window")
    if "resolution" in config:
        window, side = vision.stripe(config)
        heads = config.take("num_heads", 8)
        branch = StripeAttention(config.take("dim"), num_heads=heads, window=window, core=InlineCore, rngs=rngs)
        config.done()
        return vision.run_stripes(branch, side, param, inputs["qkv"], inputs["x_mean"])
    x, features = inputs["x"], config.take("dim")
    if "window_size" in config:
        grid = tuple(config.take("window_size"))
        options = {"num_heads": config.take("num_heads"), "qkv_bias": config.take("qkv_bias", True)}
        options["grid"] = grid
        options["feature_map"] = FEATURE_MAPS[config.take("kernel_func", "identity")]
    else:
        _no_reduction(config)
        options = {"num_heads": config.take("num_heads", 8), "qkv_bias": config.take("qkv_bias", False)}
        grid = (call["H"], call["W"]) if "H" in call else None
        options["grid"] = (math.isqrt(x.shape[1] - 1),) * 2 if grid is None else grid
        options["prefix"] = int(grid is None)
    config.done()
    return vision.run_mixer(InlineAttention(features, **options, rngs=rngs), param, x, grid)


def _swin_block(meta, param, inputs):
    config, rngs = vision.Config(meta["config"]), nnx.Rngs(0)
    features, grid = config.take("dim"), tuple(config.take("input_resolution"))
    window, shift = config.take("window_size", 7), config.take("shift_size", 0)
    if min(grid) <= window:
        window, shift = swin_window(grid, window, 0)
    place = {"num_heads": config.take("num_heads"), "grid": grid, "window": window, "shift": shift}
    bias, scale = config.take("qkv_bias", True), config.take("qk_scale")
    if config.take("attn_type", "I") == "I":
        mixer = InlineAttention(features, qkv_bias=bias, **place, rngs=rngs)
    else:
        mixer = WindowAttention(features, qkv_bias=bias, scale=scale, **place, rngs=rngs)
    return vision.run_block(vision.block_around(mixer, features, config), param, inputs["x"], grid)


def _block(meta, param, inputs):
    config, rngs, call = vision.Config(meta["config"]), nnx.Rngs(0), meta["call"]
    features, scale = config.take("dim"), config.take("qk_scale")
    options = {"num_heads": config.take("num_heads"), "qkv_bias": config.take("qkv_bias", False), "rngs": rngs}
    if config.take("attn_type", "I") == "I":
        _no_reduction(config)
        mixer = InlineAttention(features, grid=(call["H"], call["W"]), **options)
    else:
        mixer = SpatialReductionAttention(features, reduction=config.take("sr_ratio", 1), scale=scale, **options)
    block = vision.block_around(mixer, features, config)
    return vision.run_block(block, param, inputs["x"], (call["H"], call["W"]))


def _deit_block(meta, param, inputs):
    config, x = vision.Config(meta["config"]), inputs["x"]
    config.drop("window")
    features = config.take("dim")
    mixer = InlineAttention(
        features,
        num_heads=config.take("num_heads"),
        grid=(math.isqrt(x.shape[1] - 1),) * 2,
        prefix=1,
        qkv_bias=config.take("qkv_bias", False),
        rngs=nnx.Rngs(0),
    )
    return vision.run_block(vision.block_around(mixer, features, config), param, x)


def _cswin_block(meta, param, inputs):
    config = vision.Config(meta["config"])
    features, side, scale = config.take("dim"), config.take("reso"), config.take("qk_scale")
    split, whole = config.take("split_size", 7), config.take("last_stage", False)
    common = {"num_heads": config.take("num_heads"), "grid": (side, side), "rngs": nnx.Rngs(0)}
    common["qkv_bias"] = config.take("qkv_bias", False)
    if config.take("attn_type", "I") == "I":
        mixer = NormedInlineAttention(features, **common)
    else:
        core = functools.partial(softmax_core, scale=scale)
        mixer = CrossShapedWindowAttention(features, split=split, whole=whole, core=core, **common)
    block = vision.block_around(mixer, features, config)
    return vision.run_block(block, param, inputs["x"], (side, side), mixer="")


def _pvt(meta, param, inputs):
    config = vision.Config(meta["config"])
    options = vision.pvt_family(config)
    options["replaced"] = vision.replaced(config, "IIII", len(options["depths"]))
    for count, reduction in zip(options["replaced"], config.take("la_sr_ratios", "8421"), strict=False):
        if count is None and reduction != "1":
            raise NotImplementedError("the authors' InLine attention fails with spatial reduction")
    config.done()
    return vision.run_model(InlinePVT(**options, rngs=nnx.Rngs(0)), param, inputs["x"])


def _swin(meta, param, inputs):
    config = vision.Config(meta["config"])
    options = vision.swin_family(config)
    vision.swin_windows(config, options, "inline_window")
    options["replaced"] = vision.replaced(config, "IIII", len(options["depths"]))
    config.done()
    return vision.run_model(InlineSwin(**options, rngs=nnx.Rngs(0)), param, inputs["x"])


def _cswin(meta, param, inputs):
    config = vision.Config(meta["config"])
    options = vision.cswin_family(config)
    options["replaced"] = vision.replaced(config, "IIII", len(options["depths"]))
    config.drop("la_split_size")  # only the stages' sides work there, and the window is always the image here
    config.done()
    return vision.run_model(InlineCSwin(**options, rngs=nnx.Rngs(0)), param, inputs["x"])


def _deit(meta, param, inputs):
    config = vision.Config(meta["config"])
    options = vision.deit_family(config)
    config.done()
    return vision.run_model(InlineDeiT(**options, rngs=nnx.Rngs(0)), param, inputs["x"])


def _no_reduction(config):
    if config.take("sr_ratio", 1) != 1:
        raise NotImplementedError("the authors' InLine attention fails with spatial reduction")


CLASSES = {
    "InLineAttention": _attention,
    "Attention": vision.softmax_mixer,
    "WindowAttention": vision.softmax_mixer,
    "LePEAttention": vision.softmax_mixer,
    "SwinTransformerBlock": _swin_block,
    "Block": _block,
    "InLineBlock": _deit_block,
    "CSWinBlock": _cswin_block,
    "PyramidVisionTransformer": _pvt,
    "InLineSwin": _swin,
    "CSWinTransformer": _cswin,
    "VisionTransformer": _deit,
}
