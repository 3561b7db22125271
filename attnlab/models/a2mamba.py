"""A2Mamba (2025, arXiv:2507.16624): a pyramid of attention-augmented state space models.

    x = x + DWConv3×3(x);   x = x + γ₁ attention(LN(x));   x = x + DWConv3×3(x);   x = x + γ₂ FFN(LN(x))        a block
    FFN:  h = GELU(W₁ x);   h = h + DWConv3×3(h);   W₂ h

γ are factors of channels with a bias, of the branches or, scaled="skip", of the skip connections beside them; there may
be none. Stages but the last scan (`a2mamba`), the last attends to all of its tokens. A stem of four 3×3 convolutions,
one between stages, each with a batch norm and no bias; in the end a linear map, batch norm, SiLU, the mean over tokens
and the classifier. The code is at LMMMEng/A2Mamba, models/a2mamba.py.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.attention.local.a2mamba import PAPER, NeighborhoodScanAttention
from attnlab.models import staged
from attnlab.models.pyramid import Pyramid
from attnlab.models.staged import Choice, Models
from attnlab.nn.activations import silu
from attnlab.nn.conv import ConvNorm, ConvStem
from attnlab.nn.norms import BatchNorm
from attnlab.registry import Cost, Kind, Source, register

KINDS = ("scan", "whole")
BLOCK: dict[str, Any] = {
    "position_side": 3,
    "mlp": {"depthwise": 3, "residual": True, "activation_at": ("map",)},
    "scale_bias": True,
}
"""Options of `staged.transformer_block` for A2Mamba's blocks, beside the factors themselves."""


@register(
    "a2mamba.net",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="LMMMEng/A2Mamba",
    cost=Cost(time="O(N·C·K²) per scanning block", memory="O(N·C)"),
    summary="stages of scans whose states attend to each other, then of attention over all tokens",
    small={
        "features": (8,),
        "num_heads": (2,),
        "depths": (1,),
        "kinds": ("scan",),
        "kernel_sizes": (3,),
        "mlp_ratio": (2,),
        "projection": 8,
        "image_size": 32,
        "num_classes": 5,
    },
)
class A2Mamba(Pyramid):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are A2Mamba-T.

    Args:
      features: channels C of each stage.
      num_heads: heads of each stage.
      depths: blocks of each stage.
      kinds: `scan` or `whole`, for each stage.
      kernel_sizes: K of each stage, which must fit its grid.
      dilation: of the first half of the heads.
      relative_bias: whether attention has biases.
      layer_scales: γ of each stage at the start; None for none.
      scaled: what γ are factors of, "branch" or "skip", in all stages or in each.
      projection: channels behind the last linear map.
      mlp_ratio: hidden channels of feed-forwards over channels, in all stages or in each.
      image_size: pixels on a side, or (rows, columns); None for any.
      bias_size: the size of images that the biases of whole stages are for; `image_size` when None.
      channels: of the images.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `Pyramid`: mixers in place of these, classes, rates.

    Raises:
      ValueError: for another kind, lists of different lengths, or windows that do not fit.
    """

    def __init__(
        self,
        features: Sequence[int] = (48, 96, 256, 448),
        *,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        depths: Sequence[int] = (2, 2, 10, 2),
        kinds: Sequence[str] = ("scan", "scan", "scan", "whole"),
        kernel_sizes: Sequence[int] = (11, 9, 7, 7),
        dilation: int = 1,
        relative_bias: bool = True,
        layer_scales: Sequence[float | None] | None = None,
        scaled: str | Sequence[str] = "branch",
        projection: int = 1024,
        mlp_ratio: float | Sequence[float] = (4, 4, 3, 3),
        image_size: int | Sequence[int] | None = 224,
        bias_size: int | Sequence[int] | None = None,
        channels: int = 3,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        count = len(depths)
        scales = [None] * count if layer_scales is None else list(layer_scales)
        sides = [scaled] * count if isinstance(scaled, str) else list(scaled)
        staged.per_stage(count, kinds=kinds, kernel_sizes=kernel_sizes, layer_scales=scales, scaled=sides)
        if set(kinds) - set(KINDS):
            raise ValueError(f"kinds must be some of {', '.join(KINDS)}, got {tuple(kinds)}")
        size = image_size if bias_size is None else bias_size
        shared = {"dilation": dilation, "relative_bias": relative_bias}
        own = []
        for stage, (kind, kernel_size) in enumerate(zip(kinds, kernel_sizes, strict=True)):
            grid = None if size is None else tuple(-(-side // (4 << stage)) for side in staged.pair(size))
            options = {"kernel_size": kernel_size, "whole": kind == "whole", "bias_grid": grid, **shared}
            own.append([Choice(NeighborhoodScanAttention, options)])
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        half, act = features[0] // 2, {"norm": BatchNorm, "activation": silu}
        stem = {"strides": (2, 1, 2, 1), "use_bias": False}
        super().__init__(
            features,
            own=own,
            stem=ConvStem(channels, (half, half, features[0], features[0]), **stem, **common),
            down={"kernel_size": 3, "norm": BatchNorm, "use_bias": False},
            num_heads=num_heads,
            depths=depths,
            block=[{**BLOCK, "layer_scale": scale, "scaled": side} for scale, side in zip(scales, sides, strict=True)],
            mlp_ratio=mlp_ratio,
            last=ConvNorm(features[-1], projection, (1,), **act, **common),
            last_features=projection,
            redraw_convolutions=True,
            image_size=image_size,
            channels=channels,
            **common,
            **family,
        )


def _sizes(features: Sequence[int], depths: Sequence[int], num_heads: Sequence[int], **options: Any) -> dict[str, Any]:
    return {"features": features, "depths": depths, "num_heads": num_heads, **options}


_SCALED: dict[str, Any] = {"layer_scales": (1.0, 1.0, 1e-6, 1e-6)}
_SKIPS: dict[str, Any] = {"layer_scales": (None, None, 1.0, 1.0), "scaled": ("branch", "branch", "skip", "skip")}
A2MAMBAS: Models = {
    "a2mamba_nano": (A2Mamba, _sizes((32, 64, 128, 192), (2, 2, 8, 2), (2, 2, 4, 8))),
    "a2mamba_tiny": (A2Mamba, {}),
    "a2mamba_small": (A2Mamba, _sizes((64, 128, 320, 512), (2, 4, 12, 4), (2, 4, 10, 16), **_SKIPS)),
    "a2mamba_base": (
        A2Mamba,
        _sizes((96, 192, 384, 512), (4, 6, 12, 6), (4, 8, 12, 16), mlp_ratio=(4, 4, 3.75, 3.75), **_SCALED),
    ),
    "a2mamba_large": (
        A2Mamba,
        _sizes((96, 192, 448, 672), (4, 6, 18, 6), (4, 8, 16, 24), mlp_ratio=(4, 4, 4, 4), **_SCALED),
    ),
}
"""For `staged.build_named`: as the authors' classes they have 4.2, 15.4, 30.7, 51.1 and 93.7 M parameters, in their
table 4, 15, 31, 51 and 95, and 78.7, 83.0, 84.7, 85.7 and 86.1 % on ImageNet-1K."""
