"""SHViT: huggingface/pytorch-image-models."""

from typing import Any

from flax import nnx

from attnlab.attention.dense.shvit import SingleHeadAttention
from attnlab.interop.names import Part, Squeezed
from attnlab.interop.official import Official, Only, options
from attnlab.models.block import Block
from attnlab.models.shvit import SHViT, convolved_block, merging
from attnlab.models.staged import Stage

_MIXER = {
    "norm": "pre_norm",
    "qkv.conv": "qkv.c",
    "qkv.norm": "qkv.bn",
    "out.conv": "proj.1.c",
    "out.norm": "proj.1.bn",
}


def _conv(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.conv": f"{theirs}.c", f"{ours}.norm": f"{theirs}.bn"}


_BLOCK: dict[Any, Any] = {
    **_conv("before", "conv.m"),
    "mixer": Part("mixer.m", _MIXER),
    **_conv("mlp.parts.0", "ffn.m.pw1"),
    **_conv("mlp.parts.1", "ffn.m.pw2"),
}
_DOWN: dict[str, Any] = {
    **_conv("parts.1.expand", "2.conv1"),
    **_conv("parts.1.spatial", "2.conv2"),
    "parts.1.gate.fc1": Squeezed("2.se.fc1", 2, 3),
    "parts.1.gate.fc2": Squeezed("2.se.fc2", 2, 3),
    **_conv("parts.1.reduce", "2.conv3"),
}
for _here, _there in ((0, 0), (2, 3)):
    _DOWN |= _conv(f"parts.{_here}.before", f"{_there}.m")
    _DOWN |= _conv(f"parts.{_here}.mlp.parts.0", f"{_there + 1}.m.pw1")
    _DOWN |= _conv(f"parts.{_here}.mlp.parts.1", f"{_there + 1}.m.pw2")


def _block(dim: int, qk_dim: int, pdim: int, type: str = "s", *, rngs: nnx.Rngs) -> Block:
    attends = type == "s"
    mixer = SingleHeadAttention(dim, partial=pdim, key_dim=qk_dim, rngs=rngs) if attends else None
    return convolved_block(dim, mixer, rngs=rngs)


class _Stage(nnx.Module):
    """A stage with what leads to it."""

    def __init__(
        self, prev_dim: int, dim: int, qk_dim: int, pdim: int, type: str = "s", depth: int = 1, *, rngs: nnx.Rngs
    ):
        down = None if prev_dim == dim else merging(prev_dim, dim, rngs=rngs)
        self.stage = Stage([_block(dim, qk_dim, pdim, type, rngs=rngs) for _ in range(depth)], down=down)

    def __call__(self, x: Any) -> Any:
        return self.stage(self.stage.enter(x))


OFFICIAL = [
    Official(
        "SHSA",
        SingleHeadAttention,
        options(dim="features", qk_dim="key_dim", pdim="partial", norm_layer=None, act_layer=None),
        _MIXER,
    ),
    Official("BasicBlock", _block, {}, _BLOCK),
    Official(
        "StageBlock",
        _Stage,
        {},
        {"stage.down": Part("downsample", _DOWN), "stage.blocks.*": Part("blocks.*", _BLOCK)},
    ),
    Official(
        "SHViT",
        SHViT,
        options(
            "num_classes",
            embed_dim="features",
            partial_dim="partial",
            qk_dim="key_dim",
            depth="depths",
            types="kinds",
            in_chans="channels",
            drop_rate=Only(0.0),
            global_pool=Only("avg"),
        ),
        {
            **_conv("stem.parts.0", "patch_embed.0"),
            **_conv("stem.parts.1", "patch_embed.2"),
            **_conv("stem.parts.2", "patch_embed.4"),
            **_conv("stem.parts.3", "patch_embed.6"),
            "stage.*.down": Part("stages.*.downsample", _DOWN),
            "stage.*.blocks.*": Part("stages.*.blocks.*", _BLOCK),
            "norm": "head.bn",
            "head": "head.l",
        },
        defaults={
            "embed_dim": (128, 256, 384),
            "partial_dim": (32, 64, 96),
            "qk_dim": (16, 16, 16),
            "depth": (1, 2, 3),
            "types": ("s", "s", "s"),
        },
        always={"image_size": None},
    ),
]
