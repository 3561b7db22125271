"""TANet, a U-Net that restores images from haze, rain and snow (Wang et al., ACCV 2024); f is leaky ReLU, 0.2.

    x = f(conv(f(conv(x))) + x), three times          a stage, on grids of stride 1 and 2 with C and 2C channels
    x = triplet(x), ten times                         on the grid of stride 4 with 4C channels
    x = f(W [up(x) | skip]), and a stage              on the way up
    result = f(conv(x)) + image

Convolutions of 4 × 4 lead down, transposed ones of 2 × 2 up. No numbers of the authors' whole network are compared:
its weights are too large. Code: xhuachris/TANet-ACCV-2024.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.mixers.tanet import COST, PAPER, REPOSITORY, TripletAttention, leaky
from attnlab.models.inputs import ImagePairs
from attnlab.models.staged import Models
from attnlab.nn.chain import Chain
from attnlab.nn.linear import Conv, Linear
from attnlab.nn.upsampling import ConvTranspose
from attnlab.points import Editable, Edits, Layer, visit
from attnlab.registry import Kind, Source, register
from pallas_kernels.dtypes import at_least_float32


class ResidualConvs(nnx.Module):
    """f(conv(f(conv(x))) + x), images `(B, H, W, C)` to the same shape.

    Args:
      features: channels C.
      **common: `dtype`, `param_dtype` and `rngs`.
    """

    def __init__(self, features: int, **common: Any):
        self.conv1, self.conv2 = (Conv(features, features, (3, 3), **common) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        return leaky(self.conv2(leaky(self.conv1(x))) + x)


class Upward(nnx.Module):
    """A coarse map and the encoder's of twice its sides, to the latter's shape, through a stage.

    Args:
      features: channels C of the finer map; the coarser has twice as many.
      depth: residual blocks.
      **common: `dtype`, `param_dtype` and `rngs`.
    """

    def __init__(self, features: int, depth: int, **common: Any):
        self.up = ConvTranspose(2 * features, features, (2, 2), stride=2, **common)
        self.merge = Linear(2 * features, features, **common)
        self.blocks = Chain(*(ResidualConvs(features, **common) for _ in range(depth)))

    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        return self.blocks(leaky(self.merge(jnp.concatenate([self.up(x), skip], -1))))


class TripletLayer(Layer):
    """Triplet attention as a layer of the network, which adds nothing to it.

    Args:
      mixer: the attention.
    """

    def __init__(self, mixer: TripletAttention):
        self.mixer = mixer

    @property
    def points(self) -> frozenset[str]:
        return frozenset({"stream", "mixed"})

    def __call__(self, x: jax.Array, *, edits: Edits | None = None, deterministic: bool = True) -> jax.Array:
        x = visit(self, edits, "stream", x)
        return visit(self, edits, "mixed", self.mixer(x, deterministic=deterministic))


@register(
    "tanet.net",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=COST,
    summary="a U-Net that restores images, with triplet attention on its coarsest grid",
    small={"features": 4, "depth": 1, "residual_depth": 1},
)
class TANet(Editable):
    """Images `(B, H, W, channels)` to restored ones of the same shape, in float32: the point `logits`.

    Args:
      features: channels C of the finest grid; 2C and 4C on the coarser ones.
      depth: blocks of triplet attention.
      residual_depth: residual blocks of each stage.
      kernel_size: pixels on a side of the pixel maps' kernels.
      channels: of the images.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    inputs: ClassVar[ImagePairs] = ImagePairs(sizes=("channels",))
    model_points = frozenset({"logits"})

    def __init__(
        self,
        features: int = 32,
        *,
        depth: int = 10,
        residual_depth: int = 3,
        kernel_size: int = 7,
        channels: int = 3,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.channels, self.dtype = channels, dtype
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        widths = (features, 2 * features, 4 * features)
        self.enter = Conv(channels, features, (3, 3), axes=(None, "embed"), **common)
        self.encoders = nnx.List(
            Chain(*(ResidualConvs(width, **common) for _ in range(residual_depth))) for width in widths[:2]
        )
        half: dict[str, Any] = {"strides": 2, "padding": [(1, 1), (1, 1)], "use_bias": False}
        self.downs = nnx.List(Conv(width, 2 * width, (4, 4), **half, **common) for width in widths[:2])
        self.attention = nnx.List(
            TripletLayer(TripletAttention(widths[2], kernel_size=kernel_size, **common)) for _ in range(depth)
        )
        self.decoders = nnx.List(Upward(width, residual_depth, **common) for width in widths[1::-1])
        self.leave = Conv(features, channels, (3, 3), axes=("embed", None), **common)

    def __call__(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """Restores images; there is nothing random in training.

        Raises:
          ValueError: for images of another shape, or with sides that are no multiples of 4.
        """
        images = jnp.asarray(images, self.dtype)
        if images.ndim != 4 or images.shape[-1] != self.channels or any(side % 4 for side in images.shape[1:3]):
            raise ValueError(f"images must be (B, H, W, {self.channels}), sides multiples of 4, got {images.shape}")
        x, skips = leaky(self.enter(images)), []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            skips.append(encoder(x))
            x = down(skips[-1])
        edits = self.edits()
        own = [None] * len(self.attention) if edits.blocks is None else edits.blocks
        for block, here in zip(self.attention, own, strict=True):
            x = block(x, edits=here, deterministic=deterministic)
        for decoder, skip in zip(self.decoders, skips[::-1], strict=True):
            x = decoder(x, skip)
        wide = at_least_float32(images.dtype)
        return visit(self, edits.model, "logits", leaky(self.leave(x)).astype(wide) + images.astype(wide))


TANETS: Models = {"tanet": (TANet, {})}
"""For `staged.build_named`: it has 9.0 M parameters, those of the authors' class but for 0.9 M that nothing there uses;
what their paper counts could not be read."""
