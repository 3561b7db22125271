"""RAT, a U-Net that restores images with attention inside regions (Yang et al., MICCAI 2024, arXiv:2407.09268).

    x = x + λ ⊙ regions(LN(x));   x = x + MLP(LN(x));   x = x + μ ⊙ windows(LN(x));   x = x + MLP(LN(x))       a layer
    x = x + conv(layers(x))                                                                                    a block

with λ, μ 0 at the start, and both attentions scaled by the number of heads. In front and behind stand NAF blocks (Chen
et al., 2022, arXiv:2204.04676), where (a | b) ↦ a ⊙ b is the only nonlinearity:

    g = gate(DWConv(W LN(x)));   y = x + β ⊙ W (g ⊙ (W mean(g)));   out = y + γ ⊙ W gate(W LN(y))

Between encoders 2×2 convolutions halve the sides, between decoders channels become places, and the encoder's map is
added. The labels of regions are those at the upper left pixel of each token. Code:
Yaziwel/Region-Attention-Transformer-for-Medical-Image-Restoration.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.local.window_attention import WindowAttention
from attnlab.attention.sparse.rat_region_attention import COST, PAPER, REPOSITORY, RegionAttention
from attnlab.models.inputs import ImagePairs
from attnlab.models.staged import Models
from attnlab.nn.chain import Chain
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.linear import Conv, Linear
from attnlab.nn.mlp import MLP, LayerScale
from attnlab.nn.norms import LayerNorm
from attnlab.nn.resampling import resize_bilinear, resize_nearest
from attnlab.nn.upsampling import pixel_shuffle
from attnlab.points import Editable, Edits, Layer, visit
from attnlab.registry import Kind, Source, register
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.integers import integers


class RegionLayer(Layer):
    """Images of tokens `(B, H, W, C)` with labels `(B, H, W)` to the same shape; see the module docstring.

    Args:
      features: channels C.
      num_heads: heads H.
      window: tokens on a side of the windows, which tile the image.
      mlp_ratio: hidden channels of both feed-forwards over C, rounded down.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if heads do not divide the channels; in the call, if windows do not tile the image.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 8,
        window: int = 4,
        mlp_ratio: float = 2.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        self.norm1, self.norm2, self.norm3, self.norm4 = (LayerNorm(features, **stored) for _ in range(4))
        self.regions = RegionAttention(features, num_heads=num_heads, **common)
        inside = {"window": window, "shift": 0, "relative_bias": False, "scale": num_heads**-0.5}
        self.windows = WindowAttention(features, num_heads=num_heads, **inside, **common)
        self.scale1, self.scale2 = (LayerScale(features, init=0.0, **stored) for _ in range(2))
        self.mlp1, self.mlp2 = (MLP(features, int(features * mlp_ratio), **common) for _ in range(2))

    @property
    def points(self) -> frozenset[str]:
        return frozenset({"stream", "normed", "mixed", "middle", "mlp"})

    def __call__(self, x: ArrayLike, labels: ArrayLike, *, edits: Edits | None = None) -> jax.Array:
        """The points are those of the first half, of regions."""
        x = visit(self, edits, "stream", jnp.asarray(x, self.dtype))
        y = self.regions(visit(self, edits, "normed", self.norm1(x)), labels)
        x = visit(self, edits, "middle", x + self.scale1(visit(self, edits, "mixed", y)))
        x = x + visit(self, edits, "mlp", self.mlp1(self.norm2(x)))
        x = x + self.scale2(self.windows(self.norm3(x)))
        return x + self.mlp2(self.norm4(x))


class RegionBlock(nnx.Module):
    """Layers and a convolution, with a residual around all; arguments as `RegionLayer`, and how many layers."""

    def __init__(self, features: int, depth: int = 3, **options: Any):
        self.layers = nnx.List(RegionLayer(features, **options) for _ in range(depth))
        common = {name: options[name] for name in ("dtype", "param_dtype", "rngs") if name in options}
        self.conv = Conv(features, features, (3, 3), **common)

    def __call__(self, x: jax.Array, labels: jax.Array, *, edits: Sequence[Edits | None] | None = None) -> jax.Array:
        y = x
        for layer, here in zip(self.layers, [None] * len(self.layers) if edits is None else edits, strict=True):
            y = layer(y, labels, edits=here)
        return x + self.conv(y)


