"""L2ViT (Zheng, 2025, arXiv:2501.16182): windows and clamped linear attention in turn, with local concentration.

    x = x + DWConv(x);   x = x + windows(LN(x));   x = x + DWConv(x);    x = x + MLP(LN(x))          a local block
    x = x + DWConv(x);   x = x + linear(LN(x));    x = x + LCM(LN(x));   x = x + MLP(LN(x))          a global block

Linear attention spreads its weights over all tokens. The local concentration module (LCM) behind it, two depthwise
7x7 convolutions with GELU and a batch norm between them, brings what is near back. Windows have no position bias and
are not shifted; zeros, behind the norm, fill up those at the border and are attended to. The code is at
ChuanyangZheng/L2ViT, classification/models/l2vit.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention.linear.l2vit import PAPER, ClampedLinearAttention
from attnlab.attention.local.window_attention import WindowAttention
from attnlab.models.pyramid import Pyramid
from attnlab.models.staged import Builder, Choice, Models, Place
from attnlab.nn.activations import gelu, relu
from attnlab.nn.chain import Chain
from attnlab.nn.conv import ConvNorm, ConvStem
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.mlp import DropPath
from attnlab.nn.norms import BatchNorm, LayerNorm
from attnlab.registry import Cost, Kind, Source, register

STEMS = ("convolutions", "four convolutions", "patches", "overlapping patches")


class LocalConcentration(nnx.Module):
    """Depthwise convolution, GELU, batch norm, depthwise convolution: `(B, Hh, Ww, C)` to the same shape.

    Args:
      features: channels C.
      kernel_size: side of both kernels, odd.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        *,
        kernel_size: int = 7,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common, sides = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}, (kernel_size, kernel_size)
        self.conv1 = DepthwiseConv(features, sides, activation=gelu, **common)
        self.norm = BatchNorm(features, param_dtype=param_dtype, rngs=rngs)
        self.conv2 = DepthwiseConv(features, sides, **common)

    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        return self.conv2(self.norm(self.conv1(x), deterministic=deterministic))


def concentrated(
    features: int, *, drop_path: float = 0.0, norm_eps: float = 1e-5, rngs: nnx.Rngs, **common: Any
) -> nnx.Module:
    """What a global block adds behind its attention: a norm and local concentration, under stochastic depth."""
    norm = LayerNorm(features, eps=norm_eps, param_dtype=common.get("param_dtype", jnp.float32), rngs=rngs)
    return Chain(norm, LocalConcentration(features, **common, rngs=rngs), DropPath(drop_path, rngs=rngs))


def attention_of(kind: str, window: int = 7) -> Builder:
    """Builder of the attention of a block."""
    if kind == "local":
        windows = {"window": window, "shift": 0, "relative_bias": False, "padded": True}
        return Choice(WindowAttention, windows)
    return Choice(ClampedLinearAttention)


def options_of(kind: str, *, enhanced: bool = True, position_activation: bool = False) -> dict[str, Any]:
    """Options of `transformer_block` for a block."""
    options = {"norm_eps": 1e-5, "position_side": 3, "position_activation": gelu if position_activation else None}
    if kind == "global":
        options |= {"before2": concentrated if enhanced else None, "position_twice": False}
    return options


