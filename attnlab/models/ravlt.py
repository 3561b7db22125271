"""RAVLT (Fan et al., CVPR 2025, arXiv:2411.07635): a pyramid of rank-augmented linear attention.

    x = x + DWConv(x);   x = x + γ₁ attention(LN(x));   x = x + γ₂ FFN(LN(x))             a block
    FFN:  h = GELU(W₁ x);   h = h + DWConv3×3(h);   W₂ h

A stem of four 3x3 convolutions, one between stages, each with a batch norm; in the end a linear map, batch norm, SiLU,
the mean over tokens and the classifier. The first two stages have linear attention, the last two softmax attention with
the same modulation. The code is at qhfan/RALA, classfication/RALA.py.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.attention.linear.rala import PAPER, ModulatedSoftmaxAttention, RankAugmentedLinearAttention
from attnlab.models import staged
from attnlab.models.pyramid import Pyramid
from attnlab.models.staged import Choice, Models
from attnlab.nn.activations import silu
from attnlab.nn.conv import ConvNorm, ConvStem
from attnlab.nn.norms import BatchNorm
from attnlab.registry import Cost, Kind, Source, register

ATTENTIONS = {"linear": Choice(RankAugmentedLinearAttention), "softmax": Choice(ModulatedSoftmaxAttention)}
BLOCK = {
    "position_side": 3,
    "position_twice": False,
    "mlp": {"depthwise": 3, "residual": True, "activation_at": ("map",)},
}
"""Options of `staged.transformer_block` for RAVLT's blocks, beside the layer scale."""


@register(
    "rala.backbone",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="qhfan/RALA",
    cost=Cost(time="O(N·C·D) per linear block", memory="O(N·C)"),
    summary="stages of rank-augmented linear attention, then of softmax attention with the same modulation",
    small={
        "features": (8, 16),
        "num_heads": (2, 2),
        "depths": (1, 1),
        "kinds": ("linear", "softmax"),
        "layer_scales": (1.0, 1.0),
        "projection": 16,
        "image_size": 32,
        "num_classes": 5,
    },
)
class Ravlt(Pyramid):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are RAVLT-T.

    Args:
      features: channels C of each stage.
      num_heads: heads of each stage.
      depths: blocks of each stage.
      kinds: attention of each stage, `linear` or `softmax`, or of each of its blocks.
      layer_scales: γ of each stage at the start; None for none.
      projection: channels behind the last linear map.
      mlp_ratio: hidden channels of feed-forwards over channels, in all stages or in each.
      channels: of the images.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `Pyramid`: mixers in place of these, sizes, rates.

    Raises:
      ValueError: for another kind, or lists of different lengths.
    """

    def __init__(
        self,
        features: Sequence[int] = (64, 128, 256, 512),
        *,
        num_heads: Sequence[int] = (1, 2, 4, 8),
        depths: Sequence[int] = (2, 2, 6, 2),
        kinds: Sequence[str | Sequence[str]] = ("linear", "linear", "softmax", "softmax"),
        layer_scales: Sequence[float | None] = (1.0, 1.0, 1.0, 1.0),
        projection: int = 1024,
        mlp_ratio: float | Sequence[float] = 3.5,
        channels: int = 3,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        staged.per_stage(len(depths), kinds=kinds, layer_scales=layer_scales)
        turns = [(kind,) if isinstance(kind, str) else tuple(kind) for kind in kinds]
        if any(not turn or set(turn) - set(ATTENTIONS) for turn in turns):
            raise ValueError(f"kinds must be some of {', '.join(ATTENTIONS)}, got {tuple(kinds)}")
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        half, act = features[0] // 2, {"norm": BatchNorm, "activation": silu}
        super().__init__(
            features,
            own=[[ATTENTIONS[kind] for kind in turn] for turn in turns],
            stem=ConvStem(channels, (half, half, half, features[0]), strides=(2, 1, 1, 2), **common),
            down={"kernel_size": 3, "norm": BatchNorm},
            num_heads=num_heads,
            depths=depths,
            block=[{**BLOCK, "layer_scale": scale} for scale in layer_scales],
            mlp_ratio=mlp_ratio,
            last=ConvNorm(features[-1], projection, (1,), **act, **common),
            last_features=projection,
            redraw_convolutions=True,
            channels=channels,
            **common,
            **family,
        )


_BASE = {"features": (96, 192, 384, 512), "num_heads": (1, 2, 6, 8), "depths": (4, 6, 12, 6)}
_LARGE = {"features": (96, 192, 448, 640), "num_heads": (1, 2, 7, 10), "depths": (4, 7, 19, 8)}
RAVLTS: Models = {
    "ravlt_tiny": (Ravlt, {}),
    "ravlt_small": (Ravlt, {"features": (64, 128, 320, 512), "num_heads": (1, 2, 5, 8), "depths": (3, 5, 9, 3)}),
    "ravlt_base": (Ravlt, _BASE | {"layer_scales": (1.0, 1.0, 1e-6, 1e-6)}),
    "ravlt_large": (Ravlt, _LARGE | {"layer_scales": (1e-6, 1e-6, 1e-6, 1e-6)}),
}
"""For `staged.build_named`: 15, 26, 48 and 95 M parameters (the small one 84.4 % on ImageNet-1K)."""
