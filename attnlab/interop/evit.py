"""EViT: youweiliang/evit. What a call is given of the names `keep_rate` and `tokens` is `call.keep_rate` and so on."""

from typing import Any

import jax

from attnlab.interop.backbones import FUSED, TABLES
from attnlab.interop.names import Part, Squeezed
from attnlab.interop.official import Given, Inputs, Official, Only, options
from attnlab.models.evit import EViT
from attnlab.models.token_reorganisation import TokenReorganisationBlock


def _called(given: Given) -> dict[str, Any]:
    return {"keep_rate": given.get("call.keep_rate"), "count": given.get("call.tokens")}


def _block(block: TokenReorganisationBlock, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    kept = block.reorganise(inputs["x"], **_called(given))
    return {"y": kept.tokens} | ({} if kept.index is None else {"idx": kept.index})


def _model(model: EViT, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    logits, kept = model.with_kept(inputs["x"], **_called(given))
    indices = [index for index in kept if index is not None]
    return {"y": logits} | {f"idx{i}": index for i, index in enumerate(indices)}


def _rates(given: Given) -> dict[str, Any]:
    rates = given["keep_rate"] if isinstance(given["keep_rate"], list | tuple) else [given["keep_rate"]]
    return {"keep_rate": [*rates] * (given["depth"] if len(rates) == 1 else 1)}


_CALL: dict[str, None] = dict.fromkeys(("call.keep_rate", "call.tokens", "call.get_idx"))
_SAME = options("num_heads", "mlp_ratio", "qkv_bias", "fuse_token", act_layer=None, norm_layer=None)
_BLOCK = _SAME | options("keep_rate", dim="features", qk_scale="scale") | _CALL
_NET = _SAME | options("depth", "patch_size", "num_classes", keep_rate=_rates, img_size="image_size") | _CALL
_NET |= options(in_chans="channels", embed_dim="features", qk_scale=Only(None), representation_size=Only(None, 0))
_NET |= options(distilled=Only(False), weight_init=None, embed_layer=None)
_NAMES = {
    "stem.conv": "patch_embed.proj",
    "stage.0.prefix.tokens": Squeezed("cls_token", 0),
    "stage.0.blocks": "blocks",
}
_NAMES |= {"stage.0.position.table": Squeezed("pos_embed", 0), "stage.0.blocks.*.mixer": Part("blocks.*.attn", FUSED)}
_ALONE = {"qkv_bias": False, "fuse_token": False}
_GIVEN = {"embed_dim": 768, "num_heads": 12, "depth": 12, "keep_rate": (1,), "fuse_token": False}

OFFICIAL = [
    Official(
        "Block",
        TokenReorganisationBlock,
        _BLOCK,
        {"mixer": Part("attn", FUSED)},
        _block,
        _ALONE,
        {"norm_eps": 1e-5},
        ignore=TABLES,
    ),
    Official("EViT", EViT, _NET, _NAMES, _model, _GIVEN),
]
