"""Golden adapter of `neighborhood_attention`."""

from flax import nnx

from attnlab import Layout
from attnlab.attention.local.neighborhood_attention import NeighborhoodAttention
from attnlab.interop.neighborhood_attention import load_neighborhood_attention
from attnlab.interop.official import StateDict
from pallas_kernels.neighborhood_attention import neighborhood_attention

LAYOUTS = {
    "NeighborhoodAttention1D": Layout.SEQUENCE,
    "NeighborhoodAttention2D": Layout.IMAGE,
    "NeighborhoodAttention3D": Layout.VIDEO,
}


def run(meta, param, inputs):
    if meta["class"] in LAYOUTS:
        return module(LAYOUTS[meta["class"]], meta["config"], param, inputs)
    if meta["class"] not in ("na1d", "na2d", "na3d"):
        raise NotImplementedError(meta["class"])
    y, lse = neighborhood_attention(**inputs, **meta["call"] | {"return_lse": True})
    return {"y": y, "lse": lse}


def module(layout, config, param, inputs):
    attention = NeighborhoodAttention(
        config["embed_dim"] if "embed_dim" in config else config["dim"],
        num_heads=config["num_heads"],
        kernel_size=config["kernel_size"],
        stride=config.get("stride", 1),
        dilation=config.get("dilation", 1),
        causal=config.get("is_causal", False),
        layout=layout,
        scale=config.get("qk_scale"),
        qkv_bias=config.get("qkv_bias", True),
        relative_bias=config.get("rel_pos_bias", False),
        projection_dropout=config.get("proj_drop", 0.0),
        rngs=nnx.Rngs(0),
    )
    with StateDict(param, into=attention) as weights:
        load_neighborhood_attention(attention, weights)
    return {"y": attention(inputs["x"])}
