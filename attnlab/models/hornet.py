"""HorNet (Rao et al., NeurIPS 2022, arXiv:2207.14284): a convolutional pyramid of recursive gated convolutions.

    x = x + γ₁ ⊙ gnconv(LN(x));   x = x + γ₂ ⊙ MLP(LN(x))          a block; γ start at 1e-6

A convolution of 4x4 patches and a norm begin it; a norm and a convolution of 2x2 lead from stage to stage, each of
twice the channels; the mean over tokens, a norm and a linear classifier end it. Orders rise from stage to stage. Models
called `_gf` have filters of the whole grid in the last two stages, made for the grids of their images.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from attnlab.mixers.hornet import PAPER, RecursiveGatedConv
from attnlab.models import staged
from attnlab.models.pyramid import Pyramid
from attnlab.models.staged import Choice, Models
from attnlab.nn.conv import redraw_convolutions
from attnlab.nn.linear import trunc_normal
from attnlab.registry import Cost, Kind, Source, register


@register(
    "hornet.backbone",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="raoyongming/HorNet",
    cost=Cost(time="O(N·C·(C+K))", memory="O(N·C)"),
    summary="four stages of recursive gated convolutions of rising order, locally or with filters of the whole grid",
    small={"features": 8, "depths": (1, 1), "orders": (2, 3), "spectra": (None, (4, 3)), "kernel_size": 3}
    | {"num_classes": 5},
)
class HorNet(Pyramid):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are HorNet-T with 7x7 kernels.

    Args:
      features: channels of the first stage; each has twice those of the one before.
      depths: blocks of each stage.
      orders: of the gated convolutions, of each stage; one number for all.
      scale: of their convolutions, one number or one of each stage.
      kernel_size: tokens on a side of their kernels.
      spectra: frequencies (rows, columns) of filters of the whole grid, of each stage; None for convolutions.
      layer_scale: γ at the start; None for none.
      image_size: pixels on a side, or (rows, columns); any when None.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `Pyramid`; the last norm stands behind the mean.

    Raises:
      ValueError: if the lists have different lengths.
    """

    def __init__(
        self,
        features: int = 64,
        *,
        depths: Sequence[int] = (2, 3, 18, 2),
        orders: int | Sequence[int] = (2, 3, 4, 5),
        scale: float | Sequence[float] = 1 / 3,
        kernel_size: int = 7,
        spectra: Sequence[tuple[int, int] | None] | None = None,
        layer_scale: float | None = 1e-6,
        image_size: int | Sequence[int] | None = None,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        stages = len(depths)
        orders = [orders] * stages if isinstance(orders, int) else orders
        scales = scale if isinstance(scale, Sequence) else [scale] * stages
        spectra = [None] * stages if spectra is None else spectra
        staged.per_stage(stages, orders=orders, scale=scales, spectra=spectra)
        mixers = [
            Choice(RecursiveGatedConv, {"order": n, "scale": s, "spectrum": f, "kernel_size": kernel_size})
            for n, s, f in zip(orders, scales, spectra, strict=True)
        ]
        super().__init__(
            [features * 2**stage for stage in range(stages)],
            own=[[mixer] for mixer in mixers],
            stem={"kernel_size": 4, "padding": "VALID"},
            down={"kernel_size": 2, "padding": "VALID", "norm_first": True},
            num_heads=(1,) * stages,
            depths=depths,
            block={"layer_scale": layer_scale},
            image_size=image_size,
            rngs=rngs,
            **({"norm_first": False} | family),
        )
        redraw_convolutions(self, trunc_normal, rngs=rngs)


def _sizes(name: str, features: int, images: Sequence[int] = (224,)) -> Models:
    """A size with 7x7 kernels, and with filters for images of so many pixels."""
    models: dict[str, Any] = {f"hornet_{name}_7x7": (HorNet, {"features": features})}
    for side in images:
        spectra = [None, None, *((side // stride, side // stride // 2 + 1) for stride in (16, 32))]
        ending = "" if side == 224 else f"_img{side}"
        models[f"hornet_{name}_gf{ending}"] = (HorNet, {"features": features, "spectra": spectra})
    return models


HORNETS: Models = {
    **_sizes("tiny", 64),
    **_sizes("small", 96),
    **_sizes("base", 128, (224, 384)),
    **_sizes("large", 192, (224, 384)),
}
"""For `staged.build_named`. Tiny, small and base have 22, 50 and 87 M parameters (82.8, 83.8, 84.2 % on ImageNet with
7x7 kernels, 83.0, 84.0, 84.3 % with filters)."""