@register(
    "l2vit.backbone",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="ChuanyangZheng/L2ViT",
    cost=Cost(time="O(N·n·C + N·C·D)", memory="O(N·n·H)"),
    summary="stages of window attention and of linear attention with local concentration in turn",
    small={"features": (8, 16), "num_heads": (2, 2), "depths": (2, 2), "window": 3, "image_size": 32, "num_classes": 5},
)
class L2ViT(Pyramid):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are L2ViT-T.

    Args:
      features: channels C of each stage.
      num_heads: heads of each stage.
      depths: blocks of each stage.
      kinds: of the blocks of a stage in turn, each `local` (windows) or `global` (clamped linear attention).
      window: side of the windows.
      entry: what makes the first stage's tokens: `convolutions` (two), `four convolutions`, `patches` or
        `overlapping patches` of 7x7 pixels.
      overlapping: whether 3x3 convolutions lead from stage to stage, not 2x2.
      position_activation: whether a GELU follows the depthwise convolution in front of a branch.
      last_features: channels of a linear map and ReLU in front of the mean over tokens; None for none.
      channels: of the images.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `Pyramid`: mixers in place of these, sizes, rates.

    Raises:
      ValueError: for another kind or entry, or lists of different lengths.
    """

    def __init__(
        self,
        features: Sequence[int] = (96, 192, 384, 768),
        *,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        depths: Sequence[int] = (2, 2, 6, 2),
        kinds: Sequence[str] = ("local", "global"),
        window: int = 7,
        entry: str = "convolutions",
        overlapping: bool = False,
        position_activation: bool = False,
        last_features: int | None = None,
        channels: int = 3,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        if not kinds or set(kinds) - {"local", "global"}:
            raise ValueError(f"kinds must be some of local, global, got {tuple(kinds)}")
        if entry not in STEMS:
            raise ValueError(f"entry must be one of {', '.join(STEMS)}, got {entry!r}")
        self.kinds = tuple(kinds)
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def block(place: Place) -> Mapping[str, Any]:
            return options_of(self.kinds[place.index % len(kinds)], position_activation=position_activation)

        last = None
        if last_features is not None:
            norm = LayerNorm(features[-1], eps=1e-5, param_dtype=param_dtype, rngs=rngs)
            last = Chain(norm, ConvNorm(features[-1], last_features, (1,), norm=None, activation=relu, **common))
        super().__init__(
            features,
            own=[attention_of(kind, window) for kind in kinds],
            stem=_stem(entry, channels, features[0], **common),
            down={"kernel_size": 3 if overlapping else 2, "padding": None if overlapping else "VALID"}
            | {"norm_first": True},
            num_heads=num_heads,
            depths=depths,
            block=block,
            last=last,
            last_features=last_features,
            redraw_convolutions=True,
            channels=channels,
            **{"norm_eps": 1e-5, **family, **common},
        )


def _stem(entry: str, channels: int, features: int, *, rngs: nnx.Rngs, **common: Any) -> Chain:
    half = features // 2
    norm = LayerNorm(features, eps=1e-5, param_dtype=common["param_dtype"], rngs=rngs)
    if entry == "convolutions":
        first = ConvStem(channels, (half, features), strides=(2, 2), activation=relu, filled=True, rngs=rngs, **common)
        return Chain(first, norm)
    if entry == "four convolutions":
        sides = {"strides": (2, 1, 1), "kernel_size": (7, 3, 3), "use_bias": False}
        acts = {"activation": relu, "last_activation": relu}
        first = ConvStem(channels, (half,) * 3, **sides, **acts, filled=True, rngs=rngs, **common)
        options = {"stride": 2, "padding": "VALID", "filled": True, "norm": None}
        return Chain(first, ConvNorm(half, features, 2, **options, rngs=rngs, **common), norm)
    side, padding = (4, "VALID") if entry == "patches" else (7, None)
    options = {"stride": 4, "padding": padding, "filled": True, "norm": None}
    return Chain(ConvNorm(channels, features, side, **options, rngs=rngs, **common), norm)


_SMALL = {"depths": (2, 2, 18, 2)}
_BASE = _SMALL | {"features": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
L2VITS: Models = {
    "l2vit_tiny": (L2ViT, {}),
    "l2vit_small": (L2ViT, _SMALL),
    "l2vit_base": (L2ViT, _BASE),
    "l2vit_base_384": (L2ViT, _BASE | {"window": 12, "image_size": 384}),
}
"""For `staged.build_named`: tiny, small, base have 29, 50, 89 M parameters (83.1, 84.1, 84.4 % on ImageNet)."""
