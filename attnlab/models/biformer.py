"""BiFormer (Zhu et al., 2023, arXiv:2303.08810): a four-stage vision transformer of bi-level routing attention.

Stem of two strided convolutions (stride 4), then stages with a strided convolution between them. A block:

    x = x + DWConv3×3(x)
    x = x + γ₁ mixer(LN(x));   x = x + γ₂ MLP(LN(x))             pre-norm
    x = LN(x + γ₁ mixer(x));   x = LN(x + γ₂ MLP(x))             post-norm

γ exist only with a positive `layer_scale`. The mixer of a stage is routed attention; plain attention with 8 heads; the
same with a depthwise convolution of its input added (the last stage of the released models, on 7 × 7 tokens); or
convolutions alone. The code is at rayleizhu/BiFormer, models/biformer.py.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.attention.sparse.biformer_bra import BiLevelRoutingAttention
from attnlab.contract import Given, Layout, Site
from attnlab.models import staged
from attnlab.models.block import Block
from attnlab.models.staged import Choice, Models, Stage, StagedBackbone
from attnlab.nn.activations import gelu
from attnlab.nn.chain import Chain
from attnlab.nn.conv import ConvNorm
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.heads import merge_heads, redraw_kernels, split_heads
from attnlab.nn.linear import Conv, compute_in_input_dtype, trunc_normal
from attnlab.nn.mlp import MLP, LayerScale
from attnlab.nn.norms import BatchNorm, LayerNorm
from attnlab.registry import Cost, Kind, Paper, Source, register


class LocallyEnhancedAttention(SoftmaxAttention):
    """Softmax attention of images with a depthwise convolution of its input added in front of the last map.

    Args:
      features: channels C.
      num_heads: heads H.
      side: of the convolution's kernel, odd.
      of_values: whether the convolution is of the values instead, as in the authors' later code.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
      **options: further arguments of `SoftmaxAttention`.
    """

    layouts = frozenset({Layout.IMAGE})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        side: int = 5,
        of_values: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(features, num_heads=num_heads, layout=Layout.IMAGE, **options, **common)
        self.local, self.of_values = DepthwiseConv(features, (side, side), **common), of_values

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        source = merge_heads(self.value(x)) if self.of_values else x
        # The last map is linear, so what is added in front of it may pass it alone.
        local, kernel = compute_in_input_dtype((self.local(source), self.out.kernel[...]), dtype=self.dtype)
        return super().mix(x, given) + jnp.einsum("...hd,hdc->...c", split_heads(local, self.num_heads), kernel)


class ConvMixer(nnx.Module):
    """Pointwise, depthwise 5×5 and pointwise convolution, in place of attention."""

    def __init__(self, features: int, **common: Any):
        self.conv_in = Conv(features, features, (1, 1), **common)
        self.conv = DepthwiseConv(features, (5, 5), **common)
        self.conv_out = Conv(features, features, (1, 1), **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, Hh, Ww, C) to the same shape."""
        return self.conv_out(self.conv(self.conv_in(x)))


def stage_mixer(
    kind: str, site: Site, *, side_dwconv: int = 5, routing: Mapping[str, Any] | None = None, **common: Any
) -> nnx.Module:
    """The mixer of a block.

    Args:
      kind: "routed" attention, "plain" attention, the same with "local" enhancement, "convolution", or the name of a
        registered mixer.
      site: where it stands.
      side_dwconv: side of the local enhancement's kernel, odd, or in routed attention 0 for none.
      routing: options of routed attention.
      **common: `dtype`, `param_dtype`, `rngs`.

    Raises:
      KeyError: for an unknown kind, with the nearest registered names.
      ValueError: for options that do not fit together.
    """
    features, plain = site.features, {"num_heads": 8, "qkv_bias": False}
    if kind == "routed":
        return BiLevelRoutingAttention(features, side_dwconv=side_dwconv, **(routing or {}), **common)
    if kind == "plain":
        return SoftmaxAttention(features, layout=Layout.IMAGE, **plain, **common)
    if kind == "local":
        return LocallyEnhancedAttention(features, side=side_dwconv, **plain, **common)
    if kind == "convolution":
        return ConvMixer(features, **common)
    return Choice(kind)(site, **common)


