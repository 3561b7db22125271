"""What the adapters of agent attention and InLine attention share: official configurations in this library's words."""

import functools

from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.attention.dense.spatial_reduction_attention import SpatialReductionAttention
from attnlab.attention.local.cross_shaped_windows import StripeAttention, softmax_core
from attnlab.attention.local.window_attention import WindowAttention
from attnlab.contract import Layout, Site
from attnlab.interop import backbones, official
from attnlab.models.staged import Place, transformer_block
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.heads import merge_heads, split_heads

RATES = (
    "drop",
    "attn_drop",
    "proj_drop",
    "drop_path",
    "drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
    "use_checkpoint",
)
"""Official arguments that do nothing at inference."""


class Config:
    """Official constructor arguments; each must be read, or have no effect at inference."""

    def __init__(self, config):
        self.left = {name: value for name, value in config.items() if name not in RATES}

    def __contains__(self, name):
        return name in self.left

    def take(self, name, default=None):
        return self.left.pop(name, default)

    def drop(self, *names):
        for name in names:
            self.left.pop(name, None)

    def done(self):
        if self.left:
            raise NotImplementedError(f"constructor arguments {sorted(self.left)}")


def stripe(config):
    """Rows and columns of the window of CSwin's attention."""
    side, split = config.take("resolution"), config.take("split_size", 7)
    return {-1: (side, side), 0: (side, split), 1: (split, side)}[config.take("idx")], side


def to_image(x, grid):
    return x.reshape(x.shape[0], *grid, x.shape[-1])


def run_mixer(mixer, param, x, grid=None, load=backbones.load_mixer):
    """Loads a mixer and calls it on tokens (B, N, C); `grid` for one that takes images."""
    with official.StateDict(param, into=mixer, ignore=backbones.BUFFERS) as weights:
        load(mixer, weights)
    y = mixer(x if grid is None else to_image(x, grid))
    return {"y": y.reshape(x.shape)}


def run_block(block, param, x, grid=None, mixer="attn"):
    return run_mixer(block, param, x, grid, lambda b, weights: backbones.load_block(b, weights, mixer))


def run_model(model, param, x):
    backbones.load_backbone(model, param)
    return {"y": model(x)}


def run_stripes(branch, side, param, qkv, descriptor=None):
    """A branch of CSwin's attention on projected tokens (3, B, N, C)."""
    with official.StateDict(param, into=branch) as weights:
        backbones.load_stripe(branch, weights)
    count = branch.position.channels[0]
    extra = () if descriptor is None else (split_heads(descriptor, count),)
    heads = Heads(*(split_heads(t, count) for t in qkv), extra)
    return {"y": merge_heads(branch(heads, (side, side)))}


def softmax_mixer(meta, param, inputs):
    """The softmax attentions of the original models, which both repositories keep."""
    config, rngs = Config(meta["config"]), nnx.Rngs(0)
    x = inputs.get("x")
    if meta["class"] == "WindowAttention":
        window = tuple(config.take("window_size"))
        mixer = WindowAttention(
            config.take("dim"),
            window=window,
            num_heads=config.take("num_heads"),
            qkv_bias=config.take("qkv_bias", True),
            scale=config.take("qk_scale"),
            rngs=rngs,
        )
        config.done()
        return run_mixer(mixer, param, x, window)
    if meta["class"] == "LePEAttention":
        window, side = stripe(config)
        config.drop("dim_out")
        branch = StripeAttention(
            config.take("dim"),
            num_heads=config.take("num_heads", 8),
            window=window,
            core=functools.partial(softmax_core, scale=config.take("qk_scale")),
            rngs=rngs,
        )
        config.done()
        return run_stripes(branch, side, param, inputs["qkv"], inputs.get("x_mean"))
    call = meta["call"]
    features, heads = config.take("dim"), config.take("num_heads", 8)
    options = {"qkv_bias": config.take("qkv_bias", False), "scale": config.take("qk_scale"), "rngs": rngs}
    if "H" in call:
        reduction = config.take("sr_ratio", 1)
        mixer = SpatialReductionAttention(features, num_heads=heads, reduction=reduction, **options)
    else:
        mixer = SoftmaxAttention(features, num_heads=heads, **options)
    config.done()
    return run_mixer(mixer, param, x, (call["H"], call["W"]) if "H" in call else None)


