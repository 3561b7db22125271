"""MEDUSA: one view of the whole image that gates every stage of a convolutional network (Aboutalebi et al., 2021).

Only the abstract is known to us: an encoder-decoder body that looks at the image once, and a light head at each scale
that makes of its global features, and of the stage's own, an attention of that stage. Every internal below is our
reading, none is checked against the authors' numbers. (Not the decoding of language models of the same name.)

    A = body(image)                                        (B, H, W, g), a U-Net of strided and enlarging convolutions
    u = W pool(A),   m = σ(W relu(BN(conv3([y | u]))))     a head, on the grid of the stage's map y
    y = y ⊙ m,  or  y + y ⊙ m  with a residual

Gates begin at one half: the last maps have no bias. In the trunk here the gated map goes on to the next stage.
"""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import record
from attnlab.models import staged
from attnlab.models.inputs import Images
from attnlab.nn.activations import relu, sigmoid
from attnlab.nn.conv import ConvNorm
from attnlab.nn.linear import Linear
from attnlab.nn.norms import BatchNorm
from attnlab.nn.resampling import adaptive_avg_pool, resize_bilinear
from attnlab.points import Editable, Edits, Layer, Pass, visit
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper(
    "MEDUSA: Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture for Medical Image Analysis",
    "Aboutalebi et al.",
    2021,
    number=46,
)
COST = Cost(time="O(N·C²)", memory="O(N·C)")


def _conv(features: int, out: int, **options: Any) -> ConvNorm:
    return ConvNorm(features, out, 3, norm=BatchNorm, activation=relu, use_bias=False, **options)


class GlobalAttentionBody(nnx.Module):
    """Images `(B, H, W, channels)` to global features `(B, H, W, g)`; see the module docstring.

    Args:
      channels: of the images.
      features: g.
      widths: channels of the levels on the way down, each of half the resolution of the one before.
      dtype: of the computation and the result; that of the images when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: without a level.
    """

    def __init__(
        self,
        channels: int = 3,
        features: int = 8,
        *,
        widths: Sequence[int] = (16, 32, 64, 128),
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not widths:
            raise ValueError("widths must name the channels of one level at least")
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.dtype, grids = dtype, (channels, *widths)
        self.downs = nnx.List(_conv(a, b, stride=2, **common) for a, b in itertools.pairwise(grids))
        ups: list[nnx.Module] = []
        below = grids[-1]
        for beside in grids[-2::-1]:
            # The image itself is beside the last step up, which makes the global features' channels.
            out = beside if len(ups) + 1 < len(widths) else features
            ups.append(_conv(below + beside, out, **common))
            below = out
        self.ups = nnx.List(ups)
        self.out = Linear(features, features, **common)

    def __call__(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        x = jnp.asarray(images, self.dtype)
        maps = [x]
        for down in self.downs:
            maps.append(down(maps[-1], deterministic=deterministic))
        x = maps.pop()
        for up, skip in zip(self.ups, reversed(maps), strict=True):
            x = up(jnp.concatenate([resize_bilinear(x, skip.shape[1:3]), skip], -1), deterministic=deterministic)
        return self.out(x)


def _head_example() -> Example:
    rng = np.random.default_rng(0)
    y, a = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 4, 5, 6), (2, 8, 10, 3)))
    return Example(ScaleHead(6, 3, rngs=nnx.Rngs(0)), (y, a), batched=(0, 1), differentiable=(0, 1))


