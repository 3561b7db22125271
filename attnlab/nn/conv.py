"""Convolutions as the parts of backbones: with a norm, in a row as a stem, of patches, and the merging of tokens."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.activations import Activation, gelu, relu, sigmoid
from attnlab.nn.chain import Chain, call
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.grids import lengths, pad_to_multiple
from attnlab.nn.linear import Conv, Linear
from attnlab.nn.norms import BatchNorm, LayerNorm
from attnlab.nn.resampling import max_pool
from pallas_kernels.dtypes import at_least_float32

Norm = Callable[..., nnx.Module]
"""Builds a norm: `norm(features, param_dtype=…, rngs=…)`, a class such as `BatchNorm` or one with its options bound."""


def _each(value: int | Sequence[int]) -> Sequence[int]:
    return (value,) if isinstance(value, int | np.integer) else value


def divisible(channels: float, by: int = 8) -> int:
    """The nearest multiple, at least `by` and nine tenths of the channels: for widths that follow from others."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded


class ConvNorm(nnx.Module):
    """A convolution with a norm and an activation: stems, and the downsampling between stages.

        y = activation(norm(conv(x)));    y = activation(conv(norm(x)))  with `norm_first`

    At inference a `BatchNorm` behind the convolution is a part of it: `fold` makes one of both.

    Args:
      in_features: channels in.
      features: channels out.
      kernel_size: sides of the kernel, one number for a square.
      stride: of the convolution.
      padding: as `Conv`; half the kernel on each side when None.
      dilation: steps between the taps of the kernel.
      groups: of channels that do not see each other; `in_features`, where that is `features`, for a kernel per channel.
      filled: whether zeros at the end of each axis make it a multiple of the stride first.
      norm: builds the norm; none when None.
      norm_first: whether the norm stands in front of the convolution.
      activation: of the result; none when None.
      use_bias: whether the convolution has a bias.
      axes: logical names of the last two axes of the kernel.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        padding: Any = None,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        filled: bool = False,
        norm: Norm | None = LayerNorm,
        norm_first: bool = False,
        activation: Activation | None = None,
        use_bias: bool = True,
        axes: Sequence[str | None] = ("embed", "embed"),
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kernel_size = (kernel_size, kernel_size) if isinstance(kernel_size, int | np.integer) else tuple(kernel_size)
        self.norm_first, self.activation = norm_first, activation
        self.fill = lengths(stride, len(kernel_size), "stride") if filled else None
        common = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        single = padding is None and all(n == 1 for n in (*_each(stride), *_each(dilation)))
        if groups == in_features == features and single and all(side % 2 for side in kernel_size):
            self.conv = DepthwiseConv(features, kernel_size, axes=axes[-1:], **common)
        else:
            if padding is None:
                steps = lengths(dilation, len(kernel_size), "dilation")
                padding = [(d * (k // 2),) * 2 for k, d in zip(kernel_size, steps, strict=True)]
            self.conv = Conv(
                in_features,
                features,
                kernel_size,
                strides=stride,
                padding=padding,
                kernel_dilation=dilation,
                feature_group_count=groups,
                axes=axes,
                **common,
            )
        self.norm = nnx.data(None)
        if norm is not None:
            self.norm = norm(in_features if norm_first else features, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """`(B, *S, in_features)` to `(B, *S', features)`."""
        x = jnp.asarray(x)
        if self.norm is not None and self.norm_first:
            x = call(self.norm, x, deterministic)
        x = self.conv(x if self.fill is None else pad_to_multiple(x, self.fill)[0])
        if self.norm is not None and not self.norm_first:
            x = call(self.norm, x, deterministic)
        return x if self.activation is None else self.activation(x)

    def fold(self) -> None:
        """Makes a `BatchNorm` behind the convolution part of its kernel and bias, as it is at inference.

        Another norm, and one in front, whose shift the zeros around a map do not have, stays where it is.
        """
        if not isinstance(self.norm, BatchNorm) or self.norm_first:
            return
        norm, conv = self.norm, self.conv
        wide = at_least_float32(conv.kernel[...].dtype)
        factor = jax.lax.rsqrt(norm.var[...].astype(wide) + norm.epsilon)
        factor = factor if norm.scale is None else factor * norm.scale[...].astype(wide)
        bias = -norm.mean[...].astype(wide) * factor
        bias = bias if conv.bias is None else bias + conv.bias[...].astype(wide) * factor
        bias = bias if norm.bias is None else bias + norm.bias[...].astype(wide)
        kernel, names = conv.kernel, conv.kernel.get_metadata().get("logical_axes", (None,))
        conv.bias = nnx.Param(bias.astype(kernel[...].dtype), logical_axes=tuple(names[-1:]))
        if isinstance(conv, Conv):
            conv.use_bias = True
        kernel[...] = (kernel[...].astype(wide) * factor).astype(kernel[...].dtype)
        self.norm = nnx.data(None)


def folded(model: nnx.Module) -> nnx.Module:
    """A copy of a model for inference, each `BatchNorm` that stands behind a convolution made part of it."""
    model = nnx.clone(model)
    for _, part in nnx.iter_modules(model):
        if isinstance(part, ConvNorm):
            part.fold()
    return model


def redraw_convolutions(module: nnx.Module, init: nnx.Initializer | None = None, *, rngs: nnx.Rngs) -> None:
    """Draws the kernels of all convolutions in a module anew, and clears their biases.

    For models whose authors initialise them otherwise than `Conv` does: by `init`, or when None by a normal of variance
    2 / fan-out, as PVTv2 and what follows it.
    """
    for _, part in nnx.iter_modules(module):
        if not isinstance(part, Conv | DepthwiseConv):
            continue
        shape = part.kernel.shape
        taps = math.prod(part.kernel_size)
        outputs = taps if isinstance(part, DepthwiseConv) else taps * shape[-1] // part.feature_group_count
        draw = nnx.initializers.normal((2 / outputs) ** 0.5) if init is None else init
        part.kernel[...] = draw(rngs.params(), shape, part.kernel.dtype)
        if part.bias is not None:
            part.bias[...] = jnp.zeros_like(part.bias[...])


class ConvStem(Chain):
    """Convolutions one after another, each with a norm and but the last with an activation: images to tokens.

    What may differ between them is one value for all, or a sequence with one for each.

    Args:
      channels: of the images.
      widths: channels that each convolution makes.
      strides: of each.
      kernel_size: side of their kernels; padding is half of it.
      norm: builds the norm behind; none when None.
      activation: behind the norm, of all but the last.
      last_activation: of the last; none when None.
      use_bias: whether the convolution has a bias.
      filled: whether zeros at the end of each axis make it a multiple of all strides together first.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for a sequence without one entry for each convolution.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        *,
        strides: Sequence[int],
        kernel_size: int | Sequence[int] = 3,
        norm: Norm | Sequence[Norm | None] | None = BatchNorm,
        activation: Activation | None = gelu,
        last_activation: Activation | None = None,
        use_bias: bool | Sequence[bool] = True,
        filled: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        count, units = len(widths), []
        each = {"stride": strides, "kernel_size": kernel_size, "norm": norm, "use_bias": use_bias}
        options: dict[str, list[Any]] = {
            name: [*value] if isinstance(value, Sequence) else [value] * count for name, value in each.items()
        }
        for name, values in options.items():
            if len(values) != count or not count:
                raise ValueError(f"{name} must have one entry for each of {count} convolutions, got {len(values)}")
        options["activation"] = [activation] * (count - 1) + [last_activation]
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        for index, (before, width) in enumerate(zip((channels, *widths), widths, strict=False)):
            here = {name: values[index] for name, values in options.items()}
            units.append(ConvNorm(before, width, **here, **common))
        super().__init__(*units)
        self.multiple = math.prod(strides) if filled else 1

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """`(B, H, W, channels)` to `(B, H', W', C)`."""
        return super().__call__(pad_to_multiple(x, self.multiple)[0], deterministic=deterministic)


