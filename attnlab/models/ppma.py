"""PPMAViT (Zhao et al., NeurIPS 2025, arXiv:2506.15940): a pyramid of polyline path masked attention.

    x = x + DWConv(x);   x = x + γ₁ attention(LN(x));   x = x + γ₂ FFN(LN(x))             a block
    FFN:  h = GELU(W₁ x);   h = h + DWConv3×3(h);   W₂ h

A stem of four 3x3 convolutions, one between stages, each with a batch norm; in the end a linear map, batch norm, SiLU,
the mean over tokens and the classifier. The first stages have the separable form of the attention, the last ones the
whole. The code is at zhongchenzhao/PPMA.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.attention.dense.ppma import PAPER, PolylinePathAttention, SeparablePolylineAttention
from attnlab.models import staged
from attnlab.models.pyramid import Pyramid
from attnlab.models.staged import Choice, Models
from attnlab.nn.activations import silu
from attnlab.nn.conv import ConvNorm, ConvStem
from attnlab.nn.norms import BatchNorm
from attnlab.registry import Cost, Kind, Source, register

ATTENTIONS = {"separable": Choice(SeparablePolylineAttention), "whole": Choice(PolylinePathAttention)}
BLOCK = {
    "position_side": 3,
    "position_twice": False,
    "mlp": {"depthwise": 3, "residual": True, "activation_at": ("map",)},
}
"""Options of `staged.transformer_block` for the blocks, beside the layer scale."""


@register(
    "ppma.backbone",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="zhongchenzhao/PPMA",
    cost=Cost(time="O(N·(Hh+Ww)·C) per separable block", memory="O(N·(Hh+Ww)·H)"),
    summary="stages of attention that decays along polylines, separable first and whole in the last",
    small={
        "features": (8,),
        "num_heads": (2,),
        "depths": (1,),
        "kinds": ("separable",),
        "layer_scales": (1.0,),
        "projection": 16,
        "mlp_ratio": 1.0,
        "image_size": 32,
        "num_classes": 5,
    },
)
class PPMAViT(Pyramid):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are PPMA-T.

    Args:
      features: channels C of each stage.
      num_heads: heads of each stage.
      depths: blocks of each stage.
      kinds: attention of each stage, `separable` or `whole`.
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
        num_heads: Sequence[int] = (4, 4, 8, 16),
        depths: Sequence[int] = (2, 2, 8, 2),
        kinds: Sequence[str] = ("separable", "separable", "whole", "whole"),
        layer_scales: Sequence[float | None] | None = None,
        projection: int = 1024,
        mlp_ratio: float | Sequence[float] = 3.0,
        channels: int = 3,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        scales = [None] * len(depths) if layer_scales is None else layer_scales
        staged.per_stage(len(depths), kinds=kinds, layer_scales=scales)
        if set(kinds) - set(ATTENTIONS):
            raise ValueError(f"kinds must be some of {', '.join(ATTENTIONS)}, got {tuple(kinds)}")
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        half = features[0] // 2
        widths, act = (half, half, features[0], features[0]), {"norm": BatchNorm, "activation": silu}
        super().__init__(
            features,
            own=[[ATTENTIONS[kind]] for kind in kinds],
            stem=ConvStem(channels, widths, strides=(2, 1, 2, 1), **common),
            down={"kernel_size": 3, "norm": BatchNorm},
            num_heads=num_heads,
            depths=depths,
            block=[{**BLOCK, "layer_scale": scale} for scale in scales],
            mlp_ratio=mlp_ratio,
            last=ConvNorm(features[-1], projection, (1,), **act, **common),
            last_features=projection,
            channels=channels,
            **common,
            **family,
        )


_LATE = {"kinds": ("separable", "separable", "separable", "whole"), "mlp_ratio": (4.0, 4.0, 3.0, 3.0)}
_BASE = {"features": (80, 160, 320, 512), "num_heads": (5, 5, 10, 16), "depths": (4, 8, 25, 8)}
PPMAS: Models = {
    "ppma_tiny": (PPMAViT, {}),
    "ppma_small": (PPMAViT, {"depths": (3, 4, 18, 4)} | _LATE),
    "ppma_base": (PPMAViT, _BASE | _LATE | {"layer_scales": (None, None, 1e-6, 1e-6)}),
}
"""For `staged.build_named`: 14, 27 and 54 M parameters (82.6, 84.2 and 85.0 % on ImageNet-1K)."""
