"""Convolutions as the parts of backbones: with a norm, of patches, and the merging of tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.chain import call
from attnlab.nn.grids import lengths, pad_to_multiple
from attnlab.nn.linear import Conv, Linear
from attnlab.nn.norms import LayerNorm

Norm = Callable[..., nnx.Module]
"""Builds a norm: `norm(features, param_dtype=…, rngs=…)`, a class such as `BatchNorm` or one with its options bound."""


class ConvNorm(nnx.Module):
    """A convolution with a norm and an activation: stems, and the downsampling between stages.

        y = activation(norm(conv(x)));    y = activation(conv(norm(x)))  with `norm_first`

    Args:
      in_features: channels in.
      features: channels out.
      kernel_size: sides of the kernel, one number for a square.
      stride: of the convolution.
      padding: as `Conv`; half the kernel on each side when None.
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
        filled: bool = False,
        norm: Norm | None = LayerNorm,
        norm_first: bool = False,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        use_bias: bool = True,
        axes: Sequence[str | None] = ("embed", "embed"),
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kernel_size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.norm_first, self.activation = norm_first, activation
        self.fill = lengths(stride, len(kernel_size), "stride") if filled else None
        self.conv = Conv(
            in_features,
            features,
            kernel_size,
            strides=stride,
            padding=padding,
            use_bias=use_bias,
            axes=axes,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
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
        self.patch_size = lengths(patch_size, 2 if isinstance(patch_size, int) else len(patch_size), "patch_size")
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
