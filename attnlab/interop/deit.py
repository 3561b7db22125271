"""timm's vision transformers, DeiT and CaiT: huggingface/pytorch-image-models."""

from typing import Any

from attnlab.interop.backbones import FUSED
from attnlab.interop.names import Flattened, Mapped, Part, Squeezed
from attnlab.interop.official import Official, Only, options
from attnlab.models.cait import CaiT
from attnlab.models.deit import DeiT

Table = dict[Any, Any]
_SIZES = options("depth", "num_heads", "mlp_ratio", "qkv_bias", "patch_size", "num_classes", embed_dim="features")
_SIZES |= options(img_size="image_size", in_chans="channels", drop_path_rate="drop_path")
_STEM: Table = {"stem.conv": "patch_embed.proj", "stage.0.blocks": "blocks"}


def _vit(model: DeiT) -> Table:
    placed = Squeezed("pos_embed", 0) if model.stage[0].prefix is not None else Flattened("pos_embed")
    names: Table = {
        "stage.0.prefix.tokens": Squeezed("cls_token", 0),
        "stage.0.prefix.registers": Squeezed("reg_token", 0),
        "stage.0.position.table": placed,
        "stage.0.blocks.*.mixer": Part("blocks.*.attn", FUSED),
        "stage.0.blocks.*.scale1": "blocks.*.ls1.gamma",
        "stage.0.blocks.*.scale2": "blocks.*.ls2.gamma",
        "norm": "norm" if model.norm_first else "fc_norm",
    }
    return _STEM | names


_CLASS: Table = {"attention.query": "attn.q", "attention.key": "attn.k", "attention.value": "attn.v"}
_CLASS |= {"attention.out": "attn.proj", "scale1": "gamma_1", "scale2": "gamma_2"}
_TALKING: Table = FUSED | {"core.before": "proj_l", "core.behind": "proj_w"}
_CAIT: Table = _STEM | {
    "stage.0.position.table": Flattened("pos_embed"),
    "stage.0.blocks.*.mixer": Part("blocks.*.attn", _TALKING),
    "stage.0.blocks.*.scale1": "blocks.*.gamma_1",
    "stage.0.blocks.*.scale2": "blocks.*.gamma_2",
    "pool.cls": Mapped("cls_token", lambda a: a[0, 0], lambda a: a[None, None]),
    "pool.blocks.*": Part("blocks_token_only.*", _CLASS),
    "pool.norm": "norm",
}
_VIT = _SIZES | options(
    "class_token",
    reg_tokens="registers",
    init_values="layer_scale",
    no_embed_class=lambda given: {"placed": not given["no_embed_class"]},
    global_pool=lambda given: {"pooling": {"token": "cls", "avg": "mean"}[given["global_pool"]]},
    qk_norm=Only(False),
    pre_norm=Only(False),
)

OFFICIAL = [
    Official("VisionTransformer", DeiT, _VIT, _vit),
    Official("Cait", CaiT, _SIZES | options(init_values="layer_scale", depth_token_only="class_depth"), _CAIT),
]
