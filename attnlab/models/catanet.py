"""CATANet, super-resolution by groups of alike tokens (Liu et al., CVPR 2025, arXiv:2503.06896).

    x = x + W groups(LN(x));   x = x + FFN(LN(x))                 a block of groups, `TokenAggregationBlock`
    z = z + attention(LN(z)) in each patch z of x;   x = join(z);   x = x + FFN(LN(x))          a block of patches
    f = conv(image);   f = f + blocks(f), each  f = f + conv(patches(groups(f)))
    result = conv(finer(f)) + bilinear(image)

FFN(x) = W₂ (h + gelu(DWConv(h))), h = gelu(W₁ x), with kernels of 5 tokens on a side. `finer` makes channels places:
once for factors 2 and 3, twice for 4. The mechanism is in `attnlab.attention.sparse.catanet`. Reference:
EquationWalker/CATANet.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.sparse.catanet import (
    PAPER,
    IntraGroupAttention,
    assign,
    chunk_means,
    cut_patches,
    join_patches,
    refine,
)
from attnlab.models.inputs import ImagePairs
from attnlab.models.staged import Models
from attnlab.nn.activations import leaky_relu
from attnlab.nn.cross_attention import CrossAttention
from attnlab.nn.grids import to_tokens
from attnlab.nn.heads import ToHeads
from attnlab.nn.linear import Conv, Linear, trunc_normal
from attnlab.nn.mlp import MLP
from attnlab.nn.norms import LayerNorm
from attnlab.nn.resampling import resize_bilinear
from attnlab.nn.token_selection import group_by
from attnlab.nn.upsampling import pixel_shuffle
from attnlab.points import Editable, Edits, Layer, Pass, visit
from attnlab.registry import Cost, Example, Kind, Source, register
from pallas_kernels.dtypes import at_least_float32

_REPOSITORY = "EquationWalker/CATANet"
FirstCentres = Literal["data", "random"]


def _feed_forward(features: int, hidden: int, **common: Any) -> MLP:
    return MLP(features, hidden, depthwise=5, residual=True, activation_at=("map", "conv"), **common)


def _example() -> Example:
    sizes = {"qk_features": 6, "mlp_features": 8, "num_heads": 2, "num_centres": 3, "group_size": 8}
    block = TokenAggregationBlock(8, **sizes, first="random", rngs=nnx.Rngs(0))
    return Example(block, (np.random.default_rng(0).standard_normal((2, 4, 4, 8)).astype(np.float32),))


@register(
    "catanet",
    kind=Kind.MODULE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=_REPOSITORY,
    cost=Cost(time="O(N·(2g+M)·C)", memory="O(N·(2g+M)·H)"),
    summary="a block of attention in groups of alike tokens, by centres that are running means",
    small=_example,
)
class TokenAggregationBlock(nnx.Module):
    """Images of tokens `(B, H, W, C)` to the same shape. The centres are state, changed in training alone.

    Args:
      features: channels C.
      qk_features: channels of queries and keys of all heads.
      mlp_features: hidden channels of the feed-forward.
      num_heads: heads H.
      num_centres: M.
      group_size: tokens g of a group.
      iterations: refinements of the centres in a step of training, at least 1.
      decay: share of the old centres that a step of training leaves.
      first: the first centres: "data", means of what the first call is given (in evaluation too, over its batch, until
        training has set them); or "random", drawn at construction.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if heads do not divide the channels, for another `first`, or numbers below 1.
    """

    def __init__(
        self,
        features: int = 40,
        *,
        qk_features: int = 36,
        mlp_features: int = 96,
        num_heads: int = 4,
        num_centres: int = 8,
        group_size: int = 128,
        iterations: int = 3,
        decay: float = 0.999,
        first: FirstCentres = "data",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if first not in get_args(FirstCentres):
            raise ValueError(f"first must be one of {', '.join(get_args(FirstCentres))}, got {first!r}")
        if iterations < 1 or num_centres < 1:
            raise ValueError(f"iterations and num_centres must be at least 1, got {iterations} and {num_centres}")
        self.iterations, self.decay, self.dtype = iterations, decay, dtype
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        drawn = jax.random.normal(rngs.params(), (num_centres, features), at_least_float32(param_dtype))
        self.centres = nnx.BatchStat(drawn)
        self.ready = nnx.BatchStat(jnp.asarray(first == "random"))
        self.norm, self.mlp_norm = (LayerNorm(features, eps=1e-5, **stored) for _ in range(2))
        self.attention = IntraGroupAttention(
            features, qk_features=qk_features, num_heads=num_heads, group_size=group_size, **common
        )
        into = {"use_bias": False, "kernel_init": trunc_normal, **common}
        self.centre_key = ToHeads(features, num_heads, qk_features // num_heads, **into)
        self.centre_value = ToHeads(features, num_heads, features // num_heads, **into)
        self.proj = Linear(features, features, **into)
        self.mlp = _feed_forward(features, mlp_features, **common)

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        x = jnp.asarray(x, self.dtype)
        tokens = self.norm(to_tokens(x))
        fixed = jax.lax.stop_gradient(tokens)
        held = self.centres[...]
        centres = jnp.where(self.ready[...], held, chunk_means(fixed, len(held)).astype(held.dtype))
        if not deterministic:
            # Refinements are differentiated in the last one alone.
            again = self.iterations - 1
            centres = jax.lax.fori_loop(0, again, lambda _, m: refine(fixed, m).astype(held.dtype), centres)
            centres = refine(tokens, centres).astype(held.dtype)
        places = group_by(assign(fixed, centres)).places
        seen = centres.astype(x.dtype)
        y = self.attention(tokens, places, self.centre_key(seen), self.centre_value(seen))
        x = x + self.proj(y).reshape(x.shape)
        if not deterministic:
            new = jax.lax.stop_gradient(centres)
            self.centres[...] = jnp.where(self.ready[...], self.decay * held + (1 - self.decay) * new, new)
            self.ready[...] = jnp.asarray(True)
        return x + self.mlp(self.mlp_norm(x))


class OverlappingPatchBlock(nnx.Module):
    """Images of tokens `(B, H, W, C)` to the same shape.

    Args:
      features: channels C.
      qk_features: channels of queries and keys of all heads.
      mlp_features: hidden channels of the feed-forward.
      num_heads: heads H.
      patch_size: tokens p on a side of a patch, at least 3; an axis that is shorter has one patch.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if heads do not divide the channels, or for smaller patches.
    """

    def __init__(
        self,
        features: int = 40,
        *,
        qk_features: int = 36,
        mlp_features: int = 96,
        num_heads: int = 4,
        patch_size: int = 16,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % num_heads or qk_features % num_heads:
            raise ValueError(f"num_heads must divide {features=} and {qk_features=}, got {num_heads}")
        if patch_size < 3:
            raise ValueError(f"patch_size must be at least 3, since patches overlap by 2 tokens, got {patch_size}")
        self.patch_size, self.dtype = patch_size, dtype
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        self.norm, self.mlp_norm = (LayerNorm(features, eps=1e-5, **stored) for _ in range(2))
        self.attention = CrossAttention(
            features,
            num_heads=num_heads,
            head_dim=qk_features // num_heads,
            value_dim=features // num_heads,
            use_bias=False,
            out_bias=False,
            kernel_init=trunc_normal,
            **common,
        )
        self.mlp = _feed_forward(features, mlp_features, **common)

    def __call__(self, x: ArrayLike) -> jax.Array:
        x = jnp.asarray(x, self.dtype)
        patches = cut_patches(x, self.patch_size)
        z = patches.reshape(-1, patches.shape[3] * patches.shape[4], x.shape[-1])
        normed = self.norm(z)
        z = z + self.attention(normed, normed)
        x = join_patches(z.reshape(patches.shape), x.shape[1:3], self.patch_size)
        return x + self.mlp(self.mlp_norm(x))


class GroupsAndPatches(Layer):
    """x + conv(patches(groups(x))), a layer of the network.

    Args:
      groups: block of groups.
      patches: block of patches.
      conv: behind both.
    """

    def __init__(self, groups: TokenAggregationBlock, patches: OverlappingPatchBlock, conv: Conv):
        self.groups, self.patches, self.conv = groups, patches, conv

    @property
    def points(self) -> frozenset[str]:
        return frozenset({"stream", "mixed"})

    def __call__(self, x: jax.Array, *, edits: Edits | None = None, deterministic: bool = True) -> jax.Array:
        x = visit(self, edits, "stream", x)
        y = visit(self, edits, "mixed", self.groups(x, deterministic=deterministic))
        return x + self.conv(self.patches(y))


@register(
    "catanet.net",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=_REPOSITORY,
    cost=Cost(time="O(N·(2g+M+p²)·C)", memory="O(N·(2g+M+p²)·H)"),
    summary="super-resolution by blocks of groups of alike tokens and blocks of overlapping patches",
    small={"features": 8, "qk_features": 8, "mlp_features": 8, "num_heads": 2, "patch_size": (8,), "iterations": (2,)}
    | {"num_centres": (3,), "group_size": (64,), "first": "random"},
)
class CATANet(Editable):
    """Images `(B, H, W, channels)` to finer ones `(B, f·H, f·W, channels)`, in float32: the point `logits`.

    Args:
      features: channels C.
      qk_features: channels of queries and keys of all heads.
      mlp_features: hidden channels of the feed-forwards.
      num_heads: heads H.
      patch_size: tokens on a side of the patches, one for each pair of blocks, whose number is theirs.
      iterations: refinements of the centres in a step of training, for each pair.
      num_centres: M of each pair.
      group_size: g of each pair.
      first: the first centres, see `TokenAggregationBlock`.
      channels: of the images.
      upscale: f, 1 to 4; 1 keeps the size, without the last activation.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for another factor, or lists of different lengths.
    """

    inputs: ClassVar[ImagePairs] = ImagePairs()
    model_points = frozenset({"logits"})

    def __init__(
        self,
        features: int = 40,
        *,
        qk_features: int = 36,
        mlp_features: int = 96,
        num_heads: int = 4,
        patch_size: Sequence[int] = (16, 20, 24, 28, 16, 20, 24, 28),
        iterations: Sequence[int] = (5,) * 8,
        num_centres: Sequence[int] = (16, 32, 64, 128, 16, 32, 64, 128),
        group_size: Sequence[int] = (256, 128, 64, 32, 256, 128, 64, 32),
        first: FirstCentres = "data",
        channels: int = 3,
        upscale: int = 2,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if upscale not in (1, 2, 3, 4):
            raise ValueError(f"upscale must be from 1 to 4, got {upscale}")
        lists = {"iterations": iterations, "num_centres": num_centres, "group_size": group_size}
        for name, values in lists.items():
            if len(values) != len(patch_size):
                raise ValueError(f"{name} must have one entry for each of {len(patch_size)} patches, got {len(values)}")
        self.upscale, self.channels, self.dtype = upscale, channels, dtype
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        sizes: dict[str, Any] = {"qk_features": qk_features, "mlp_features": mlp_features, "num_heads": num_heads}
        self.enter = Conv(channels, features, (3, 3), axes=(None, "embed"), **common)
        self.blocks = nnx.List(
            GroupsAndPatches(
                TokenAggregationBlock(
                    features, **sizes, iterations=i, num_centres=m, group_size=g, first=first, **common
                ),
                OverlappingPatchBlock(features, **sizes, patch_size=p, **common),
                Conv(features, features, (3, 3), **common),
            )
            for i, m, g, p in zip(*lists.values(), patch_size, strict=True)
        )
        self.steps = {1: (), 2: (2,), 3: (3,), 4: (2, 2)}[upscale]
        self.finer = nnx.List(Conv(features, features * step**2, (3, 3), **common) for step in self.steps)
        self.leave = Conv(features, channels, (3, 3), axes=("embed", None), **common)

    def features(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """The tokens `(B, H, W, C)` behind all blocks, one for each pixel.

        Raises:
          ValueError: for images of another shape.
        """
        return self._through(self._checked(images), self.edits(), deterministic)

    def __call__(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        edits = self.edits()
        x = self._through(self._checked(images), edits, deterministic)
        for conv, step in zip(self.finer, self.steps, strict=True):
            x = leaky_relu(pixel_shuffle(conv(x), step), 0.1)
        base = jnp.asarray(images, at_least_float32(x.dtype))
        base = resize_bilinear(base, tuple(self.upscale * side for side in base.shape[1:3]))
        return visit(self, edits.model, "logits", base + self.leave(x).astype(base.dtype))

    def _checked(self, images: ArrayLike) -> jax.Array:
        images = jnp.asarray(images, self.dtype)
        if images.ndim != 4 or images.shape[-1] != self.channels:
            raise ValueError(f"images must be (B, H, W, {self.channels}), got {images.shape}")
        return images

    def _through(self, images: jax.Array, edits: Pass, deterministic: bool) -> jax.Array:
        first = x = self.enter(images)
        own = [None] * len(self.blocks) if edits.blocks is None else edits.blocks
        for block, here in zip(self.blocks, own, strict=True):
            x = block(x, edits=here, deterministic=deterministic)
        return x + first


CATANETS: Models = {f"catanet_x{factor}": (CATANet, {"upscale": factor}) for factor in (2, 3, 4)}
"""For `staged.build_named`: ×2, ×3, ×4 have 477, 550, 535 thousand parameters."""