def block_around(mixer, features, config, norm_eps=1e-5):
    """The pre-norm block of the official configuration around a mixer."""
    ratio = config.take("mlp_ratio", 4.0)
    config.done()
    place = Place(Site(features, 1, Layout.IMAGE), 0, lambda site, index, **shared: mixer, 0.0)
    return transformer_block(place, mlp_ratio=ratio, norm_eps=norm_eps, rngs=nnx.Rngs(0))


def pvt_family(config):
    """Arguments that PVT has in both repositories, at their defaults."""
    stages = config.take("num_stages", 4)
    return {
        "features": config.take("embed_dims", [64, 128, 256, 512])[:stages],
        "num_heads": config.take("num_heads", [1, 2, 4, 8])[:stages],
        "mlp_ratios": config.take("mlp_ratios", [4, 4, 4, 4])[:stages],
        "depths": config.take("depths", [3, 4, 6, 3])[:stages],
        "reductions": config.take("sr_ratios", [8, 4, 2, 1])[:stages],
        "qkv_bias": config.take("qkv_bias", False),
        "scale": config.take("qk_scale"),
        "norm_eps": 1e-5,
    } | image_arguments(config, 16)


def swin_family(config):
    """Arguments that Swin has in both repositories, at their defaults."""
    return {
        "features": config.take("embed_dim", 96),
        "num_heads": config.take("num_heads", [3, 6, 12, 24]),
        "depths": config.take("depths", [2, 2, 6, 2]),
        "mlp_ratio": config.take("mlp_ratio", 4.0),
        "qkv_bias": config.take("qkv_bias", True),
        "scale": config.take("qk_scale"),
        "position_table": config.take("ape", False),
        "patch_norm": config.take("patch_norm", True),
    } | image_arguments(config, 4)


def cswin_family(config):
    """Arguments that CSwin has in both repositories, at their defaults."""
    config.drop("patch_size", "hybrid_backbone", "use_chk")  # stored or ignored there
    return {
        "features": config.take("embed_dim", 96),
        "num_heads": config.take("num_heads", [2, 4, 8, 16]),
        "depths": config.take("depth", [2, 2, 6, 2]),
        "splits": config.take("split_size", [1, 2, 7, 7]),
        "mlp_ratio": config.take("mlp_ratio", 4.0),
        "qkv_bias": config.take("qkv_bias", True),
        "scale": config.take("qk_scale"),
    } | image_arguments(config)


def deit_family(config):
    """Arguments that DeiT has in both repositories, at their defaults."""
    return {
        "features": config.take("embed_dim", 768),
        "num_heads": config.take("num_heads", 12),
        "depth": config.take("depth", 12),
        "mlp_ratio": config.take("mlp_ratio", 4.0),
        "qkv_bias": config.take("qkv_bias", True),
    } | image_arguments(config, 16)


def replaced(config, default, stages):
    """How many of the first blocks of each stage have the new attention, from the official letters.

    A letter for each stage: `A` or `I` for the new attention, `B` or `S` for the family's, `M` for as many of the first
    as the number behind the letters says; this means nothing unless a stage is mixed.
    """
    types = config.take("attn_type") or default
    mixed = int(types[stages:]) if "M" in types[:stages] else None
    return [{"M": mixed, "A": None, "I": None, "B": 0, "S": 0}[letter] for letter in types[:stages]]


def swin_windows(config, options, new):
    """The windows of the new attention, called `new`, and of the family's."""
    window = config.take("window_size", 7)
    options |= {new: window, "window": max(7, window // 8)}


def image_arguments(config, patch_size=None):
    arguments = {
        "image_size": config.take("img_size", 224),
        "channels": config.take("in_chans", 3),
        "num_classes": config.take("num_classes", 1000),
    }
    return arguments if patch_size is None else arguments | {"patch_size": config.take("patch_size", patch_size)}