def biformer_block(
    mixer: nnx.Module,
    features: int,
    *,
    mlp_ratio: float = 4.0,
    mlp_dwconv: bool = False,
    position_conv: bool = True,
    pre_norm: bool = True,
    layer_scale: float = -1.0,
    drop_path: float = 0.0,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Block:
    """The block of the module's docstring.

    Args:
      mixer: of images (B, Hh, Ww, C).
      features: channels C.
      mlp_ratio: hidden channels of the feed-forward over C.
      mlp_dwconv: whether the feed-forward has a 3×3 depthwise convolution.
      position_conv: whether the 3×3 depthwise convolution comes first.
      pre_norm: norms before the branches, or after the sums.
      layer_scale: γ at the start; none when not positive.
      drop_path: probability that a branch is dropped for an example in training.
      dtype: of the computation; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params` and, with `drop_path`, `dropout`.
    """
    stored = {"param_dtype": param_dtype, "rngs": rngs}
    scale = functools.partial(LayerScale, features, init=layer_scale, **stored) if layer_scale > 0 else lambda: None
    return Block(
        mixer=mixer,
        mlp=MLP(features, int(mlp_ratio * features), depthwise=3 if mlp_dwconv else 0, dtype=dtype, **stored),
        norm1=LayerNorm(features, eps=1e-6, **stored),
        norm2=LayerNorm(features, eps=1e-6, **stored),
        scale1=scale(),
        scale2=scale(),
        before=DepthwiseConv(features, (3, 3), dtype=dtype, **stored) if position_conv else None,
        order="pre" if pre_norm else "post",
        drop_path=drop_path,
        rngs=rngs,
    )


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
        "features": (8, 8, 16, 16),
        "head_dim": 8,
        "n_win": 1,
        "topks": (1, 1, 1, None),
    },
)
class BiFormer(StagedBackbone):
    """Images (B, Hh, Ww, channels) to logits (B, classes) in float32. The defaults are those of `biformer_tiny`.

    The sequences have one entry per stage. With the released models' `n_win=7`, the side of an image is a multiple of
    224 unless `auto_pad` is set.

    Args:
      num_classes: classes; without any the pooled features are the result.
      image_size: (rows, columns) of the images; None where any will do that the regions take.
      channels: of the images.
      depths: blocks.
      features: channels C.
      head_dim: D of routed attention.
      mixers: "routed", "plain", "local", "convolution", or the name of a registered mixer; see `stage_mixer`.
      topks: regions that a region attends to in routed attention; None in other stages.
      qk_dims: channels of queries and keys; those of the stages when None.
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
      mlp_dwconv: see `biformer_block`.
      side_dwconv: see `stage_mixer`.
      position_conv: see `biformer_block`.
      pre_norm: see `biformer_block`.
      layer_scale: see `biformer_block`.
      drop_path: of the last block; it grows from 0 by equal steps.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params` and, with `drop_path`, `dropout`.

    Raises:
      ValueError: for sequences of unequal length, or options that do not fit together.
    """

    def __init__(
        self,
        num_classes: int | None = 1000,
        *,
        image_size: Sequence[int] | None = None,
        channels: int = 3,
        depths: Sequence[int] = (2, 2, 8, 2),
        features: Sequence[int] = (64, 128, 256, 512),
        head_dim: int = 32,
        mixers: Sequence[str] = ("routed", "routed", "routed", "local"),
        topks: Sequence[int | None] = (1, 4, 16, None),
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
        qk_dims = features if qk_dims is None else qk_dims
        sizes = {"features": features, "mixers": mixers, "topks": topks, "qk_dims": qk_dims, "mlp_ratios": mlp_ratios}
        pooled = {"kv_per_wins": kv_per_wins, "kv_downsample_ratios": kv_downsample_ratios}
        staged.per_stage(len(depths), **sizes, **pooled)
        if any((kind == "routed") != (topk is not None) for kind, topk in zip(mixers, topks, strict=True)):
            raise ValueError(f"topks go with the routed stages and are None in others, got {topks} for {mixers}")
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        shared = {
            "n_win": n_win,
            "kv_downsample_mode": kv_downsample_mode,
            "qk_scale": qk_scale,
            "param_attention": param_attention,
            "param_routing": param_routing,
            "diff_routing": diff_routing,
            "soft_routing": soft_routing,
            "auto_pad": auto_pad,
        }
        block = {
            "mlp_dwconv": mlp_dwconv,
            "position_conv": position_conv,
            "pre_norm": pre_norm,
            "layer_scale": layer_scale,
        }
        halve = functools.partial(ConvNorm, kernel_size=3, stride=2, norm=BatchNorm, **common)
        stages, layer, layers, stride = [], 0, sum(depths), 4
        for stage, (width, depth) in enumerate(zip(features, depths, strict=True)):
            grid = None if image_size is None else tuple(-(-side // (stride << stage)) for side in image_size)
            heads = qk_dims[stage] // head_dim
            routing = shared | {
                "num_heads": heads,
                "topk": topks[stage],
                "qk_dim": qk_dims[stage],
                "kv_per_win": kv_per_wins[stage],
                "kv_downsample_ratio": kv_downsample_ratios[stage],
            }
            blocks = []
            for _ in range(depth):
                site = Site(width, heads, Layout.IMAGE, grid=grid, layer=layer, num_layers=layers)
                mixer = stage_mixer(mixers[stage], site, side_dwconv=side_dwconv, routing=routing, **common)
                own = {"mlp_ratio": mlp_ratios[stage], "drop_path": drop_path * layer / max(layers - 1, 1)}
                blocks.append(biformer_block(mixer, width, **block, **own, **common))
                layer += 1
            stages.append(Stage(blocks, down=halve(features[stage - 1], width) if stage else None))
        first = features[0] // 2
        super().__init__(
            Chain(halve(channels, first, activation=gelu), halve(first, features[0])),
            stages,
            norm=BatchNorm(features[-1], param_dtype=param_dtype, rngs=rngs),
            head=staged.classifier(features[-1], num_classes, **common),
            image_size=image_size,
            channels=channels,
            dtype=dtype,
        )
        redraw_kernels(self, trunc_normal, rngs=rngs)


BIFORMERS: Models = {
    "biformer_tiny": (BiFormer, {}),
    "biformer_small": (BiFormer, {"depths": (4, 4, 18, 4)}),
    "biformer_base": (BiFormer, {"depths": (4, 4, 18, 4), "features": (96, 192, 384, 768)}),
}
"""The models of the paper by name: class and constructor arguments.

As the authors report, of 13.1 M, 25.5 M and 56.8 M parameters, 2.2 G, 4.5 G and 9.8 G multiply-adds, and 81.4 %, 83.8 %
and 84.3 % on ImageNet-1K at 224².
"""


def biformer(name: str, *, rngs: nnx.Rngs, **overrides: Any) -> StagedBackbone:
    """A model of `BIFORMERS` by name; `overrides` replace its constructor arguments.

    Raises:
      KeyError: with the nearest names, if there is none.
    """
    return staged.build_named(BIFORMERS, name, rngs=rngs, **overrides)
