"""Dynamic Perceiver: latents beside a convolutional trunk, which classify early (ICCV 2023, arXiv:2306.11248).

f are features, a map of four stages of a trunk; z are latents, n at first, in the width of what goes into a stage:

    stage 1            z = x2z(z, pool(f + DWConv(f)));   z = self-attention layers(z);   f = trunk_1(f)
    to stage i + 1     z = W_c LN(z),  of  z = (W_n LN(z^T))^T      half as many latents, in the stage's width
                       f = z2x(f, z);   z = x2z(z, pool(f + DWConv(f)));   z = self-attention layers(z);   f = trunk(f)

with pooling to 7x7 tokens and a depthwise convolution 7x7. Four classifiers, one after the other:

    early    of mean z in stage 3                       latent   of mean z in stage 4 and relu(BN(W early))
    cnn      of mean f, the trunk's own                 merged   of BN([mean z2x(f, z); mean z; relu(BN(W latent))])

What is sure enough of itself leaves at its classifier: `attnlab.models.early_exit` finds thresholds, counts and does
so; `attnlab.objectives.exits` trains all of them. Code: LeapLabTHU/Dynamic_Perceiver.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.cross.dyn_perceiver import SOURCE, CrossLatentLayer, SelfLatentLayer
from attnlab.models import staged
from attnlab.models.inputs import Images
from attnlab.models.regnet import REGNETS, RegNetY
from attnlab.models.resnet import RESNETS, ResNet
from attnlab.models.staged import Models, StagedBackbone
from attnlab.nn.activations import relu
from attnlab.nn.chain import call
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.linear import Linear, trunc_normal
from attnlab.nn.norms import BatchNorm, LayerNorm
from attnlab.nn.resampling import adaptive_avg_pool
from attnlab.points import Editable, Edits, visit
from attnlab.registry import Cost, Kind, register
from pallas_kernels.dtypes import at_least_float32

POOLED = 7
"""Tokens on a side of the features that latents read."""
LAYERS = (3, 3, 9, 3)
"""Self-attention layers of each stage, times its depth factor."""


class Exits(NamedTuple):
    """Logits `(B, num_classes)` in float32 of all four classifiers, in the order in which they are known."""

    early: jax.Array
    latent: jax.Array
    cnn: jax.Array
    merged: jax.Array


class Progress(NamedTuple):
    """How far a pass has come: features `(B, H, W, C)`, latents `(B, n, C)`, and the last logits of the latents."""

    features: jax.Array
    latents: jax.Array
    logits: jax.Array | None


class Halving(nnx.Module):
    """Latents `(B, n, C)` to half as many of another width: LN and a map along the latents, then along the channels."""

    def __init__(self, latents: int, features: int, out_features: int, *, dtype: Any, **stored: Any):
        self.token_norm, self.norm = (LayerNorm(size, eps=1e-5, **stored) for size in (latents, features))
        self.token_map = Linear(latents, latents // 2, axes=(None, None), dtype=dtype, **stored)
        self.map = Linear(features, out_features, dtype=dtype, **stored)

    def __call__(self, z: jax.Array) -> jax.Array:
        z = jnp.swapaxes(self.token_map(self.token_norm(jnp.swapaxes(z, 1, 2))), 1, 2)
        return self.map(self.norm(z))


class TwoBranchStage(nnx.Module):
    """One stage of both branches; see `DynamicPerceiver` for what its parts are."""

    def __init__(
        self,
        trunk: nnx.Module,
        latents: nnx.List,
        *,
        halving: Halving | None,
        read: CrossLatentLayer | None,
        conv: DepthwiseConv | None,
        written: CrossLatentLayer | None,
    ):
        self.latents, self.trunk = latents, trunk
        for name, part in {"halving": halving, "read": read, "conv": conv, "written": written}.items():
            setattr(self, name, nnx.data(None) if part is None else part)

    def think(
        self, f: jax.Array, z: jax.Array, edits: Sequence[Edits | None], deterministic: bool
    ) -> tuple[jax.Array, jax.Array]:
        """All of the stage in front of its part of the trunk."""
        z = z if self.halving is None else self.halving(z)
        if self.written is not None:
            flat = f.reshape(f.shape[0], -1, f.shape[-1])
            f = self.written(flat, z, deterministic=deterministic).reshape(f.shape)
        if self.read is not None:
            seen = f if self.conv is None else f + self.conv(f)
            seen = adaptive_avg_pool(seen, (POOLED, POOLED)).reshape(f.shape[0], -1, f.shape[-1])
            z = self.read(z, seen, deterministic=deterministic)
        for layer, edit in zip(self.latents, edits[: len(self.latents)], strict=True):
            z = layer(z, edits=edit, deterministic=deterministic)
        return f, z

    def convolve(self, f: jax.Array, edits: Sequence[Edits | None], deterministic: bool) -> jax.Array:
        """The stage's part of the trunk."""
        f = self.trunk.enter(f, deterministic=deterministic)
        return self.trunk(f, edits=edits[len(self.latents) :], deterministic=deterministic)

    @property
    def layers(self) -> int:
        """Layers of both branches."""
        return len(self.latents) + len(self.trunk.blocks)


