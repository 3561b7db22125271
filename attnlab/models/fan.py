"""FAN (Zhou et al., ICML 2022, arXiv:2204.12451) with token-aware pooling (Guo et al., ICCV 2023, arXiv:2303.11126).

    x = x + γ₁ attention(LN(TAP(x)));   x = x + γ₂ channels(LN(x))                                   a block
    channels(y)[n, c] = t_h σ(Σ_m softmax_m(W y)[m, c] k[m]) LN(MLP(y))[n, c],   k = mean of softmax_m(y) over the head
    MLP(y) = W₂ (h + γ DWConv(BN(GELU(DWConv(h))))),   h = W₁ y

so that a head's channels are weighed by their agreement with the tokens that its channels have in common. Strided
convolutions with batch norms make the tokens, and sines of both coordinates, mapped linearly, are added. Behind the
blocks a class token joins, which alone attends in two more blocks:

    u = LN(x);   x = x + γ₁ [attention(u); u tokens];   z = LN(x);   x = z + [γ₂ MLP(z class); z tokens]

and which a norm and a linear classifier read. The code is at guoyongcs/TAPADL, TAPADL_FAN/models/tap_fan.py.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.contract import Given, Layout, TokenMixer
from attnlab.mixers.tap import PAPER, TokenAwarePooling
from attnlab.models import staged
from attnlab.models.block import Block
from attnlab.models.staged import Choice, Mixers, Models, Place, Prefix, Stage, StagedBackbone
from attnlab.nn.activations import gelu
from attnlab.nn.chain import call
from attnlab.nn.conv import ConvStem, redraw_convolutions
from attnlab.nn.cross_attention import CrossAttention
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.linear import Linear, trunc_normal
from attnlab.nn.mlp import MLP, LayerScale
from attnlab.nn.norms import BatchNorm, LayerNorm
from attnlab.nn.positions import masked_grid_positions
from attnlab.registry import Cost, Kind, Source, register
from pallas_kernels.dtypes import at_least_float32

STEMS = {16: (8, 4, 2, 1), 8: (4, 2, 1), 4: (4, 1)}
"""By the side of a patch: C over the channels of each strided convolution."""


class FourierPositions(nnx.Module):
    """Sines and cosines of both coordinates, mapped linearly, to be added to the tokens.

    Args:
      features: channels C.
      hidden_features: numbers for each coordinate.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int = 32,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.hidden_features = hidden_features
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.map = Linear(2 * hidden_features, features, axes=(None, "embed"), **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(1, H, W, C)` for tokens `(B, H, W, C)`."""
        table = masked_grid_positions(jnp.ones((1, *x.shape[1:-1]), bool), 2 * self.hidden_features)
        return self.map(table.astype(x.dtype))


class ScaledConvolutions(nnx.Module):
    """γ DWConv(BN(GELU(DWConv(h)))), of 3 x 3 tokens; `(B, H, W, C)` to the same shape."""

    def __init__(self, features: int, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        self.first, self.second = (
            DepthwiseConv(features, (3, 3), axes=("mlp",), dtype=dtype, **stored) for _ in range(2)
        )
        self.norm = BatchNorm(features, **stored)
        self.scale = LayerScale(features, init=1.0, **stored)

    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        return self.scale(self.second(call(self.norm, gelu(self.first(x)), deterministic)))


class ChannelProcessing(nnx.Module):
    """The feed-forward whose channels are weighed: `(B, H, W, C)` to the same shape.

    Args:
      features: channels C.
      num_heads: heads, of channels side by side.
      mlp_ratio: hidden channels over channels, rounded down.
      use_bias: whether the map to the queries has a bias.
      norm_eps: of the norm of what is weighed.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the heads do not divide the channels.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        mlp_ratio: float = 4.0,
        use_bias: bool = True,
        norm_eps: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        self.num_heads = num_heads
        self.query = Linear(features, features, use_bias=use_bias, dtype=dtype, **stored)
        conv = {"depthwise": ScaledConvolutions, "residual": True, "activation_at": ()}
        self.mlp = MLP(features, int(features * mlp_ratio), **conv, dtype=dtype, **stored)
        self.norm = LayerNorm(features, eps=norm_eps, **stored)
        temperature = jnp.ones((num_heads,), param_dtype)
        self.temperature = nnx.Param(temperature, logical_axes=(None,), weight_decay=False)

    def weights(self, y: ArrayLike) -> jax.Array:
        """Factors of the channels `(B, C)` in float32 (or wider)."""
        y = jnp.asarray(y)
        tokens = y.reshape(y.shape[0], -1, self.num_heads, y.shape[-1] // self.num_heads)
        wide = at_least_float32(y.dtype)
        q = jax.nn.softmax(self.query(y).reshape(tokens.shape).astype(wide), axis=1)
        k = jax.nn.softmax(tokens.astype(wide), axis=1).mean(-1)
        agreement = jax.nn.sigmoid(jnp.einsum("bnhd,bnh->bhd", q, k))
        return (agreement * self.temperature[...].astype(wide)[:, None]).reshape(y.shape[0], -1)

    def __call__(self, y: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        y = jnp.asarray(y)
        value = self.norm(call(self.mlp, y, deterministic))
        return value * self.weights(y).astype(value.dtype)[:, None, None]


class PooledAttention(TokenMixer):
    """attention(LN(TAP(x))): images `(B, H, W, C)` to the same shape.

    Args:
      pool: the pooling.
      norm: behind it.
      attention: a mixer of images or of sequences.
    """

    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE
    norms_its_input = True

    def __init__(self, pool: TokenAwarePooling, norm: nnx.Module, attention: nnx.Module):
        self.features, self.dtype = pool.features, pool.dtype
        self.pool, self.norm, self.attention = pool, norm, attention
        self.points = getattr(attention, "points", frozenset())

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        y = self.norm(self.pool(x, deterministic=given.deterministic))
        if getattr(self.attention, "layout", Layout.IMAGE) is Layout.SEQUENCE:
            y = y.reshape(y.shape[0], -1, y.shape[-1])
        told = {"edits": given.edits} if isinstance(self.attention, TokenMixer) else {}
        return call(self.attention, y, given.deterministic, **told).reshape(x.shape)


class ClassAttention(nnx.Module):
    """The first token attends to all, the others stay: `(B, 1 + N, C)` to the same shape.

    Arguments as `CrossAttention`.
    """

    def __init__(self, features: int, **options: Any):
        self.attention = CrossAttention(features, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([self.attention(x[:, :1], x), x[:, 1:]], 1)


class ClassFeedForward(nnx.Module):
    """z = LN(x), then z + [γ MLP(z class); z tokens]; `(B, 1 + N, C)` to the same shape.

    Args:
      features: channels C.
      mlp_ratio: hidden channels over channels, rounded down.
      scale: γ at the start.
      norm_tokens: whether the norm is of all tokens, not of the class token alone.
      norm_eps: of the norm.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        *,
        mlp_ratio: float = 4.0,
        scale: float = 1.0,
        norm_tokens: bool = True,
        norm_eps: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        self.norm_tokens, self.norm = norm_tokens, LayerNorm(features, eps=norm_eps, **stored)
        self.mlp = MLP(features, int(features * mlp_ratio), dtype=dtype, **stored)
        self.scale = LayerScale(features, init=scale, **stored)

    def __call__(self, x: jax.Array) -> jax.Array:
        z = self.norm(x) if self.norm_tokens else jnp.concatenate([self.norm(x[:, :1]), x[:, 1:]], 1)
        return z + jnp.concatenate([self.scale(self.mlp(z[:, :1])), z[:, 1:]], 1)


def fan_block(
    place: Place,
    *,
    num_scales: int = 4,
    channel_heads: int | None = None,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    scale: float = 1.0,
    norm_eps: float = 1e-6,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Block:
    """A block.

    Args:
      place: where it stands.
      num_scales: of the pooling.
      channel_heads: heads of the weighed feed-forward; those of the attention when None.
      mlp_ratio: hidden channels over channels.
      qkv_bias: whether the maps to queries, keys and values have a bias, here and there.
      scale: γ at the start.
      norm_eps: of both norms; that inside the weighed feed-forward has 1e-5.
      dtype: of the computation; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
    """
    features, stored = place.site.features, {"param_dtype": param_dtype, "rngs": rngs}
    common = {"dtype": dtype, **stored}
    attention = place.mixer(place.site, place.index, qkv_bias=qkv_bias, **common)
    pool, norm = (
        TokenAwarePooling(features, num_scales=num_scales, **common),
        LayerNorm(features, eps=norm_eps, **stored),
    )
    heads = place.site.num_heads if channel_heads is None else channel_heads
    return Block(
        PooledAttention(pool, norm, attention),
        ChannelProcessing(features, num_heads=heads, mlp_ratio=mlp_ratio, use_bias=qkv_bias, **common),
        None,
        LayerNorm(features, eps=norm_eps, **stored),
        scale1=LayerScale(features, init=scale, **stored),
        scale2=LayerScale(features, init=scale, **stored),
        drop_path=place.drop_path,
        rngs=rngs,
    )


def class_block(
    features: int,
    *,
    num_heads: int,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    scale: float = 1.0,
    norm_tokens: bool = True,
    norm_eps: float = 1e-6,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Block:
    """A block in which the class token alone attends; arguments as `ClassAttention` and `ClassFeedForward`."""
    stored = {"param_dtype": param_dtype, "rngs": rngs}
    common = {"dtype": dtype, **stored}
    feed = {"mlp_ratio": mlp_ratio, "scale": scale, "norm_tokens": norm_tokens, "norm_eps": norm_eps}
    return Block(
        ClassAttention(features, num_heads=num_heads, use_bias=qkv_bias, **common),
        None,
        LayerNorm(features, eps=norm_eps, **stored),
        None,
        scale1=LayerScale(features, init=scale, **stored),
        after=ClassFeedForward(features, **feed, **common),
        rngs=rngs,
    )


@register(
    "tap_adl.backbone",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="guoyongcs/TAPADL",
    cost=Cost(time="O(N²·C)", memory="O(N²·H)"),
    summary="attention to tokens that were averaged with those around them, and feed-forwards of weighed channels",
    small={
        "features": 16,
        "num_heads": 2,
        "depth": 1,
        "patch_size": 8,
        "num_scales": 2,
        "mlp_ratio": 1.0,
        "class_depth": 1,
        "image_size": 32,
        "num_classes": 5,
    },
)
class FAN(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are TAP-FAN-T-ViT.

    Args:
      features: channels C.
      num_heads: heads.
      depth: blocks.
      patch_size: pixels on a side of a patch: 4, 8 or 16.
      num_scales: of the pooling in front of attention.
      channel_heads: heads of the weighed feed-forwards; those of the attention when None.
      mlp_ratio: hidden channels of feed-forwards over channels.
      qkv_bias: whether the maps to queries, keys and values have a bias.
      scale: γ of all branches at the start.
      positions: whether positions are added to the tokens.
      class_depth: blocks of class attention.
      norm_tokens: whether the second norm of these is of all tokens.
      mixers: what takes the place of the attention, in all blocks: a registered mixer's name, or a builder.
      replaced: in how many of the first blocks; in all when None.
      image_size: pixels on a side, or (rows, columns); None for any, with mixers that need no grid.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      attention_dropout: rate on attention weights.
      drop_path: stochastic depth rate of all blocks.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for another patch size, or without class attention.
    """

    def __init__(
        self,
        features: int = 192,
        *,
        num_heads: int = 4,
        depth: int = 12,
        patch_size: int = 16,
        num_scales: int = 4,
        channel_heads: int | Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        scale: float = 1.0,
        positions: bool = True,
        class_depth: int = 2,
        norm_tokens: bool = True,
        mixers: Mixers = None,
        replaced: int | None = None,
        image_size: int | Sequence[int] | None = 224,
        channels: int = 3,
        num_classes: int | None = 1000,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if patch_size not in STEMS or class_depth < 1:
            sides = ", ".join(map(str, STEMS))
            raise ValueError(
                f"patch_size must be one of {sides} and class_depth at least 1, got {patch_size=} and {class_depth=}"
            )
        heads = list(channel_heads) if isinstance(channel_heads, Sequence) else [channel_heads] * depth
        if len(heads) != depth:
            raise ValueError(f"channel_heads must be one number for each of {depth} blocks, got {len(heads)}")
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        size = None if image_size is None else staged.pair(image_size)
        own = Choice(SoftmaxAttention, {"attention_dropout": attention_dropout})
        (places,) = staged.places(
            [features],
            [None if size is None else (-(-size[0] // patch_size), -(-size[1] // patch_size))],
            num_heads=[num_heads],
            depths=[depth],
            own=[own],
            mixers=mixers,
            replaced=None if replaced is None else [replaced],
        )
        shared = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "scale": scale}
        blocks = [
            fan_block(
                dataclasses.replace(place, drop_path=drop_path),
                num_scales=num_scales,
                channel_heads=heads[index],
                **shared,
                **common,
            )
            for index, place in enumerate(places)
        ]
        last = [
            class_block(features, num_heads=num_heads, norm_tokens=norm_tokens, **shared, **common)
            for _ in range(class_depth)
        ]
        widths = [features // share for share in STEMS[patch_size]]
        super().__init__(
            ConvStem(channels, widths, strides=(2,) * len(widths), use_bias=False, **common),
            [
                Stage(blocks, position=FourierPositions(features, **common) if positions else None),
                Stage(last, prefix=Prefix(1, features, **stored)),
            ],
            norm=LayerNorm(features, eps=1e-6, **stored),
            head=staged.classifier(features, num_classes, **common),
            image_size=size,
            channels=channels,
            dtype=dtype,
        )
        for block in blocks:
            redraw_convolutions(block.mlp, rngs=rngs)
        redraw_kernels(self, trunc_normal, rngs=rngs)


FANS: Models = {
    "tap_fan_tiny_12_p16_224": (FAN, {}),
    "tap_fan_small_12_p16_224": (FAN, {"features": 384, "num_heads": 8}),
    "tap_fan_base_18_p16_224": (FAN, {"features": 448, "num_heads": 8, "depth": 18}),
    "tap_fan_large_24_p16_224": (FAN, {"features": 480, "num_heads": 10, "depth": 24}),
}
"""For `staged.build_named`: FANs of 7, 28, 54 and 81 M parameters, with four scales of pooling."""
