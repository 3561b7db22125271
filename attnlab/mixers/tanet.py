"""Triplet attention of TANet (Wang et al., ACCV 2024): pixels, strips and distributions of a map; f is leaky ReLU, 0.2.

    pixels(x)         a = σ(conv_7x7([max_C x, mean_C x])), the same for all channels: the map itself
    strips(x)         x ⊙ σ(W relu(W (conv(mean over columns) + conv(mean over rows))))
    distribution(x)   f(conv(f([norm(h_1) | h_2]))) + x,  h = conv(x); the norm is over each channel's map

The whole, with D = C/2 channels in each branch:

    u = f(W f(conv(x)));    v = f(conv(f(W [strips(f(conv(u))) | pixels(f(conv(u))) | f(W u)]))) + x
    y = distribution(v) + v + W x

The paper speaks of attention by pixels; in the authors' code their map is a third of v's input and multiplies nothing.
`distribution` adds its input, and the whole adds it again. Widths are options here and constants there. Code:
xhuachris/TANet-ACCV-2024. Cost O(N·C²).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, TokenMixer, record
from attnlab.nn.activations import leaky_relu, relu, sigmoid
from attnlab.nn.linear import Conv, Linear
from attnlab.nn.norms import GroupNorm
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper(
    "TANet: Triplet Attention Network for All-In-One Adverse Weather Image Restoration",
    "Wang et al.",
    2024,
    number=140,
)
REPOSITORY = "xhuachris/TANet-ACCV-2024"
COST = Cost(time="O(N·C²)", memory="O(N·C)")


def leaky(x: jax.Array) -> jax.Array:
    """f: x, or 0.2 x where it is negative."""
    return leaky_relu(x, 0.2)


def _gate(x: jax.Array) -> jax.Array:
    return sigmoid(x.astype(at_least_float32(x.dtype)))


def _pixels_example() -> Example:
    x = np.random.default_rng(0).standard_normal((2, 5, 6, 8)).astype(np.float32)
    return Example(LocalPixelMap(3, rngs=nnx.Rngs(0)), (x,))


@register(
    "tanet.pixels",
    kind=Kind.MODULE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=Cost(time="O(N·(C+k²))", memory="O(N)"),
    summary="a map of the image from the greatest and the mean channel, which multiplies nothing",
    small=_pixels_example,
)
class LocalPixelMap(nnx.Module):
    """Images `(B, H, W, C)` to the map a `(B, H, W, C)`, alike in all channels; see the module docstring.

    Args:
      kernel_size: pixels on a side of the kernel, odd.
      dtype: of the computation and the result; that of the image when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for an even side.
    """

    def __init__(self, kernel_size: int = 7, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.dtype = dtype
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv = Conv(2, 1, (kernel_size, kernel_size), axes=(None, None), **common)

    def __call__(self, x: ArrayLike) -> jax.Array:
        x = jnp.asarray(x, self.dtype)
        mean = x.mean(-1, dtype=at_least_float32(x.dtype), keepdims=True).astype(x.dtype)
        scores = self.conv(jnp.concatenate([x.max(-1, keepdims=True), mean], -1))
        return jnp.broadcast_to(_gate(scores).astype(x.dtype), x.shape)


class _ImageMixer(TokenMixer):
    """A mixer of images that is made of convolutions."""

    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE


def _example(module: TokenMixer) -> Example:
    return Example(module, (np.random.default_rng(0).standard_normal((2, 4, 5, 8)).astype(np.float32),))


@register(
    "tanet.strips",
    kind=Kind.MODULE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=COST,
    summary="channels gated by the means of the rows and of the columns that a token stands in",
    small=lambda: _example(StripGate(8, rngs=nnx.Rngs(0))),
)
class StripGate(_ImageMixer):
    """Images gated by their strips, to the same shape; see the module docstring.

    Args:
      features: channels C, at least 2.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for one channel.
    """

    def __init__(self, features: int, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        if features < 2:
            raise ValueError(f"features must be at least 2, got {features}")
        self.features, self.dtype = features, dtype
        common, middle = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}, features // 2
        self.rows = Conv(features, middle, (3, 1), axes=("embed", "mlp"), **common)
        self.columns = Conv(features, middle, (1, 3), axes=("embed", "mlp"), **common)
        self.fuse = Linear(middle, middle, axes=("mlp", None), **common)
        self.out = Linear(middle, features, axes=(None, "embed"), **common)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        wide = at_least_float32(x.dtype)
        rows = self.rows(x.mean(2, dtype=wide, keepdims=True).astype(x.dtype))
        columns = self.columns(x.mean(1, dtype=wide, keepdims=True).astype(x.dtype))
        gate = _gate(self.out(relu(self.fuse(rows + columns))))
        record(self, "gate", lambda: gate)
        return x * gate.astype(x.dtype)


@register(
    "tanet.distribution",
    kind=Kind.MODULE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=COST,
    summary="two convolutions with half of the channels normed over the image between them, and a residual",
    small=lambda: _example(HalfInstanceNormBlock(8, rngs=nnx.Rngs(0))),
)
class HalfInstanceNormBlock(_ImageMixer):
    """Images to the same shape, their input added; see the module docstring.

    Args:
      features: channels C, an even number.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for an odd number of channels.
    """

    def __init__(self, features: int, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        if features % 2:
            raise ValueError(f"features must be even, half of them are normed, got {features}")
        self.features, self.dtype = features, dtype
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv1, self.conv2 = (Conv(features, features, (3, 3), **common) for _ in range(2))
        self.norm = GroupNorm(features // 2, None, param_dtype=param_dtype, rngs=rngs)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        normed, other = jnp.split(self.conv1(x), 2, axis=-1)
        h = leaky(jnp.concatenate([self.norm(normed), other], -1))
        return leaky(self.conv2(h)) + x


@register(
    "tanet",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=COST,
    summary="gates by strips beside a map of pixels, then a norm of half of the channels, all with residuals",
    small={"kernel_size": 3},
)
class TripletAttention(_ImageMixer):
    """Images to the same shape, their input added; see the module docstring.

    Args:
      features: channels C, an even number.
      branch_features: channels D of each branch; C/2 when None.
      kernel_size: pixels on a side of the pixel map's kernel, odd.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for an odd number of channels, or an even kernel.
    """

    def __init__(
        self,
        features: int,
        *,
        branch_features: int | None = None,
        kernel_size: int = 7,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        branch = features // 2 if branch_features is None else branch_features
        self.features, self.dtype = features, dtype
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        sides = (3, 3)
        self.enter = Conv(features, features, sides, **common)
        self.mix_in = Linear(features, features, **common)
        self.to_strips, self.to_pixels = (Conv(features, branch, sides, **common) for _ in range(2))
        self.to_rest = Linear(features, branch, **common)
        self.strips = StripGate(branch, **common)
        self.pixels = LocalPixelMap(kernel_size, **common)
        self.mix_out = Linear(3 * branch, features, **common)
        self.leave = Conv(features, features, sides, **common)
        self.distribution = HalfInstanceNormBlock(features, **common)
        self.shortcut = Linear(features, features, **common)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        u = leaky(self.mix_in(leaky(self.enter(x))))
        strips, pixels = self.strips(leaky(self.to_strips(u))), self.pixels(leaky(self.to_pixels(u)))
        v = jnp.concatenate([strips, pixels, leaky(self.to_rest(u))], -1)
        v = leaky(self.leave(leaky(self.mix_out(v)))) + x
        return self.distribution(v) + v + self.shortcut(x)
