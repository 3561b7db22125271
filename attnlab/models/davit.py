"""DaViT (Ding et al., ECCV 2022, arXiv:2204.03645): window attention and channel group attention in turn.

    x = x + DWConv(x);   x = x + attention(LN(x));   x = x + DWConv(x);   x = x + MLP(LN(x))          a block

Windows have no position bias and are not shifted; where they do not tile the tokens these are padded with zeros, behind
the norm, that are attended to. Sides that a stride does not divide are padded with zeros too. The mean over tokens, a
norm and a linear classifier end it. Reference: timm's port of dingmyu/davit, whose `_fl` models are Florence-2's.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from attnlab.attention.linear.davit import PAPER, ChannelGroupAttention
from attnlab.attention.local.window_attention import WindowAttention
from attnlab.models.pyramid import Pyramid
from attnlab.models.staged import Choice, Models
from attnlab.nn.activations import gelu
from attnlab.registry import Cost, Kind, Source, register


def attention_of(window: int = 7, version: int = 1) -> dict[str, Choice]:
    """Builders of both kinds of attention."""
    windows = {"window": window, "shift": 0, "relative_bias": False, "padded": True}
    return {"spatial": Choice(WindowAttention, windows), "channel": Choice(ChannelGroupAttention, {"version": version})}


@register(
    "davit.backbone",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.THIRD_PARTY,
    repository="huggingface/pytorch-image-models",
    cost=Cost(time="O(N·n·C + N·C·D)", memory="O(N·n·H)"),
    summary="stages of blocks of window attention and of channel group attention in turn",
    small={"features": (8, 16), "num_heads": (2, 2), "depths": (1, 1), "window": 3, "image_size": 32, "num_classes": 5},
)
class DaViT(Pyramid):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are DaViT-T.

    Args:
      features: channels C of each stage.
      num_heads: heads, and groups of channels, of each stage.
      depths: how often each stage goes through the kinds.
      kinds: of attention, "spatial" and "channel", in turn.
      window: tokens on a side of the windows.
      version: of channel group attention, 1 or 2.
      position_activation: whether a GELU follows the convolutions of blocks.
      down_kernel: side of the convolutions between stages, of stride 2.
      **family: further arguments of `Pyramid`; norms have an eps of 1e-5, and the last stands behind the mean.
    """

    def __init__(
        self,
        features: Sequence[int] = (96, 192, 384, 768),
        *,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        depths: Sequence[int] = (1, 1, 3, 1),
        kinds: Sequence[str] = ("spatial", "channel"),
        window: int = 7,
        version: int = 1,
        position_activation: bool = False,
        down_kernel: int = 2,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        self.kinds, builders = tuple(kinds), attention_of(window, version)
        if not kinds or set(kinds) - set(builders):
            raise ValueError(f"kinds must be some of {', '.join(builders)}, got {self.kinds}")
        super().__init__(
            features,
            own=[builders[kind] for kind in kinds],
            stem={"kernel_size": 7},
            down={"kernel_size": down_kernel, "padding": None if down_kernel % 2 else "VALID", "norm_first": True},
            num_heads=num_heads,
            depths=[len(kinds) * depth for depth in depths],
            block={"position_side": 3, "position_activation": gelu if position_activation else None},
            rngs=rngs,
            **({"norm_eps": 1e-5, "norm_first": False} | family),
        )


_BASE = {"features": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32), "depths": (1, 1, 9, 1)}
_FLORENCE = _BASE | {"window": 12, "version": 2, "down_kernel": 3, "image_size": 768}
DAVITS: Models = {
    "davit_tiny": (DaViT, {}),
    "davit_small": (DaViT, {"depths": (1, 1, 9, 1)}),
    "davit_base": (DaViT, _BASE),
    "davit_base_fl": (DaViT, _FLORENCE),
}
"""For `staged.build_named`: tiny, small, base have 28.3, 49.7, 87.9 M parameters (82.8, 84.2, 84.6 % on ImageNet)."""