@register(
    "medusa",
    kind=Kind.MODULE,
    paper=PAPER,
    source=Source.ABSTRACT_ONLY,
    cost=COST,
    summary="a stage's map gated by global features of the image together with its own (our reading)",
    small=_head_example,
)
class ScaleHead(nnx.Module):
    """A stage's map `(B, h, w, C)` and global features `(B, H, W, g)` to the gated map; see the module docstring.

    Args:
      features: channels C of the stage.
      global_features: g.
      residual: whether the map is added to the gated one.
      dtype: of the computation and the result; that of the map when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        global_features: int = 8,
        *,
        residual: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.residual, self.dtype = residual, dtype
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.spread = Linear(global_features, features, **common)
        self.local = _conv(2 * features, features, **common)
        self.gate = Linear(features, features, **common)

    def __call__(self, y: ArrayLike, whole: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """Gates a map.

        Args:
          y: of the stage, `(B, h, w, C)`.
          whole: global features `(B, H, W, g)`, averaged over the cells of the stage's grid.
          deterministic: False in training.

        Raises:
          ValueError: for another number of images.
        """
        y = jnp.asarray(y, self.dtype)
        whole = jnp.asarray(whole, y.dtype)
        if whole.shape[0] != y.shape[0]:
            raise ValueError(f"global features must be of {y.shape[0]} images, got {whole.shape[0]}")
        u = self.spread(adaptive_avg_pool(whole, y.shape[1:3]))
        seen = self.local(jnp.concatenate([y, u], -1), deterministic=deterministic)
        gate = sigmoid(self.gate(seen).astype(at_least_float32(y.dtype)))
        record(self, "gate", lambda: gate)
        gated = y * gate.astype(y.dtype)
        return y + gated if self.residual else gated


class TrunkStage(Layer):
    """A strided convolution and residual ones: relu(conv(relu(conv(x))) + x)."""

    def __init__(self, features: int, out: int, depth: int, **common: Any):
        self.down = _conv(features, out, stride=2, **common)
        self.inner = nnx.List(_conv(out, out, **common) for _ in range(depth))
        self.outer = nnx.List(ConvNorm(out, out, 3, norm=BatchNorm, use_bias=False, **common) for _ in range(depth))

    @property
    def points(self) -> frozenset[str]:
        return frozenset({"stream"})

    def __call__(self, x: jax.Array, *, edits: Edits | None = None, deterministic: bool = True) -> jax.Array:
        x = visit(self, edits, "stream", x)
        x = self.down(x, deterministic=deterministic)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = relu(x + outer(inner(x, deterministic=deterministic), deterministic=deterministic))
        return x


@register(
    "medusa.net",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.ABSTRACT_ONLY,
    cost=COST,
    summary="a small residual network whose stages are gated by one look at the whole image (our reading)",
    small={"features": (4, 8), "body": (4, 8), "global_features": 4, "num_classes": 5, "image_size": 32},
)
class Medusa(Editable):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32.

    Args:
      features: channels of the stages of the trunk, each of half the resolution of the one before.
      depth: residual pairs of convolutions in each.
      body: channels of the body's levels.
      global_features: g.
      gated: which stages have a head; all when None.
      residual: whether a map is added to the gated one.
      image_size: pixels on a side, or (rows, columns); of no effect, any image will do.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for a stage that does not exist.
    """

    inputs: ClassVar[Images] = Images()
    model_points = frozenset({"logits"})

    def __init__(
        self,
        features: Sequence[int] = (32, 64, 128, 256),
        *,
        depth: int = 1,
        body: Sequence[int] = (16, 32, 64, 128),
        global_features: int = 8,
        gated: Sequence[int] | None = None,
        residual: bool = False,
        image_size: int | Sequence[int] | None = 224,
        channels: int = 3,
        num_classes: int | None = 1000,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        chosen = range(len(features)) if gated is None else gated
        if set(chosen) - set(range(len(features))):
            raise ValueError(f"gated must name some of {len(features)} stages, got {tuple(chosen)}")
        self.channels, self.dtype = channels, dtype
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.body = GlobalAttentionBody(channels, global_features, widths=body, **common)
        self.stage = nnx.List(TrunkStage(a, b, depth, **common) for a, b in itertools.pairwise((channels, *features)))
        self.gated = tuple(sorted(chosen))
        heads = (ScaleHead(features[index], global_features, residual=residual, **common) for index in self.gated)
        self.gates = nnx.List(heads)
        self.head = nnx.data(staged.classifier(features[-1], num_classes, **common))

    def stages(self, images: ArrayLike, *, deterministic: bool = True) -> tuple[jax.Array, ...]:
        """The map `(B, h, w, C)` that each stage leaves, gated. The body looks at the images once.

        Raises:
          ValueError: for images of another shape.
        """
        return self._through(images, self.edits(), deterministic)

    def tokens(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """The last stage's map as tokens `(B, N, C)`."""
        x = self.stages(images, deterministic=deterministic)[-1]
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def pooled(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """What is classified: one vector `(B, C)` for each image."""
        return staged.token_mean(self.stages(images, deterministic=deterministic)[-1])

    def __call__(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """Logits, or without classes what `pooled` gives."""
        edits = self.edits()
        x = staged.token_mean(self._through(images, edits, deterministic)[-1])
        return x if self.head is None else visit(self, edits.model, "logits", self.head(x).astype(jnp.float32))

    def _through(self, images: ArrayLike, edits: Pass, deterministic: bool) -> tuple[jax.Array, ...]:
        x = jnp.asarray(images, self.dtype)
        if x.ndim != 4 or x.shape[-1] != self.channels:
            raise ValueError(f"images must be (B, H, W, {self.channels}), got {x.shape}")
        whole, maps = self.body(x, deterministic=deterministic), []
        gates = dict(zip(self.gated, self.gates, strict=True))
        own = [None] * len(self.stage) if edits.blocks is None else edits.blocks
        for index, (stage, here) in enumerate(zip(self.stage, own, strict=True)):
            x = stage(x, edits=here, deterministic=deterministic)
            x = gates[index](x, whole, deterministic=deterministic) if index in gates else x
            maps.append(x)
        return tuple(maps)