@register(
    "dyn_perceiver.backbone",
    kind=Kind.BACKBONE,
    cost=Cost(time="O(n²·C + H·W·n·C)", memory="O(n²·H + H·W·n)"),
    summary="a convolutional trunk and latents that read it and classify early, in four exits",
    small={"trunk_options": {"widths": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "group_width": 4, "stem_features": 8}}
    | {"num_latents": 16, "num_heads": (1, 1, 2, 2), "depth_factors": (0, 0, 0, 1), "with_dwc": False}
    | {"num_classes": 5},
    **SOURCE,
)
class DynamicPerceiver(Editable):
    """Images `(B, H, W, channels)` of any size to the merged logits `(B, num_classes)` in float32; `exits` gives all.

    Args:
      trunk: builds the trunk, of four stages: `trunk(num_classes=…, channels=…, dtype=…, param_dtype=…, rngs=…)`; its
        attribute `widths` has the channels of its stem and of each stage.
      trunk_options: further arguments of it.
      num_latents: n, a multiple of 8.
      num_heads: heads of the self-attention in each stage.
      depth_factors: how many times `LAYERS` self-attention layers each stage has.
      widening: hidden channels of the self-attention layers' feed-forwards over their width.
      with_x2z: whether latents read features in the stages behind the first.
      with_z2x: whether features read latents.
      with_dwc: whether what latents read passes a depthwise convolution, with a residual.
      with_last_CA: whether the last features read the last latents before they are merged.
      with_isc: whether later classifiers are given the logits of earlier ones.
      image_size: pixels on a side, or (rows, columns), of the only images to be taken; any when None.
      channels: of the images.
      num_classes: classes.
      dropout: rate in all attention layers.
      dtype: of the features; that of the images when None. Latents are float32 (or wider).
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for another number of stages, or latents that cannot be halved three times.
    """

    inputs: ClassVar[Images] = Images()
    model_points = frozenset({"logits"})

    def __init__(
        self,
        trunk: Callable[..., StagedBackbone] = RegNetY,
        *,
        trunk_options: Mapping[str, Any] | None = None,
        num_latents: int = 32,
        num_heads: Sequence[int] = (1, 2, 4, 8),
        depth_factors: Sequence[int] = (1, 1, 1, 1),
        widening: int = 1,
        with_x2z: bool = True,
        with_z2x: bool = True,
        with_dwc: bool = True,
        with_last_CA: bool = True,  # the name that is known
        with_isc: bool = True,
        image_size: int | Sequence[int] | None = None,
        channels: int = 3,
        num_classes: int = 1000,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        whole = trunk(**(trunk_options or {}), num_classes=num_classes, channels=channels, **common)
        staged.per_stage(4, num_heads=num_heads, depth_factors=depth_factors, trunk=whole.stage)
        if num_latents < 8 or num_latents % 8:
            raise ValueError(f"num_latents must be a multiple of 8, got {num_latents}")
        size = (None, None) if image_size is None else staged.pair(image_size)
        self.image_shape, self.dtype = (*size, channels), dtype
        widths, layer = whole.widths, {"dropout": dropout, **common}
        # A norm over the latents sees the small differences between them alone: they are kept wide.
        wide = {"dtype": at_least_float32(param_dtype), **stored}
        latent_layer = {"dropout": dropout, **wide}
        self.latent = nnx.Param(
            trunc_normal(rngs.params(), (num_latents, widths[0]), param_dtype),
            logical_axes=(None, "embed"),
            weight_decay=False,
        )
        self.stem, self.stage = whole.stem, nnx.List()
        for index, part in enumerate(whole.stage):
            width, first = widths[index], index == 0
            reads = first or with_x2z
            self.stage.append(
                TwoBranchStage(
                    part,
                    nnx.List(
                        [
                            SelfLatentLayer(width, num_heads=num_heads[index], widening=widening, **latent_layer)
                            for _ in range(LAYERS[index] * depth_factors[index])
                        ]
                    ),
                    halving=None if first else Halving(num_latents >> (index - 1), widths[index - 1], width, **wide),
                    read=CrossLatentLayer(width, num_heads=1, key_places=POOLED**2, **latent_layer) if reads else None,
                    conv=DepthwiseConv(width, (POOLED, POOLED), **common) if reads and with_dwc else None,
                    written=_written(width, width, **layer) if with_z2x and not first else None,
                )
            )
        third, last, final = widths[2], widths[3], widths[4]
        self.last_written = nnx.data(_written(final, last, **layer) if with_last_CA else None)
        self.early_head = Linear(third, num_classes, axes=("embed", None), **wide)
        told = last if with_isc else 0
        self.latent_head = Linear(last + told, num_classes, axes=("embed", None), **wide)
        self.cnn_head = whole.head
        self.merge_norm = BatchNorm(final + last + told, **stored)
        self.merge_head = Linear(final + last + told, num_classes, axes=("embed", None), **wide)
        self.told_map, self.told_norm = nnx.data(None), nnx.data(None)
        if with_isc:
            self.told_map = nnx.List([Linear(num_classes, last, axes=(None, "embed"), **wide) for _ in range(2)])
            self.told_norm = nnx.List([BatchNorm(last, **stored) for _ in range(2)])

    # One pass in three runs, between which examples may leave.

    def begin(self, images: ArrayLike, *, deterministic: bool = True) -> Progress:
        """Up to the early classifier: its logits, and what `proceed` goes on from."""
        return self._begin(images, self._edits(), deterministic)

    def proceed(self, progress: Progress, *, deterministic: bool = True) -> Progress:
        """From behind `begin` up to the latents' classifier, and what `finish` goes on from."""
        return self._proceed(progress, self._edits(), deterministic)

    def finish(self, progress: Progress, *, deterministic: bool = True) -> tuple[jax.Array, jax.Array]:
        """From behind `proceed` to the logits of the trunk's own classifier and of the merged one."""
        f, z = progress.features, progress.latents
        f = self.stage[3].convolve(f, self._edits()[3], deterministic)
        return self._cnn(f), self._merged(f, z, progress.logits, deterministic)[1]

    def finish_cnn(self, progress: Progress, *, deterministic: bool = True) -> jax.Array:
        """What `finish` gives of the trunk's own classifier, without the other."""
        return self._cnn(self.stage[3].convolve(progress.features, self._edits()[3], deterministic))

    def exits(self, images: ArrayLike, *, deterministic: bool = True) -> Exits:
        """The logits of all classifiers."""
        edits = self._edits()
        first = self._begin(images, edits, deterministic)
        second = self._proceed(first, edits, deterministic)
        f = self.stage[3].convolve(second.features, edits[3], deterministic)
        merged = self._merged(f, second.latents, second.logits, deterministic)[1]
        merged = visit(self, self.edits().model, "logits", merged)
        return Exits(first.logits, second.logits, self._cnn(f), merged)

    def __call__(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """The merged logits."""
        return self.exits(images, deterministic=deterministic).merged

    def pooled(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """What the merged classifier is given: features and latents, averaged, and what it is told of logits before."""
        edits = self._edits()
        at = self._proceed(self._begin(images, edits, deterministic), edits, deterministic)
        f = self.stage[3].convolve(at.features, edits[3], deterministic)
        return self._merged(f, at.latents, at.logits, deterministic)[0]

    def tokens(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """The latents `(B, n/8, C)` behind the last stage."""
        edits = self._edits()
        return self._proceed(self._begin(images, edits, deterministic), edits, deterministic).latents

    def stages(self, images: ArrayLike, *, deterministic: bool = True) -> tuple[jax.Array, ...]:
        """The features `(B, H, W, C)` that each stage's part of the trunk leaves, for dense prediction."""
        edits, maps = self._edits(), []
        f, z = self._embedded(images, deterministic)
        for stage, some in zip(self.stage, edits, strict=True):
            f, z = stage.think(f, z, some, deterministic)
            f = stage.convolve(f, some, deterministic)
            maps.append(f)
        return tuple(maps)

    def _edits(self) -> list[Sequence[Edits | None]]:
        """Interventions of each stage."""
        edits, found, first = self.edits(), [], 0
        for stage in self.stage:
            last = first + stage.layers
            found.append(edits.of(first, last) or (None,) * stage.layers)
            first = last
        return found

    def _embedded(self, images: ArrayLike, deterministic: bool) -> tuple[jax.Array, jax.Array]:
        images = jnp.asarray(images, self.dtype)
        wanted = self.image_shape
        if images.ndim != 4 or any(w not in (None, n) for w, n in zip(wanted, images.shape[1:], strict=True)):
            raise ValueError(f"images must be (B, H, W, C) with {wanted}, got {images.shape}")
        f = call(self.stem, images, deterministic)
        z = self.latent[...].astype(self.early_head.dtype)
        return f, jnp.broadcast_to(z, (f.shape[0], *z.shape))

    def _begin(self, images: ArrayLike, edits: list[Sequence[Edits | None]], deterministic: bool) -> Progress:
        f, z = self._embedded(images, deterministic)
        for index, stage in enumerate(self.stage[:3]):
            f, z = stage.think(f, z, edits[index], deterministic)
            f = f if index == 2 else stage.convolve(f, edits[index], deterministic)
        return Progress(f, z, self.early_head(staged.token_mean(z)).astype(jnp.float32))

    def _proceed(self, at: Progress, edits: list[Sequence[Edits | None]], deterministic: bool) -> Progress:
        f = self.stage[2].convolve(at.features, edits[2], deterministic)
        f, z = self.stage[3].think(f, at.latents, edits[3], deterministic)
        parts = [staged.token_mean(z), *self._told(0, at.logits, deterministic)]
        return Progress(f, z, self.latent_head(jnp.concatenate(parts, 1)).astype(jnp.float32))

    def _cnn(self, f: jax.Array) -> jax.Array:
        return self.cnn_head(staged.token_mean(f)).astype(jnp.float32)

    def _merged(
        self, f: jax.Array, z: jax.Array, logits: jax.Array | None, deterministic: bool
    ) -> tuple[jax.Array, jax.Array]:
        """What the merged classifier is given, and its logits."""
        if self.last_written is not None:
            flat = f.reshape(f.shape[0], -1, f.shape[-1])
            f = self.last_written(flat, z, deterministic=deterministic)
        told = self._told(1, logits, deterministic)
        x = jnp.concatenate([staged.token_mean(f).astype(z.dtype), staged.token_mean(z), *told], 1)
        return x, self.merge_head(call(self.merge_norm, x, deterministic)).astype(jnp.float32)

    def _told(self, which: int, logits: jax.Array | None, deterministic: bool) -> list[jax.Array]:
        """What a classifier is told of the logits before it."""
        if self.told_map is None:
            return []
        return [relu(call(self.told_norm[which], self.told_map[which](logits), deterministic))]


def _written(features: int, latents: int, **layer: Any) -> CrossLatentLayer:
    """The layer by which features read latents."""
    inner = {"qk_features": features // 8, "value_features": features // 8}
    return CrossLatentLayer(features, num_heads=1, key_features=latents, **inner, **layer)


_LATENTS = {"400m": (32, 64, 128, 256, 512), "800m": (32, 64, 128, 256, 512)}
_LATENTS |= {"1x6g": (128, 256, 512), "3x2g": (128, 256, 512)}
_RESNET_LATENTS = {"18": (128, 256, 512), "34": (128, 256, 512), "50": (64, 128, 256, 512)}
_RESNET_LATENTS |= {"50_0375": (64, 128, 256), "50_050": (64, 128, 256)}
_RESNET_LATENTS |= {"50_0625": (128, 160, 192, 256), "50_075": (128, 256)}
RESNET_DEFAULTS = {"trunk": ResNet, "widening": 4, "depth_factors": (1, 1, 1, 3)}
"""What the authors' class on a ResNet has where nothing is said."""


def _named(trunk_options: Mapping[str, Any], latents: int, **others: Any) -> tuple[type, Any]:
    return DynamicPerceiver, {"num_latents": latents, "trunk_options": trunk_options, **others}


_ON_REGNETS = {
    f"reg{size}_perceiver_t{latents}": _named(REGNETS[f"regnet_y_{size.replace('x', '_')}f"][1], latents)
    for size, numbers in _LATENTS.items()
    for latents in numbers
}
_ON_RESNETS = {
    f"resnet{size}_perceiver_t{latents}": _named(RESNETS[f"resnet{size}"][1], latents, **RESNET_DEFAULTS)
    for size, numbers in _RESNET_LATENTS.items()
    for latents in numbers
}
DYN_PERCEIVERS: Models = {**_ON_REGNETS, **_ON_RESNETS}
"""For `staged.build_named`, under the authors' names. They trained two of these with a widening of 4, in % on ImageNet
at the four exits:

    reg800m_perceiver_t128          depth factors (1, 1, 1, 2)     68.6   78.3   79.2   79.9
    resnet50_0375_perceiver_t128    depth factors (1, 1, 1, 1)     72.9   77.5   74.3   77.7
"""
