"""BiFormer (Zhu et al., 2023, arXiv:2303.08810): a four-stage vision transformer of bi-level routing attention.

Stem of two strided convolutions (stride 4), then stages with a strided convolution between them. A block:

    x = x + DWConv3×3(x)
    x = x + γ₁ attention(LN(x));   x = x + γ₂ MLP(LN(x))             pre-norm
    x = LN(x + γ₁ attention(x));   x = LN(x + γ₂ MLP(x))             post-norm

γ exist only with a positive `layer_scale`. `topk` says what attention a stage has: routed to that many regions;
-1 plain; -2 plain, with a depthwise convolution of its input added (the last stage of the released models, on 7 × 7
tokens); 0 none but convolutions. The code is at rayleizhu/BiFormer, models/biformer.py.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.sparse.biformer_bra import BiLevelRoutingAttention
from attnlab.contract import SiteModule, record
from attnlab.nn.linear import Conv, Linear, redraw_kernels, trunc_normal
from attnlab.nn.mlp import DropPath, LayerScale, gelu
from attnlab.nn.norms import BatchNorm, LayerNorm
from attnlab.nn.softmax import softmax_attention
from attnlab.registry import Cost, Kind, Paper, Source, register


class PlainAttention(nnx.Module):
    """Softmax attention among all tokens of images (B, Hh, Ww, C), for stages of few tokens.

    Args:
      features: channels C.
      num_heads: heads H.
      local_size: side of a depthwise convolution of the input, added before the output projection; 0 for none.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the heads do not divide the channels.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 8,
        local_size: int = 0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.num_heads = num_heads
        self.qkv = Linear(features, 3 * features, use_bias=False, axes=("embed", "heads"), **options)
        self.out = Linear(features, features, axes=("heads", "embed"), **options)
        self.local = nnx.data(None)
        if local_size:
            self.local = Conv(features, features, (local_size, local_size), feature_group_count=features, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, Hh, Ww, C) to the same shape."""
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        q, k, v = (a.reshape(*a.shape[:2], self.num_heads, -1) for a in jnp.split(self.qkv(tokens), 3, axis=-1))
        y, weights = softmax_attention(q, k, v, return_weights=True)
        record(self, "attention", lambda: weights)
        y = y.reshape(x.shape)
        return self.out(y if self.local is None else y + self.local(x))


class ConvMixer(nnx.Module):
    """What stands in for attention at `topk=0`: pointwise, depthwise 5×5 and pointwise convolution."""

    def __init__(self, features: int, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.conv_in = Conv(features, features, (1, 1), **options)
        self.conv = Conv(features, features, (5, 5), feature_group_count=features, **options)
        self.conv_out = Conv(features, features, (1, 1), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, Hh, Ww, C) to the same shape."""
        return self.conv_out(self.conv(self.conv_in(x)))


class ConvMLP(nnx.Module):
    """Linear, 3×3 depthwise convolution if wanted, GELU, linear, on images (B, Hh, Ww, C)."""

    def __init__(self, features: int, hidden: int, *, dwconv: bool, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.fc1 = Linear(features, hidden, axes=("embed", "mlp"), **options)
        self.conv = nnx.data(None)
        if dwconv:
            self.conv = Conv(hidden, hidden, (3, 3), feature_group_count=hidden, axes=(None, "mlp"), **options)
        self.fc2 = Linear(hidden, features, axes=("mlp", "embed"), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, Hh, Ww, C) to the same shape."""
        y = self.fc1(x)
        return self.fc2(gelu(y if self.conv is None else self.conv(y)))


class BiFormerBlock(nnx.Module):
    """Position convolution, attention and feed-forward on images (B, Hh, Ww, C). See the module docstring.

    Args:
      features: channels C.
      num_heads: heads H of routed attention; plain attention has 8.
      topk: regions that a region attends to, or -2, -1, 0 (see the module docstring).
      qk_dim: channels of queries and keys of routed attention; C when None.
      mlp_ratio: hidden channels of the feed-forward over C.
      mlp_dwconv: whether the feed-forward has a depthwise convolution.
      side_dwconv: side of the local enhancement's kernel, odd; 0 for none.
      position_conv: whether the 3×3 depthwise convolution comes first.
      pre_norm: norms before the branches, or after the sums.
      layer_scale: γ at the start; none when not positive.
      drop_path: probability that a branch is dropped for an example in training.
      param_dtype: of the parameters.
      rngs: streams `params` and, with `drop_path`, `dropout`.
      **routing: further options of `BiLevelRoutingAttention`.

    Raises:
      ValueError: for a `topk` below -2, or options that do not fit together.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 8,
        topk: int = 4,
        qk_dim: int | None = None,
        mlp_ratio: float = 4.0,
        mlp_dwconv: bool = False,
        side_dwconv: int = 5,
        position_conv: bool = True,
        pre_norm: bool = True,
        layer_scale: float = -1.0,
        drop_path: float = 0.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **routing: Any,
    ):
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.pre_norm = pre_norm
        self.position = nnx.data(None)
        if position_conv:
            self.position = Conv(features, features, (3, 3), feature_group_count=features, **options)
        if topk > 0:
            self.attention = BiLevelRoutingAttention(
                features,
                num_heads=num_heads,
                topk=topk,
                qk_dim=qk_dim,
                side_dwconv=side_dwconv,
                **routing,
                **options,
            )
        elif topk in (-1, -2):
            self.attention = PlainAttention(features, local_size=side_dwconv if topk == -2 else 0, **options)
        elif topk == 0:
            self.attention = ConvMixer(features, **options)
        else:
            raise ValueError(f"topk must be positive, 0, -1 or -2, got {topk}")
        self.norm1 = LayerNorm(features, eps=1e-6, **options)
        self.norm2 = LayerNorm(features, eps=1e-6, **options)
        self.mlp = ConvMLP(features, int(mlp_ratio * features), dwconv=mlp_dwconv, **options)
        scaled = layer_scale > 0
        self.scale1 = LayerScale(features, init=layer_scale, **options) if scaled else nnx.data(None)
        self.scale2 = LayerScale(features, init=layer_scale, **options) if scaled else nnx.data(None)
        self.drop1, self.drop2 = DropPath(drop_path, rngs=rngs), DropPath(drop_path, rngs=rngs)

    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """(B, Hh, Ww, C) to the same shape."""
        if self.position is not None:
            x = x + self.position(x)
        branches = (
            (self.norm1, self.attention, self.scale1, self.drop1),
            (self.norm2, self.mlp, self.scale2, self.drop2),
        )
        for norm, branch, scale, drop in branches:
            y = branch(norm(x) if self.pre_norm else x)
            y = drop(y if scale is None else scale(y), deterministic=deterministic)
            x = x + y if self.pre_norm else norm(x + y)
        return x


