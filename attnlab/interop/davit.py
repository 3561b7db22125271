"""DaViT: huggingface/pytorch-image-models."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from attnlab.attention.linear.davit import ChannelGroupAttention
from attnlab.contract import Layout, Site
from attnlab.interop.names import Part
from attnlab.interop.official import Official, Only, options
from attnlab.models.block import Block
from attnlab.models.davit import DaViT, attention_of
from attnlab.models.staged import Place, transformer_block
from attnlab.nn.activations import gelu


def dual_block(features: int, *, kind: str, num_heads: int, rngs: nnx.Rngs, **options: Any) -> Block:
    """A block of DaViT, alone."""
    attention = {name: options.pop(name) for name in ("window", "version") if name in options}
    place = Place(Site(features, num_heads, Layout.IMAGE), 0, attention_of(**attention)[kind], 0.0)
    shared = {"qkv_bias": options.pop("qkv_bias", kind == "spatial")}
    return transformer_block(place, norm_eps=1e-5, shared=shared, position_side=3, **options, rngs=rngs)


def _mlp_ratio(given: Mapping[str, Any]) -> dict[str, float]:
    return {"mlp_ratio": given.get("mlp_ratio", 4.0) if given.get("ffn", True) else 0.0}


def _activation(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"position_activation": gelu if given["cpe_act"] else None}


def _net(named: bool) -> Official:
    def names(model: DaViT) -> dict[str, Any]:
        def block(stage: int, index: int) -> Part:
            outer, turn = divmod(index, len(model.kinds))
            return Part(f"stages.{stage}.blocks.{outer}.{f'{model.kinds[turn]}_block' if named else turn}", _BLOCK)

        norm = "norm_pre" if model.norm_first else "head.norm"
        return {"stage.*.blocks.*": block, "stage.*.down": "stages.*.downsample", "norm": norm, "head": "head.fc"}

    return Official("DaVit", DaViT, _NET, names, always={"image_size": None})


_MIXER = {("query", "key", "value"): "qkv", "out": "proj"}
_BLOCK = {"before": "cpe1.proj", "before2": "cpe2.proj", "mixer": Part("attn", _MIXER)}
_ATTENTION = options("num_heads", "qkv_bias", "dynamic_scale", dim="features")
_ALONE = _ATTENTION | options(window_size="window", mlp_ratio=_mlp_ratio, ffn=_mlp_ratio, drop_path=None)
_ALONE |= options(v2=lambda given: {"version": 1 + given["v2"]}, cpe_act=_activation)
_NET = options("depths", "num_heads", "qkv_bias", "norm_eps", "num_classes", in_chans="channels", embed_dims="features")
_NET |= options(window_size="window", attn_types="kinds", mlp_ratio=_mlp_ratio, ffn=_mlp_ratio, named_blocks=None)
_NET |= options(cpe_act="position_activation", down_kernel_size="down_kernel", head_norm_first="norm_first")
_NET |= options(channel_attn_v2=lambda given: {"version": 1 + given["channel_attn_v2"]}, drop_path_rate="drop_path")
_NET |= options(drop_rate=Only(0.0), global_pool=Only("avg"))

OFFICIAL = [
    Official("ChannelAttention", ChannelGroupAttention, _ATTENTION, _MIXER, defaults={"qkv_bias": False}),
    Official("ChannelAttentionV2", ChannelGroupAttention, _ATTENTION, _MIXER, always={"version": 2}),
    Official("SpatialBlock", dual_block, _ALONE, _BLOCK, always={"kind": "spatial"}),
    Official("ChannelBlock", dual_block, _ALONE, _BLOCK, always={"kind": "channel"}),
    _net(named=False),
    _net(named=True),
]
