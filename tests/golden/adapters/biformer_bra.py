"""Golden adapter of `biformer_bra`: both attentions, the block and the backbone of rayleizhu/BiFormer."""

from flax import nnx

from attnlab.attention.sparse.biformer_bra import BiLevelRoutingAttention, RegionalRoutingAttention
from attnlab.interop import biformer
from attnlab.interop.official import StateDict
from attnlab.models.biformer import (
    BiFormer,
    BiFormerBlock,
    PlainAttention,
    biformer_base,
    biformer_small,
    biformer_tiny,
)

NAMES = {
    "dim": "features",
    "num_classes": "num_classes",
    "in_chans": "channels",
    "depth": "depths",
    "embed_dim": "widths",
    "layer_scale_init_value": "layer_scale",
    "drop_path_rate": "drop_path",
}
WITHOUT_EFFECT = {
    "BiLevelRoutingAttention": {"kv_downsample_kernel"},
    "nchwBRA": {"auto_pad", "attn_backend"},
    "Block": {"kv_downsample_kernel"},
    "BiFormer": {
        "kv_downsample_kernels",
        "drop_rate",
        "use_checkpoint_stages",
        "pe",
        "pe_stages",
        "representation_size",
    },
}
DEFAULTS = {
    "Block": {"kv_downsample_mode": "ada_avgpool"},
    "BiFormer": {
        "depths": [3, 4, 8, 3],
        "widths": [64, 128, 320, 512],
        "head_dim": 64,
        "kv_downsample_mode": "ada_avgpool",
        "kv_per_wins": [2, 2, -1, -1],
        "topks": [8, 8, -1, -1],
        "mlp_ratios": [4, 4, 4, 4],
    },
}
NAMED = {"biformer_tiny": biformer_tiny, "biformer_small": biformer_small, "biformer_base": biformer_base}


def options(meta):
    """Constructor arguments here of the official ones."""
    name = meta["class"]
    family = "BiFormer" if name in NAMED else name
    config = {k: v for k, v in meta["config"].items() if k not in WITHOUT_EFFECT.get(family, ())}
    if "before_attn_dwconv" in config:
        size = config.pop("before_attn_dwconv")
        if size not in (0, 3):
            raise ValueError(f"before_attn_dwconv keeps the size of the map for 0 and 3 alone, got {size}")
        config["position_conv"] = size > 0
    return DEFAULTS.get(name, {}) | {NAMES.get(k, k): v for k, v in config.items()}


def run(meta, param, inputs):
    name, arguments, x = meta["class"], options(meta), inputs["x"]
    rngs = nnx.Rngs(0)
    if name in NAMED or name == "BiFormer":
        model = NAMED.get(name, BiFormer)(**arguments, rngs=rngs)
        biformer.load_biformer(model, param)
        return {"y": model(x)}
    if name == "BiLevelRoutingAttention":
        module, load = BiLevelRoutingAttention(**arguments, rngs=rngs), biformer.load_routing_attention
    elif name == "nchwBRA":
        module, load = RegionalRoutingAttention(**arguments, rngs=rngs), biformer.load_regional_routing_attention
    elif name == "Block":
        module, load = BiFormerBlock(**arguments, rngs=rngs), biformer.load_block
    elif name in ("Attention", "AttentionLePE"):
        local = arguments.pop("side_dwconv", 5 if name == "AttentionLePE" else 0)
        module, load = PlainAttention(**arguments, local_size=local, rngs=rngs), biformer.load_plain_attention
    else:
        raise NotImplementedError(name)
    with StateDict(param, into=module) as weights:
        load(module, weights)
    outputs = {"y": module(x)}
    if name == "BiLevelRoutingAttention":
        outputs["r_idx"], outputs["r_weight"] = module.routing(x)
    return outputs