class Downsample(nnx.Module):
    """A 3×3 convolution of stride 2, then batch normalisation."""

    def __init__(self, in_features: int, out_features: int, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.conv = Conv(in_features, out_features, (3, 3), strides=2, **options)
        self.norm = BatchNorm(out_features, **options)

    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """(B, Hh, Ww, C) to (B, ⌈Hh/2⌉, ⌈Ww/2⌉, C')."""
        return self.norm(self.conv(x), deterministic=deterministic)


@register(
    "biformer_bra.biformer",
    kind=Kind.BACKBONE,
    paper=Paper(
        "BiFormer: Vision Transformer with Bi-Level Routing Attention",
        "Zhu et al.",
        2023,
        arxiv="2303.08810",
        number=16,
    ),
    source=Source.AUTHORS_CODE,
    repository="rayleizhu/BiFormer",
    cost=Cost(time="O(N·k·(N/S²)·C + N·C²) per block", memory="O(k·N·C)"),
    summary="four stages of bi-level routing attention, plain attention in the last",
    small={
        "num_classes": 5,
        "depths": (1, 1, 1, 1),
        "widths": (8, 8, 16, 16),
        "head_dim": 8,
        "n_win": 1,
        "topks": (1, 1, 1, -2),
    },
)
class BiFormer(SiteModule):
    """Images (B, Hh, Ww, channels) to logits (B, classes). The defaults are those of `biformer_tiny`.

    The sequences have one entry per stage. With the released models' `n_win=7`, the side of an image is a multiple of
    224 unless `auto_pad` is set.

    Args:
      num_classes: logits; 0 returns the pooled features.
      channels: of the images.
      depths: blocks.
      widths: channels C.
      head_dim: D of routed attention.
      topks: as `topk` of `BiFormerBlock`.
      qk_dims: channels of queries and keys; the widths when None.
      mlp_ratios: hidden channels of the feed-forwards over C.
      kv_per_wins: as `kv_per_win` of `BiLevelRoutingAttention`.
      kv_downsample_ratios: as its `kv_downsample_ratio`.
      n_win: regions per side.
      kv_downsample_mode: how keys and values are pooled inside a region.
      qk_scale: of the scores of routed attention; qk_dim^-1/2 when None.
      param_attention: "qkvo", or "qkv" for no output projection.
      param_routing: see `BiLevelRoutingAttention`.
      diff_routing: see `BiLevelRoutingAttention`.
      soft_routing: see `BiLevelRoutingAttention`.
      auto_pad: whether maps that `n_win` does not divide are padded.
      mlp_dwconv: see `BiFormerBlock`.
      side_dwconv: see `BiFormerBlock`.
      position_conv: see `BiFormerBlock`.
      pre_norm: see `BiFormerBlock`.
      layer_scale: see `BiFormerBlock`.
      drop_path: of the last block; it grows from 0 by equal steps.
      dtype: of the computation and the result; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params` and, with `drop_path`, `dropout`.

    Raises:
      ValueError: for sequences of unequal length, or options that do not fit together.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        channels: int = 3,
        depths: Sequence[int] = (2, 2, 8, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        head_dim: int = 32,
        topks: Sequence[int] = (1, 4, 16, -2),
        qk_dims: Sequence[int] | None = None,
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        kv_per_wins: Sequence[int] = (-1, -1, -1, -1),
        kv_downsample_ratios: Sequence[int] = (4, 2, 1, 1),
        n_win: int = 7,
        kv_downsample_mode: str = "identity",
        qk_scale: float | None = None,
        param_attention: str = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        auto_pad: bool = False,
        mlp_dwconv: bool = False,
        side_dwconv: int = 5,
        position_conv: bool = True,
        pre_norm: bool = True,
        layer_scale: float = -1.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        qk_dims = widths if qk_dims is None else qk_dims
        stages = {
            "widths": widths,
            "topks": topks,
            "qk_dims": qk_dims,
            "mlp_ratios": mlp_ratios,
            "kv_per_wins": kv_per_wins,
            "kv_downsample_ratios": kv_downsample_ratios,
        }
        for name, values in stages.items():
            if len(values) != len(depths):
                raise ValueError(f"{name} must have one entry for each of the {len(depths)} stages, got {len(values)}")
        options = {"param_dtype": param_dtype, "rngs": rngs}
        shared = {
            "n_win": n_win,
            "kv_downsample_mode": kv_downsample_mode,
            "qk_scale": qk_scale,
            "param_attention": param_attention,
            "param_routing": param_routing,
            "diff_routing": diff_routing,
            "soft_routing": soft_routing,
            "auto_pad": auto_pad,
            "mlp_dwconv": mlp_dwconv,
            "side_dwconv": side_dwconv,
            "position_conv": position_conv,
            "pre_norm": pre_norm,
            "layer_scale": layer_scale,
        }
        rates = iter(np.linspace(0, drop_path, sum(depths)).tolist())
        self.channels, self.dtype = channels, dtype
        self.stem = Downsample(channels, widths[0] // 2, **options)
        self.downsamples = nnx.List(
            Downsample(before, after, **options)
            for before, after in zip((widths[0] // 2, *widths), widths, strict=False)
        )
        self.stages = nnx.List(
            nnx.List(
                BiFormerBlock(
                    width,
                    num_heads=qk_dim // head_dim,
                    topk=topk,
                    qk_dim=qk_dim,
                    mlp_ratio=mlp_ratio,
                    kv_per_win=kv_per_win,
                    kv_downsample_ratio=kv_ratio,
                    drop_path=next(rates),
                    **shared,
                    **options,
                )
                for _ in range(depth)
            )
            for depth, width, topk, qk_dim, mlp_ratio, kv_per_win, kv_ratio in zip(
                depths, *stages.values(), strict=True
            )
        )
        self.norm = BatchNorm(widths[-1], **options)
        self.head = nnx.data(None)
        if num_classes:
            self.head = Linear(widths[-1], num_classes, axes=("embed", "vocab"), **options)
        redraw_kernels(self, trunc_normal, rngs=rngs)

    def features(self, images: ArrayLike, *, deterministic: bool = True) -> list[jax.Array]:
        """The map that each stage leaves, (B, Hh/4, Ww/4, C) to (B, Hh/32, Ww/32, C) with four stages.

        Raises:
          ValueError: if the images have another rank or number of channels.
        """
        shape = jnp.shape(images)
        if len(shape) != 4 or shape[-1] != self.channels:
            raise ValueError(f"BiFormer takes images (B, Hh, Ww, {self.channels}), got shape {shape}")
        x = gelu(self.stem(jnp.asarray(images, self.dtype), deterministic=deterministic))
        maps = []
        for downsample, stage in zip(self.downsamples, self.stages, strict=True):
            x = downsample(x, deterministic=deterministic)
            for block in stage:
                x = block(x, deterministic=deterministic)
            maps.append(x)
        return maps

    def __call__(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """Logits (B, classes), or with `num_classes=0` the mean (B, C) of the last map."""
        x = self.norm(self.features(images, deterministic=deterministic)[-1], deterministic=deterministic)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = wide.mean((1, 2)).astype(x.dtype)
        return x if self.head is None else self.head(x)


def biformer_tiny(num_classes: int = 1000, *, rngs: nnx.Rngs, **options: Any) -> BiFormer:
    """BiFormer-T: 13.1 M parameters, 2.2 G multiply-adds and 81.4 % on ImageNet-1K at 224², as its authors report."""
    return BiFormer(num_classes, rngs=rngs, **options)


def biformer_small(num_classes: int = 1000, *, rngs: nnx.Rngs, **options: Any) -> BiFormer:
    """BiFormer-S: 25.5 M parameters, 4.5 G multiply-adds and 83.8 % on ImageNet-1K at 224², as its authors report."""
    return BiFormer(num_classes, rngs=rngs, **{"depths": (4, 4, 18, 4)} | options)


def biformer_base(num_classes: int = 1000, *, rngs: nnx.Rngs, **options: Any) -> BiFormer:
    """BiFormer-B: 56.8 M parameters, 9.8 G multiply-adds and 84.3 % on ImageNet-1K at 224², as its authors report."""
    sizes = {"depths": (4, 4, 18, 4), "widths": (96, 192, 384, 768)}
    return BiFormer(num_classes, rngs=rngs, **sizes | options)