class MaxPool(nnx.Module):
    """Maxima of 3 x 3 tokens, at stride 2."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(B, H, W, C)` to `(B, ⌈H/2⌉, ⌈W/2⌉, C)`."""
        return max_pool(x, 3, stride=2, padding=1)


class PatchEmbed(ConvNorm):
    """Cuts `(B, *S, channels)` into patches side by side and maps each linearly to `features` channels.

    Args:
      channels: of the images or videos, or of the tokens of an earlier stage.
      features: channels C of the tokens.
      patch_size: sides of a patch, one int for a square one; two sides for images, three for videos.
      norm: builds a norm of the tokens; none when None.
      **options: further arguments of `ConvNorm`.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        patch_size: int | Sequence[int] = 16,
        *,
        norm: Norm | None = None,
        **options: Any,
    ):
        self.patch_size = lengths(
            patch_size, 2 if isinstance(patch_size, int | np.integer) else len(patch_size), "patch_size"
        )
        place = {"stride": self.patch_size, "padding": "VALID", "axes": (None, "embed")}
        super().__init__(channels, features, self.patch_size, norm=norm, **place, **options)

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """`(B, *S, channels)` to `(B, *S/patch, C)`.

        Raises:
          ValueError: if the patch does not divide the images.
        """
        shape, sides = jnp.shape(x), self.patch_size
        if len(shape) != len(sides) + 2 or any(n % p for n, p in zip(shape[1:-1], sides, strict=True)):
            raise ValueError(f"images must be (B, *S, channels) with S multiples of {sides}, got {shape}")
        return super().__call__(x, deterministic=deterministic)


class PatchMerging(nnx.Module):
    """`(B, H, W, C)` to `(B, H/2, W/2, 2 C)`: 2x2 tokens side by side, column by column, normed and mapped.

    From the Swin Transformer (Liu et al., ICCV 2021, arXiv:2103.14030).

    Args:
      features: channels C.
      norm: builds the norm of the 4 C channels.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        *,
        norm: Norm = LayerNorm,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = {"param_dtype": param_dtype, "rngs": rngs}
        self.norm = norm(4 * features, **common)
        self.reduction = Linear(4 * features, 2 * features, use_bias=False, dtype=dtype, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Raises `ValueError` if the image has an odd side."""
        batch, rows, columns, channels = x.shape
        if rows % 2 or columns % 2:
            raise ValueError(f"patch merging needs even sides, got an image of shape {x.shape}")
        x = x.reshape(batch, rows // 2, 2, columns // 2, 2, channels)
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, rows // 2, columns // 2, 4 * channels)
        return self.reduction(self.norm(x))


class SqueezeExcite(nnx.Module):
    """x · gate(fc2(activation(fc1(mean(x))))), the mean over the grid (Hu et al., 2018, arXiv:1709.01507).

    Args:
      features: channels C.
      hidden_features: of the mean's feed-forward.
      activation: between its maps.
      gate: of its result.
      use_bias: whether its maps have a bias.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        activation: Callable[[jax.Array], jax.Array] = relu,
        gate: Callable[[jax.Array], jax.Array] = sigmoid,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"use_bias": use_bias, "param_dtype": param_dtype, "rngs": rngs}
        self.activation, self.gate, self.dtype = activation, gate, dtype
        self.fc1 = Linear(features, hidden_features, axes=("embed", "mlp"), **options)
        self.fc2 = Linear(hidden_features, features, axes=("mlp", "embed"), **options)

    def __call__(self, x: ArrayLike) -> jax.Array:
        """`(B, *S, C)` to the same shape; mean and gate are float32 (or wider)."""
        x = jnp.asarray(x, self.dtype)
        wide = x.astype(at_least_float32(x.dtype))
        weight = self.gate(self.fc2(self.activation(self.fc1(wide.mean(tuple(range(1, x.ndim - 1)), keepdims=True)))))
        return (wide * weight).astype(x.dtype)
