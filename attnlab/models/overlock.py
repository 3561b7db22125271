"""OverLoCK (Lou and Yu, CVPR 2025, arXiv:2502.20087): an overview of the image first, then a closer look led by it.

    conv(x) = x + DWConv3(x);   MLP = W₂ norm(h + DWConv3(h)), h = gelu(W₁ x)          norm: `nn.norms.ResponseNorm`

    x = conv(x);   x = γ(x) + MLP(SE(BN(large(LN(x)))))                   a static block, large: `nn.reparam`
    x = conv(x);   x = γ(x) + W BN(gate ⊙ SE(ContMix(n) + BN(large(n)))),  n = LN(x)
    x = conv(x);   x = δ(x) + MLP(LN(x))                                  the plug-in block, gate = silu(BN(W n))

γ, δ scale channels, with a bias, on the side of the skip (`res_scale`). Two nets share the first stages: the overview
goes on through static blocks to stride 32, and its map, of a quarter of the channels, is the context h of the focus
from stride 16 on. A dynamic block carries h along, beside the tokens:

    h = s(h) + r(h_0);   f = conv([x | h]);   n = LN(f);   u = norm(W gelu(BN(DWConv3(n))))
    [x | h] as above from f, with gate and large of u, the values u, queries of n's part x, kernels' context n's part h

Then SiLU(BN(W ·)), the mean and a linear map classify; a second head classifies the overview. The mechanism is in
`attnlab.mixers.overlock`. Reference: LMMMEng/OverLoCK.
"""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.mixers.overlock import COST, PAPER, REPOSITORY, ContextMixing, DynamicKernels
from attnlab.models import staged
from attnlab.models.inputs import Images
from attnlab.models.staged import Models
from attnlab.nn.activations import gelu, silu
from attnlab.nn.conv import ConvNorm, ConvStem, SqueezeExcite
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.linear import Linear, trunc_normal
from attnlab.nn.mlp import MLP, DropPath, LayerScale
from attnlab.nn.norms import BatchNorm, LayerNorm, ResponseNorm
from attnlab.nn.reparam import DilatedReparamConv
from attnlab.nn.resampling import adaptive_avg_pool, resize_bilinear
from attnlab.points import Editable, Edits, Layer, Pass, visit
from attnlab.registry import Kind, Source, register


def _mlp(features: int, ratio: float, out_features: int, **common: Any) -> MLP:
    local: dict[str, Any] = {"depthwise": 3, "residual": True, "activation_at": ("map",), "norm": ResponseNorm}
    return MLP(out_features, int(features * ratio), **local, **common)


