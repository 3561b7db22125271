"""Token-aware pooling, attention diversification, and FAN: guoyongcs/TAPADL.

model = staged.build_named(FANS, "tap_fan_base_18_p16_224", rngs=nnx.Rngs(0))
attnlab.interop.load(model, "fan_base.pth.tar", key="state_dict")
"""

import math
from typing import Any

import jax
from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.contract import Layout, Site
from attnlab.interop.names import Part, Squeezed
from attnlab.interop.official import Given, Inputs, Official, Only, options
from attnlab.mixers.tap import TokenAwarePooling, pools
from attnlab.models.block import Block
from attnlab.models.fan import FAN, fan_block
from attnlab.models.staged import Choice, Place
from attnlab.objectives.attention_diversification import attention_diversification

Table = dict[Any, Any]


def block(
    features: int,
    *,
    num_heads: int,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = False,
    scale: float = 1.0,
    num_scales: int = 1,
    channel_heads: int | None = None,
    norm_eps: float = 1e-5,
    rngs: nnx.Rngs,
) -> Block:
    """A block of FAN with token-aware pooling, alone."""
    place = Place(Site(features, num_heads, Layout.IMAGE), 0, Choice(SoftmaxAttention), 0.0)
    options = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "scale": scale, "norm_eps": norm_eps}
    return fan_block(place, num_scales=num_scales, channel_heads=channel_heads, **options, rngs=rngs)


def _on_square(block: Block, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    x = inputs["x"]
    side = math.isqrt(x.shape[1])  # the official block takes squares alone
    y, found = nnx.capture(block, nnx.Intermediate)(x.reshape(x.shape[0], side, side, x.shape[-1]))
    return {"y": y, "attn": found["mixer"]["attention"]["attention"][0]}


def _parts(pool: TokenAwarePooling, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    return {"weights": pool.weights(inputs["x"]), "pooled": pools(inputs["x"], pool.num_scales)}


def _norm_eps(given: Given) -> dict[str, float]:
    """Of a layer's name, behind which its ε may stand."""
    _, _, eps = str(given["norm_layer"]).partition(" eps ")
    return {"norm_eps": float(eps)} if eps else {}


def _loss(loss: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    return {"loss": loss([jax.nn.softmax(logits) for logits in inputs.values()]).mean()}


_POOL: Table = {"first.conv": "proj.0", "first.norm": "proj.1", "second.conv": "proj.2"}
_ATTENTION: Table = {"query": "q", ("key", "value"): "kv", "out": "proj"}
_CHANNELS: Table = {"query": "q", "norm": "norm_v", "temperature": Squeezed("temperature", 1, 2), "mlp": "mlp_v"}
_CHANNELS |= {"mlp.conv.first": "mlp_v.dwconv.conv1", "mlp.conv.second": "mlp_v.dwconv.conv2"}
_CHANNELS |= {"mlp.conv.norm": "mlp_v.dwconv.bn", "mlp.conv.scale": "mlp_v.gamma"}
_BLOCK: Table = {"mixer.pool": Part("dilation_predictor", _POOL), "mixer.norm": "norm1", "norm2": "norm2"}
_BLOCK |= {"mixer.attention": Part("attn", _ATTENTION), "mlp": Part("mlp", _CHANNELS)}
_BLOCK |= {"scale1": "gamma1", "scale2": "gamma2"}
_CLASS: Table = {"scale1": "gamma1", "after.norm": "norm2", "after.mlp": "mlp", "after.scale": "gamma2"}
_CLASS |= {
    f"mixer.attention.{ours}": f"attn.{theirs}" for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"))
}
_CLASS |= {"mixer.attention.out": "attn.proj"}
_TREE: Table = {"stem.parts.*.conv": lambda i: f"patch_embed.proj.{2 * i}.0"}
_TREE |= {"stem.parts.*.norm": lambda i: f"patch_embed.proj.{2 * i}.1"}
_TREE |= {"stage.0.position.map": Squeezed("pos_embed.token_projection", 2, 3)}
_TREE |= {"stage.0.blocks.*": Part("blocks.*", _BLOCK), "stage.1.blocks.*": Part("cls_attn_blocks.*", _CLASS)}
_TREE |= {"stage.1.prefix.tokens": Squeezed("cls_token", 0)}
# Their attention keeps `sr_ratio` and does not look at it.
_SAME = options("num_heads", "mlp_ratio", "qkv_bias", "num_scales", eta="scale", sr_ratio=None, sharpen_attn=None)
_SAME |= options(c_head_num="channel_heads")
_NET = _SAME | options("num_classes", "depth", "patch_size", img_size="image_size", in_chans="channels")
_NET |= options(embed_dim="features", tokens_norm="norm_tokens", cls_attn_layers="class_depth", se_mlp=Only(False))
_NET |= options(use_pos_embed="positions", channel_dims=Only(None), backbone=Only(None), drop_path_rate="drop_path")
_NET |= options(use_checkpoint=None, head_init_scale=None, hybrid_patch_size=None)
_GIVEN = {"embed_dim": 768, "num_heads": 12, "tokens_norm": False, "num_scales": 1}

OFFICIAL = [
    Official(
        "DilationPredictor+DilatedAvgPooling",
        TokenAwarePooling,
        options("num_scales", "temperature", dim="features"),
        _POOL,
        _parts,
    ),
    Official("TAPFANBlock", block, _SAME | options(dim="features", norm_layer=_norm_eps), _BLOCK, _on_square),
    Official("FAN", FAN, _NET, _TREE, defaults=_GIVEN),
    Official(
        "AttentionDiversificationLoss", attention_diversification, {"th": "threshold"}, {}, _loss, defaults={"th": 2}
    ),
]