class NAFBlock(nnx.Module):
    """Images of tokens `(B, H, W, C)` to the same shape, without a nonlinearity but products.

    Args:
      features: channels C.
      expansion: channels of the convolution over C, even in all.
      mlp_expansion: hidden channels of the feed-forward over C.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        expansion: int = 2,
        mlp_expansion: int = 2,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        wide, hidden = features * expansion, features * mlp_expansion
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        self.norm1, self.norm2 = (LayerNorm(features, **stored) for _ in range(2))
        self.conv1 = Linear(features, wide, axes=("embed", "mlp"), **common)
        self.conv2 = DepthwiseConv(wide, (3, 3), axes=("mlp",), **common)
        self.attention = Linear(wide // 2, wide // 2, axes=("mlp", "mlp"), **common)
        self.conv3 = Linear(wide // 2, features, axes=("mlp", "embed"), **common)
        self.conv4 = Linear(features, hidden, axes=("embed", "mlp"), **common)
        self.conv5 = Linear(hidden // 2, features, axes=("mlp", "embed"), **common)
        self.beta, self.gamma = (LayerScale(features, init=0.0, **stored) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        g = _gate(self.conv2(self.conv1(self.norm1(x))))
        mean = g.mean((1, 2), dtype=at_least_float32(g.dtype), keepdims=True).astype(g.dtype)
        x = x + self.beta(self.conv3(g * self.attention(mean)))
        return x + self.gamma(self.conv5(_gate(self.conv4(self.norm2(x)))))


def _gate(x: jax.Array) -> jax.Array:
    a, b = jnp.split(x, 2, axis=-1)
    return a * b


@register(
    "rat_region_attention.net",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=COST,
    summary="a U-Net that restores images, with attention inside given regions at its coarsest grid",
    small={"features": 8, "middle_depth": 1, "layers": 1, "encoder_depths": (1,), "decoder_depths": (1,)}
    | {"num_heads": 4, "channels": 3},
)
class RAT(Editable):
    """Images `(B, H, W, channels)` to restored ones `(B, f·H, f·W, channels)`, in float32: the point `logits`.

    Args:
      features: channels C of the finest grid; each coarser one has twice as many.
      middle_depth: layers of attention in all, on the coarsest grid.
      layers: of them in a block.
      encoder_depths: NAF blocks of each grid on the way down.
      decoder_depths: on the way up.
      num_heads: heads H.
      window: tokens on a side of the windows.
      mlp_ratio: hidden channels of feed-forwards over channels.
      channels: of the images.
      upscale: f; the image is interpolated first.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for another number of decoders than of encoders, or numbers below 1.
    """

    inputs: ClassVar[ImagePairs] = ImagePairs()
    model_points = frozenset({"logits"})

    def __init__(
        self,
        features: int = 64,
        *,
        middle_depth: int = 12,
        layers: int = 3,
        encoder_depths: Sequence[int] = (2, 2),
        decoder_depths: Sequence[int] = (2, 2),
        num_heads: int = 8,
        window: int = 4,
        mlp_ratio: float = 2.0,
        channels: int = 1,
        upscale: int = 1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if len(encoder_depths) != len(decoder_depths):
            raise ValueError(
                f"decoder_depths must be {len(encoder_depths)}, one for each encoder, got {decoder_depths}"
            )
        if upscale < 1 or layers < 1:
            raise ValueError(f"upscale and layers must be at least 1, got {upscale} and {layers}")
        self.channels, self.upscale, self.dtype = channels, upscale, dtype
        self.multiple = window << len(encoder_depths)
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        widths = [features << stage for stage in range(len(encoder_depths) + 1)]
        self.enter = Conv(channels, features, (3, 3), axes=(None, "embed"), **common)
        self.leave = Conv(features, channels, (3, 3), axes=("embed", None), **common)
        self.encoders = nnx.List(
            Chain(*(NAFBlock(width, **common) for _ in range(depth)))
            for width, depth in zip(widths, encoder_depths, strict=False)
        )
        halves: dict[str, Any] = {"strides": 2, "padding": "VALID"}
        self.downs = nnx.List(Conv(width, 2 * width, (2, 2), **halves, **common) for width in widths[:-1])
        attention = {"num_heads": num_heads, "window": window, "mlp_ratio": mlp_ratio}
        self.middle = nnx.List(
            RegionBlock(widths[-1], layers, **attention, **common) for _ in range(middle_depth // layers)
        )
        self.ups = nnx.List(Linear(width, 2 * width, use_bias=False, **common) for width in widths[:0:-1])
        self.decoders = nnx.List(
            Chain(*(NAFBlock(width, **common) for _ in range(depth)))
            for width, depth in zip(widths[-2::-1], decoder_depths, strict=True)
        )

    def __call__(self, images: ArrayLike, labels: ArrayLike | None = None, *, deterministic: bool = True) -> jax.Array:
        """Restores images.

        Args:
          images: `(B, H, W, channels)`.
          labels: of regions, integers `(B, H', W')`, of the result's size or any other; one region when None.
          deterministic: False in training; there is nothing random.

        Raises:
          ValueError: for other shapes, or sides of the result that are no multiple of window · 2^encoders.
        """
        images = jnp.asarray(images, self.dtype)
        if images.ndim != 4 or images.shape[-1] != self.channels:
            raise ValueError(f"images must be (B, H, W, {self.channels}), got {images.shape}")
        size = tuple(self.upscale * side for side in images.shape[1:3])
        if any(side % self.multiple for side in size):
            raise ValueError(f"sides of the result must be multiples of {self.multiple}, got {size}")
        base = images.astype(at_least_float32(images.dtype))
        base = base if self.upscale == 1 else resize_bilinear(base, size)
        x, skips = self.enter(base.astype(images.dtype)), []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            skips.append(encoder(x))
            x = down(skips[-1])
        regions, y = self._regions(labels, x.shape[:3]), x
        edits, first = self.edits(), 0
        for block in self.middle:
            y = block(y, regions, edits=edits.of(first, first + len(block.layers)))
            first += len(block.layers)
        x = x + y
        for up, decoder, skip in zip(self.ups, self.decoders, skips[::-1], strict=True):
            x = decoder(pixel_shuffle(up(x), 2) + skip)
        return visit(self, edits.model, "logits", base + self.leave(x).astype(base.dtype))

    @staticmethod
    def _regions(labels: ArrayLike | None, shape: Sequence[int]) -> jax.Array:
        """Labels of the coarsest grid's tokens."""
        if labels is None:
            return jnp.zeros(shape, jnp.int32)
        labels = integers("labels", labels)
        if labels.ndim != 3 or labels.shape[0] != shape[0]:
            raise ValueError(f"labels must be ({shape[0]}, H, W), got {labels.shape}")
        return resize_nearest(labels[..., None], tuple(shape[1:]))[..., 0]


RATS: Models = {"rat": (RAT, {})}
"""For `staged.build_named`: it has the 15.9 M parameters of the authors' class; what their paper counts could not be
read."""