def _excite(features: int, **common: Any) -> SqueezeExcite:
    return SqueezeExcite(features, max(16, features // 8), activation=gelu, **common)


def _conv_norm(features: int, out: int, side: int, **options: Any) -> ConvNorm:
    return ConvNorm(features, out, side, norm=BatchNorm, use_bias=False, **options)


class _Residual(nnx.Module):
    """The sum of a stream and a branch, either of which channels' scales may stand at."""

    def __init__(
        self,
        features: int,
        scale: float | None,
        on_skip: bool,
        drop_path: float,
        *,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        scaled = None if scale is None else LayerScale(features, init=scale, use_bias=True, **stored)
        self.scale, self.on_skip = nnx.data(scaled), on_skip
        self.drop_path = DropPath(drop_path, rngs=rngs) if drop_path else nnx.data(None)

    def __call__(self, x: jax.Array, y: jax.Array, deterministic: bool) -> jax.Array:
        if self.scale is not None:
            x, y = (self.scale(x), y) if self.on_skip else (x, self.scale(y))
        return x + (y if self.drop_path is None else self.drop_path(y, deterministic=deterministic))


class RepConvBlock(Layer):
    """The static block, images of tokens `(B, H, W, C)` to the same shape; see the module docstring.

    Args:
      features: channels C.
      kernel_size: side of the large convolution.
      mlp_ratio: hidden channels of the feed-forward over C.
      scale: γ at the start; None for none.
      res_scale: whether γ stands at the skip, else at the branch.
      merged: whether the large convolution is the one that is left at inference.
      drop_path: stochastic depth rate.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
    """

    def __init__(
        self,
        features: int,
        *,
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        scale: float | None = None,
        res_scale: bool = False,
        merged: bool = False,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        self.conv = DepthwiseConv(features, (3, 3), **common)
        self.norm = LayerNorm(features, **stored)
        self.large = DilatedReparamConv(features, kernel_size, merged=merged, **common)
        self.large_norm = BatchNorm(features, **stored)
        self.excite = _excite(features, **common)
        self.mlp = _mlp(features, mlp_ratio, features, **common)
        self.add = _Residual(features, scale, res_scale, drop_path, **stored)

    @property
    def points(self) -> frozenset[str]:
        return frozenset({"stream", "normed", "mlp"})

    def __call__(self, x: ArrayLike, *, edits: Edits | None = None, deterministic: bool = True) -> jax.Array:
        x = visit(self, edits, "stream", jnp.asarray(x, self.dtype))
        x = x + self.conv(x)
        n = visit(self, edits, "normed", self.norm(x))
        y = self.large_norm(self.large(n, deterministic=deterministic), deterministic=deterministic)
        return self.add(x, visit(self, edits, "mlp", self.mlp(self.excite(y))), deterministic)


class ContMixBlock(nnx.Module):
    """The plug-in block, images of tokens `(B, H, W, C)` to the same shape; see the module docstring.

    Args:
      features: channels C.
      kernel_size: K, side of the larger dynamic kernel and of the static one.
      small_size: S, side of the smaller dynamic kernel.
      num_heads: half as many as groups.
      mlp_ratio: hidden channels of the feed-forward over C.
      scale: γ and δ at the start; None for none.
      res_scale: whether they stand at the skip, else at the branch.
      merged: whether the static convolution is the one that is left at inference.
      drop_path: stochastic depth rate.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
    """

    def __init__(
        self,
        features: int,
        *,
        kernel_size: int = 7,
        small_size: int = 5,
        num_heads: int = 2,
        mlp_ratio: float = 4.0,
        scale: float | None = None,
        res_scale: bool = False,
        merged: bool = False,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        sizes: dict[str, Any] = {"num_groups": 2 * num_heads, "kernel_size": kernel_size, "small_size": small_size}
        self.conv1, self.conv2 = (DepthwiseConv(features, (3, 3), **common) for _ in range(2))
        self.norm1, self.norm2 = (LayerNorm(features, **stored) for _ in range(2))
        self.mixer = ContextMixing(features, **sizes, **common)
        self.around = _Around(features, kernel_size, features, merged, **common)
        self.mlp = _mlp(features, mlp_ratio, features, **common)
        self.add1, self.add2 = (_Residual(features, scale, res_scale, drop_path, **stored) for _ in range(2))

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        x = jnp.asarray(x, self.dtype)
        x = x + self.conv1(x)
        n = self.norm1(x)
        y = self.around(n, self.mixer(n, deterministic=deterministic), deterministic)
        x = self.add1(x, y, deterministic)
        x = x + self.conv2(x)
        return self.add2(x, self.mlp(self.norm2(x)), deterministic)


class _Around(nnx.Module):
    """What stands around the dynamic convolution t of n: W BN(gate(n) ⊙ SE(t + BN(large(n))))."""

    def __init__(self, features: int, kernel_size: int, out_features: int, merged: bool, **common: Any):
        stored = {name: common[name] for name in ("param_dtype", "rngs") if name in common}
        self.gate = _conv_norm(features, features, 1, activation=silu, **common)
        self.large = DilatedReparamConv(features, kernel_size, merged=merged, **common)
        self.large_norm, self.norm = (BatchNorm(features, **stored) for _ in range(2))
        self.excite = _excite(features, **common)
        self.out = Linear(features, out_features, **common)

    def __call__(self, n: jax.Array, t: jax.Array, deterministic: bool) -> jax.Array:
        told = {"deterministic": deterministic}
        static = self.large_norm(self.large(n, **told), **told)
        return self.out(self.norm(self.gate(n, **told) * self.excite(t + static), **told))


class DynamicConvBlock(Layer):
    """Tokens and their context to tokens and context; see the module docstring.

    Args:
      features: channels C of the tokens.
      context_features: channels P of the overview, a quarter of which, c, is the context's.
      kernel_size: K, side of the larger dynamic kernel and of the static one.
      small_size: S, side of the smaller dynamic kernel.
      num_heads: half as many as groups.
      mlp_ratio: hidden channels of the feed-forward over C.
      scale: γ and δ at the start; None for none.
      res_scale: whether they stand at the skip, else at the branch.
      is_first: whether the context is taken as it comes, without the overview's.
      is_last: whether tokens and context stay one map.
      merged: whether the static convolution is the one that is left at inference.
      drop_path: stochastic depth rate.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        *,
        kernel_size: int = 7,
        small_size: int = 5,
        num_heads: int = 2,
        mlp_ratio: float = 4.0,
        scale: float | None = None,
        res_scale: bool = False,
        is_first: bool = False,
        is_last: bool = False,
        merged: bool = False,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.features, self.is_last, self.dtype = features, is_last, dtype
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common, part = {"dtype": dtype, **stored}, context_features // 4
        whole = features + part
        own, other = (None if is_first else LayerScale(part, init=1.0, use_bias=True, **stored) for _ in range(2))
        self.own_scale: Any = nnx.data(own)
        self.overview_scale: Any = nnx.data(other)
        self.conv1, self.conv2 = (DepthwiseConv(whole, (3, 3), **common) for _ in range(2))
        self.norm1, self.norm2 = (LayerNorm(whole, **stored) for _ in range(2))
        self.fuse = ConvNorm(whole, whole, 3, groups=whole, norm=BatchNorm, activation=gelu, **common)
        self.fuse_out = Linear(whole, features, **common)
        self.fuse_norm = ResponseNorm(features, **stored)
        sizes: dict[str, Any] = {"num_groups": 2 * num_heads, "kernel_size": kernel_size, "small_size": small_size}
        zeros = nnx.initializers.zeros
        self.kernels = DynamicKernels(features, part, **sizes, init=zeros, **common)
        self.proj = _conv_norm(features, features, 1, **common)
        self.around = _Around(features, kernel_size, whole, merged, **common)
        self.mlp = _mlp(features, mlp_ratio, whole, **common)
        self.add1, self.add2 = (_Residual(whole, scale, res_scale, drop_path, **stored) for _ in range(2))

    @property
    def points(self) -> frozenset[str]:
        return frozenset({"stream", "normed", "mixed", "middle", "mlp"})

    def __call__(
        self,
        x: ArrayLike,
        context: ArrayLike,
        overview: ArrayLike,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array] | jax.Array:
        """One step of the focus.

        Args:
          x: tokens `(B, H, W, C)`.
          context: `(B, H, W, c)`.
          overview: `(B, H, W, c)`, what the context began as; without effect in the first block.
          edits: interventions on this layer of this call.
          deterministic: False in training.

        Returns:
          Tokens and context of the same shapes; in the last block `(B, H, W, C + c)`.

        Raises:
          ValueError: for maps of other shapes.
        """
        x = visit(self, edits, "stream", jnp.asarray(x, self.dtype))
        context, overview = (jnp.asarray(h, x.dtype) for h in (context, overview))
        if context.shape != overview.shape or context.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"context and overview must be of the grid {x.shape[:-1]}, got {context.shape, overview.shape}"
            )
        if self.own_scale is not None:
            context = self.own_scale(context) + self.overview_scale(overview)
        f = jnp.concatenate([x, context], -1)
        f = f + self.conv1(f)
        n = visit(self, edits, "normed", self.norm1(f))
        u = self.fuse_norm(self.fuse_out(self.fuse(n, deterministic=deterministic)))
        y = self.around(u, visit(self, edits, "mixed", self._mixed(u, n, deterministic)), deterministic)
        f = visit(self, edits, "middle", self.add1(f, y, deterministic))
        f = f + self.conv2(f)
        f = self.add2(f, visit(self, edits, "mlp", self.mlp(self.norm2(f))), deterministic)
        return f if self.is_last else (f[..., : self.features], f[..., self.features :])

    def _mixed(self, u: jax.Array, n: jax.Array, deterministic: bool) -> jax.Array:
        grid = (u.shape[1], u.shape[2])
        size = self.kernels.enlarged(grid)
        v, n = (part if size == grid else resize_bilinear(part, size) for part in (u, n))
        query, context = n[..., : self.features], n[..., self.features :]
        y = self.kernels(v, query, context, deterministic=deterministic)
        return self.proj(y if size == grid else adaptive_avg_pool(y, grid), deterministic=deterministic)


class Heads(NamedTuple):
    """Logits `(B, classes)` in float32.

    Attributes:
      main: of the focus.
      overview: of the overview, for a second loss in training; None without that head.
    """

    main: jax.Array
    overview: jax.Array | None


@register(
    "overlock.net",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=COST,
    summary="an overview by static convolutions that leads a second net of dynamic ones",
    small={"features": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "focus_depths": (1, 1), "kernel_size": (3, 3, 3, 3)}
    | {"mlp_ratio": (1, 1, 1, 1), "focus_mlp_ratio": (1, 1), "num_heads": (1, 1), "small_size": 3, "projection": 8}
    | {"num_classes": 5, "image_size": 32},
)
class OverLoCK(Editable):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are OverLoCK-T.

    Args:
      features: channels of the four stages.
      depths: static blocks of the stages; the last two are the overview's.
      focus_depths: dynamic blocks of the focus at strides 16 and 32.
      kernel_size: side of the large convolutions of the stages; the focus has the last two.
      small_size: side of the smaller dynamic kernels.
      num_heads: of the focus at both strides.
      mlp_ratio: hidden channels of feed-forwards over channels, of the stages.
      focus_mlp_ratio: of the focus.
      layer_scale: scales of the stages at the start, None for none; the focus has the last two.
      res_scale: whether they stand at the skip, else at the branch.
      auxiliary: whether there is a head for the overview.
      merged: whether large convolutions are those that are left at inference.
      projection: channels that are classified.
      image_size: pixels on a side, or (rows, columns); of no effect, any image will do.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for lists of other lengths.
    """

    inputs: ClassVar[Images] = Images()
    model_points = frozenset({"logits"})

    def __init__(
        self,
        features: Sequence[int] = (64, 128, 256, 512),
        *,
        depths: Sequence[int] = (4, 4, 6, 2),
        focus_depths: Sequence[int] = (12, 2),
        kernel_size: Sequence[int] = (17, 15, 13, 7),
        small_size: int = 5,
        num_heads: Sequence[int] = (4, 8),
        mlp_ratio: Sequence[float] = (4, 4, 4, 4),
        focus_mlp_ratio: Sequence[float] = (3, 3),
        layer_scale: Sequence[float | None] = (None, None, 1.0, 1.0),
        res_scale: bool = True,
        auxiliary: bool = True,
        merged: bool = False,
        projection: int = 1024,
        image_size: int | Sequence[int] | None = 224,
        channels: int = 3,
        num_classes: int | None = 1000,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        lists = {"depths": depths, "kernel_size": kernel_size, "mlp_ratio": mlp_ratio, "layer_scale": layer_scale}
        staged.per_stage(4, features=features, **lists)
        staged.per_stage(2, focus_depths=focus_depths, num_heads=num_heads, focus_mlp_ratio=focus_mlp_ratio)
        self.channels, self.dtype = channels, dtype
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        rates = iter(np.linspace(0, drop_path, sum(depths) + sum(focus_depths)).tolist())
        shared: dict[str, Any] = {"res_scale": res_scale, "merged": merged, **common}
        first, last = features[0], features[-1]
        self.stem = ConvStem(
            channels, (first // 2, first // 2, first, first), strides=(2, 1, 2, 1), use_bias=False, **common
        )
        self.downs = nnx.List(
            _conv_norm(before, after, 3, stride=2, **common) for before, after in itertools.pairwise(features)
        )
        # Layers count in the order of their names, and base is before focus.
        self.base = nnx.List(
            nnx.List(
                RepConvBlock(
                    features[stage],
                    kernel_size=kernel_size[stage],
                    mlp_ratio=mlp_ratio[stage],
                    scale=layer_scale[stage],
                    drop_path=next(rates),
                    **shared,
                )
                for _ in range(depths[stage])
            )
            for stage in range(4)
        )
        self.overview = Linear(last, last // 4, **common)
        self.focus = nnx.List(
            nnx.List(
                DynamicConvBlock(
                    features[2 + turn],
                    last,
                    kernel_size=kernel_size[2 + turn],
                    small_size=small_size,
                    num_heads=num_heads[turn],
                    mlp_ratio=focus_mlp_ratio[turn],
                    scale=layer_scale[2 + turn],
                    is_first=turn == 0 and index == 0,
                    is_last=turn == 1 and index == focus_depths[1] - 1,
                    drop_path=next(rates),
                    **shared,
                )
                for index in range(focus_depths[turn])
            )
            for turn in range(2)
        )
        self.focus_down = _conv_norm(features[2], last, 3, stride=2, **common)
        self.context_down = _conv_norm(last // 4, last // 4, 3, stride=2, **common)
        self.proj = _conv_norm(last + last // 4, projection, 1, activation=silu, **common)
        self.head: Any = nnx.data(staged.classifier(projection, num_classes, **common))
        self.aux_norm = BatchNorm(last, **stored) if auxiliary else nnx.data(None)
        self.aux_head = nnx.data(staged.classifier(last, num_classes, **common) if auxiliary else None)
        redraw_kernels(self, trunc_normal, convolutions=True, rngs=rngs)

    def stages(self, images: ArrayLike, *, deterministic: bool = True) -> tuple[jax.Array, ...]:
        """The maps `(B, Hh, Ww, C)` of strides 4 and 8, and of the focus at 16 and 32, whose channels hold the context.

        Raises:
          ValueError: for images of another shape.
        """
        return self._through(images, self.edits(), deterministic)[0]

    def tokens(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """The last map of the focus as tokens `(B, N, C)`."""
        x = self.stages(images, deterministic=deterministic)[-1]
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def pooled(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """What is classified: one vector `(B, projection)` for each image."""
        return self._pooled(self.stages(images, deterministic=deterministic)[-1], deterministic)

    def heads(self, images: ArrayLike, *, deterministic: bool = True) -> Heads:
        """The logits of both nets; interventions at the point `logits` see the focus's.

        Raises:
          ValueError: for a model without classes, or images of another shape.
        """
        if self.head is None:
            raise ValueError("num_classes is missing: the model has no heads")
        edits = self.edits()
        maps, overview = self._through(images, edits, deterministic)
        other = None
        if self.aux_head is not None and self.aux_norm is not None:
            pooled = staged.token_mean(self.aux_norm(overview, deterministic=deterministic))
            other = self.aux_head(pooled).astype(jnp.float32)
        return Heads(self._logits(self._pooled(maps[-1], deterministic), edits), other)

    def __call__(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """Logits, or without classes what `pooled` gives."""
        edits = self.edits()
        x = self._pooled(self._through(images, edits, deterministic)[0][-1], deterministic)
        return x if self.head is None else self._logits(x, edits)

    def _logits(self, x: jax.Array, edits: Pass) -> jax.Array:
        return visit(self, edits.model, "logits", self.head(x).astype(jnp.float32))

    def _pooled(self, x: jax.Array, deterministic: bool) -> jax.Array:
        return staged.token_mean(self.proj(x, deterministic=deterministic))

    def _through(self, images: ArrayLike, edits: Pass, deterministic: bool) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """The maps, and the overview's of stride 32."""
        x = jnp.asarray(images, self.dtype)
        if x.ndim != 4 or x.shape[-1] != self.channels:
            raise ValueError(f"images must be (B, H, W, {self.channels}), got {x.shape}")
        told: dict[str, Any] = {"deterministic": deterministic}
        own = itertools.repeat(None) if edits.blocks is None else iter(edits.blocks)
        maps = []
        for stage, blocks in enumerate(self.base):
            x = self.stem(x, **told) if stage == 0 else self.downs[stage - 1](x, **told)
            for block in blocks:
                x = block(x, edits=next(own), **told)
            maps.append(x)
        start = self.overview(x)
        x = maps[2]
        enlarged = resize_bilinear(start, x.shape[1:3])
        context = enlarged
        for block in self.focus[0]:
            x, context = block(x, context, enlarged, edits=next(own), **told)
        middle = jnp.concatenate([x, context], -1)
        x, context = self.focus_down(x, **told), self.context_down(context, **told)
        for block in self.focus[1][:-1]:
            x, context = block(x, context, start, edits=next(own), **told)
        whole: Any = self.focus[1][-1](x, context, start, edits=next(own), **told)
        return (*maps[:2], middle, whole), maps[3]


_SIZES: dict[str, dict[str, Any]] = {
    "xt": {"features": (56, 112, 256, 336), "depths": (2, 2, 3, 2), "focus_depths": (6, 2), "num_heads": (4, 6)},
    "t": {},
    "s": {"features": (64, 128, 320, 512), "depths": (6, 6, 8, 3), "focus_depths": (16, 3), "num_heads": (8, 16)},
    "b": {"features": (80, 160, 384, 576), "depths": (8, 8, 10, 4), "focus_depths": (20, 4), "num_heads": (6, 9)},
}
OVERLOCKS: Models = {f"overlock_{name}": (OverLoCK, size) for name, size in _SIZES.items()}
"""For `staged.build_named`: XT, T, S, B have 16.5, 33.5, 56.2, 94.9 M parameters, merged (T: 84.2 %)."""
