"""PATNet (Huang et al., 2025, arXiv:2503.03148): partial attention of channels in three stages, of tokens in the last.

    x = x + γ ⊙ mlp(mix(x))                              a block of the kind "channel": one residual around both
    x = x + mix(x);   x = x + γ ⊙ mlp(x)                 of the kind "self"

    mlp(x) = spatial(W₂ f(BN(W₁ x)))                     without biases; spatial attention, or none

Patches of 4 × 4 with a norm, merged two by two between stages; the mean, a map to 1280 channels with f, and a linear
classifier. The order in a block is that of the authors' code, their follow-up's. The mechanisms are in
`attnlab.mixers.patnet`. Reference: haiduo/PartialNet.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Layout, Site
from attnlab.mixers.patnet import (
    PAPER,
    REPOSITORY,
    PartialChannelAttention,
    PartialConv,
    PartialSelfAttention,
    PartialSpatialAttention,
)
from attnlab.models import staged
from attnlab.models.block import Block
from attnlab.models.staged import Choice, Mixers, Models, Place, Stage, StagedBackbone
from attnlab.nn.activations import Activation, gelu, relu
from attnlab.nn.chain import Chain, call
from attnlab.nn.conv import ConvNorm, PatchEmbed
from attnlab.nn.linear import Linear, trunc_normal
from attnlab.nn.mlp import LayerScale
from attnlab.nn.norms import BatchNorm
from attnlab.points import Edits, visit
from attnlab.registry import Cost, Kind, Source, register

Kinds = Literal["channel", "self"]
ACTIVATIONS = {"relu": relu, "gelu": gelu}
_NO_BIAS: dict[str, Any] = {"use_bias": False, "kernel_init": trunc_normal}


class _Hidden(nnx.Module):
    """f(BN(W x)), without a bias."""

    def __init__(self, features: int, hidden: int, activation: Activation, *, dtype: Any, **stored: Any):
        self.map = Linear(features, hidden, axes=("embed", "mlp"), dtype=dtype, **_NO_BIAS, **stored)
        self.norm, self.activation = BatchNorm(hidden, **stored), activation

    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        return self.activation(self.norm(self.map(x), deterministic=deterministic))


class PartialBlock(Block):
    """A block of PATNet, on images of tokens `(B, H, W, C)`; see the module docstring.

    Args:
      features: channels C.
      mixer: of the tokens.
      one_residual: whether there is one residual around mixer and feed-forward, else one around each.
      mlp_ratio: hidden channels over C, rounded down.
      activation: f.
      spatial: whether spatial attention ends the feed-forward.
      layer_scale: γ at the start; 0 for none.
      drop_path: stochastic depth rate, of the feed-forward's branch alone.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
    """

    def __init__(
        self,
        features: int,
        mixer: nnx.Module,
        *,
        one_residual: bool = True,
        mlp_ratio: float = 2.0,
        activation: Activation = relu,
        spatial: bool = True,
        layer_scale: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common, hidden = {"dtype": dtype, **stored}, int(features * mlp_ratio)
        parts: list[nnx.Module] = [
            _Hidden(features, hidden, activation, **common),
            Linear(hidden, features, axes=("mlp", "embed"), **_NO_BIAS, **common),
        ]
        if spatial:
            parts.append(PartialSpatialAttention(features, **common))
        scale = LayerScale(features, init=layer_scale, **stored) if layer_scale > 0 else None
        super().__init__(mixer, Chain(*parts), None, None, scale2=scale, drop_path=drop_path, rngs=rngs)
        self.one_residual = one_residual

    mixer: Any
    mlp: Any
    scale2: Any
    sums_branches = False

    @property
    def points(self) -> frozenset[str]:
        return super().points - ({"middle"} if self.one_residual else set())

    def _through(self, x: jax.Array, mix: Any, edits: Edits | None, deterministic: bool) -> tuple[jax.Array, Any]:
        x = visit(self, edits, "stream", x)
        y, new = mix(visit(self, edits, "normed", x))
        y = visit(self, edits, "mixed", y)
        if not self.one_residual:
            x = y = visit(self, edits, "middle", x + y)
        y = visit(self, edits, "mlp", call(self.mlp, y, deterministic))
        y = y if self.scale2 is None else self.scale2(y)
        return x + (y if self.drop_path is None else self.drop_path(y, deterministic=deterministic)), new


def partial_mixer(kind: Kinds | None, **options: Any) -> Choice:
    """The mixer of a kind; None for the convolution alone, which has none of its options but `divisor`."""
    if kind is None:
        return Choice(PartialConv, {name: value for name, value in options.items() if name == "divisor"})
    if kind == "channel":
        return Choice(PartialChannelAttention, {n: v for n, v in options.items() if n == "divisor"})
    return Choice(PartialSelfAttention, options)


def partial_block(
    dim: int,
    *,
    kind: Kinds = "channel",
    attends: bool = True,
    num_heads: int = 4,
    divisor: int = 4,
    rngs: nnx.Rngs,
    **options: Any,
) -> PartialBlock:
    """A block of PATNet, alone; `options` as `PartialBlock`."""
    choice = partial_mixer(kind if attends else None, num_heads=num_heads, divisor=divisor)
    mixer = choice(Site(dim, num_heads, Layout.IMAGE), rngs=rngs)
    return PartialBlock(dim, mixer, one_residual=kind != "self", rngs=rngs, **options)


class _Classifier(nnx.Module):
    """Linear(f(W x)): pooled features to logits; without classes it ends before the linear map."""

    def __init__(self, features: int, wide: int, classes: int | None, activation: Activation, **common: Any):
        self.proj, self.activation = Linear(features, wide, **_NO_BIAS, **common), activation
        self.head = nnx.data(staged.classifier(wide, classes, **common))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.activation(self.proj(x))
        return x if self.head is None else self.head(x)


@register(
    "patnet.net",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=Cost(time="O(N·C²+N²·C)", memory="O(N²·H)"),
    summary="stages of partial convolutions beside channel attention, the last beside self-attention",
    small={"features": 8, "depths": (1, 1, 1, 1), "mlp_ratio": 1.0, "num_heads": 2, "projection": 8, "num_classes": 5}
    | {"image_size": 32},
)
class PATNet(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are PATNet-T2.

    Args:
      features: channels C of the first stage; each next one has twice as many.
      depths: blocks of the stages.
      kinds: "channel" or "self" for each stage; the last of four is of self-attention when None.
      num_heads: of the self-attention.
      divisor: n; one in n channels is convolved.
      mlp_ratio: hidden channels of feed-forwards over channels.
      activation: "relu" or "gelu".
      attends: whether the other channels attend; else they stay, as FasterNet's.
      spatial: whether spatial attention ends the feed-forwards.
      layer_scale: factors of the channels of feed-forwards at the start; 0 for none.
      dropout: rates in the self-attention, on weights and result.
      projection: channels that are classified.
      mixers: what takes the place of the mixers, in all stages or in each.
      image_size: pixels on a side, or (rows, columns); None for any that the patches and merging tile.
      channels: of the images.
      num_classes: classes; without any the projected features are the result.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for another activation or kind, or lists of different lengths.
    """

    def __init__(
        self,
        features: int = 64,
        *,
        depths: Sequence[int] = (2, 2, 6, 4),
        kinds: Sequence[Kinds] | None = None,
        num_heads: int = 4,
        divisor: int = 4,
        mlp_ratio: float = 2.0,
        activation: str = "relu",
        attends: bool = True,
        spatial: bool = False,
        layer_scale: float = 0.0,
        dropout: float = 0.1,
        projection: int = 1280,
        mixers: Mixers = None,
        image_size: int | Sequence[int] | None = 224,
        channels: int = 3,
        num_classes: int | None = 1000,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        count = len(depths)
        usual = ("self" if stage == 3 else "channel" for stage in range(count))
        chosen: tuple[Any, ...] = tuple(usual if kinds is None else kinds)
        staged.per_stage(count, kinds=chosen)
        if activation not in ACTIVATIONS or set(chosen) - {"channel", "self"}:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)} and kinds 'channel' or 'self', got {activation!r} "
                f"and {chosen}"
            )
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        size, act = None if image_size is None else staged.pair(image_size), ACTIVATIONS[activation]
        widths = [features << stage for stage in range(count)]
        attention = {"num_heads": num_heads, "attention_dropout": dropout, "projection_dropout": dropout}
        own = [partial_mixer(kind if attends else None, divisor=divisor, **attention) for kind in chosen]
        places = staged.places(
            widths,
            [None if size is None else (size[0] // (4 << s), size[1] // (4 << s)) for s in range(count)],
            num_heads=[num_heads] * count,
            depths=depths,
            own=own,
            mixers=mixers,
            drop_path=drop_path,
        )
        block: dict[str, Any] = {"mlp_ratio": mlp_ratio, "activation": act, "spatial": spatial, **common}
        block["layer_scale"] = layer_scale

        def build(place: Place, kind: str) -> PartialBlock:
            mixer = place.mixer(place.site, place.index, **common)
            one = kind == "channel"
            return PartialBlock(place.site.features, mixer, one_residual=one, drop_path=place.drop_path, **block)

        merge: Callable[..., ConvNorm] = functools.partial(
            ConvNorm, kernel_size=2, stride=2, padding="VALID", norm=BatchNorm, use_bias=False, **common
        )
        stages = [
            Stage([build(place, chosen[s]) for place in here], down=merge(widths[s - 1], widths[s]) if s else None)
            for s, here in enumerate(places)
        ]
        super().__init__(
            PatchEmbed(channels, features, 4, norm=BatchNorm, use_bias=False, **common),
            stages,
            head=_Classifier(widths[-1], projection, num_classes, act, **common),
            image_size=size,
            channels=channels,
            dtype=dtype,
        )


PATNETS: Models = {"patnet_t2": (PATNet, {})}
"""For `staged.build_named`: T2 has the 12.3 M parameters of the authors' class under their configuration; what their
paper counts could not be read."""
