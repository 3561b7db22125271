"""Normalisations: computed in float32 (or wider), returned in the dtype of the input."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from pallas_kernels.dtypes import at_least_float32


def _wide(x: ArrayLike) -> jax.Array:
    return jnp.asarray(x, at_least_float32(jnp.result_type(x)))


def layer_norm(
    x: ArrayLike, scale: ArrayLike | None = None, bias: ArrayLike | None = None, *, eps: float = 1e-6, axes: int = 1
) -> jax.Array:
    """(x - mean) / √(variance + eps) · scale + bias over the last axis, or over the last `axes` of them together."""
    wide, last = _wide(x), tuple(range(-axes, 0))
    centred = wide - wide.mean(last, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.square(centred).mean(last, keepdims=True) + eps)
    y = y if scale is None else y * _wide(scale)
    y = y if bias is None else y + _wide(bias)
    return y.astype(jnp.result_type(x))


def rms_norm(x: ArrayLike, scale: ArrayLike | None = None, *, eps: float = 1e-6, axes: int = 1) -> jax.Array:
    """x / √(mean(x²) + eps) · scale over the last axis, or over the last `axes` of them together.

    Without `scale` it is the SRMSNorm of TransNormerLLM.
    """
    wide = _wide(x)
    y = wide * jax.lax.rsqrt(jnp.square(wide).mean(tuple(range(-axes, 0)), keepdims=True) + eps)
    return (y if scale is None else y * _wide(scale)).astype(jnp.result_type(x))


def unit_norm(x: ArrayLike) -> jax.Array:
    """x / |x| over the last axis; a vector of zeros stays one, with a gradient that is finite."""
    wide = _wide(x)
    # max inside the root: at zero the length itself has no gradient.
    y = wide * jax.lax.rsqrt(jnp.maximum(jnp.square(wide).sum(-1, keepdims=True), 1e-24))
    return y.astype(jnp.result_type(x))


class LayerNorm(nnx.Module):
    """`layer_norm` with learned `scale` and `bias` unless switched off.

    Over the last axis of C channels; or, with `features=(H, E)`, over the channels of all heads together.
    """

    def __init__(
        self,
        features: int | tuple[int, int],
        *,
        eps: float = 1e-6,
        use_scale: bool = True,
        use_bias: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape, names = _parameter(features)
        self.eps, self.axes = eps, len(shape)
        self.scale = nnx.Param(jnp.ones(shape, param_dtype), logical_axes=names) if use_scale else nnx.data(None)
        self.bias = nnx.Param(jnp.zeros(shape, param_dtype), logical_axes=names) if use_bias else nnx.data(None)

    def __call__(self, x: ArrayLike) -> jax.Array:
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        return layer_norm(x, scale, bias, eps=self.eps, axes=self.axes)


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned `scale` unless switched off; `features` as `LayerNorm`."""

    def __init__(
        self,
        features: int | tuple[int, int],
        *,
        eps: float = 1e-6,
        use_scale: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape, names = _parameter(features)
        self.eps, self.axes = eps, len(shape)
        self.scale = nnx.Param(jnp.ones(shape, param_dtype), logical_axes=names) if use_scale else nnx.data(None)

    def __call__(self, x: ArrayLike) -> jax.Array:
        return rms_norm(x, None if self.scale is None else self.scale[...], eps=self.eps, axes=self.axes)


def _parameter(features: int | tuple[int, int]) -> tuple[tuple[int, ...], tuple[str | None, ...]]:
    """Shape and logical axes of what a norm learns."""
    return ((features,), ("embed",)) if isinstance(features, int | np.integer) else (tuple(features), ("heads", None))


def group_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    groups: int = 1,
    eps: float = 1e-5,
) -> jax.Array:
    """(x - mean) / √(variance + eps) · scale + bias over the grid and a group of channels (arXiv:1803.08494).

    One group is a layer norm over a whole image; as many as there are channels, an instance norm.

    Args:
      x: `(B, *S, C)`; statistics are over S and C / groups channels side by side.
      scale: `(C,)`, or None.
      bias: `(C,)`, or None.
      groups: of channels.
      eps: added to the variance.

    Raises:
      ValueError: if the groups do not divide the channels.
    """
    wide = _wide(x)
    if groups < 1 or wide.shape[-1] % groups:
        raise ValueError(f"groups must divide the {wide.shape[-1]} channels, got {groups}")
    split = wide.reshape(*wide.shape[:-1], groups, -1)
    over = (*range(1, wide.ndim - 1), wide.ndim)
    centred = split - split.mean(over, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.square(centred).mean(over, keepdims=True) + eps)
    y = y.reshape(wide.shape)
    y = y if scale is None else y * _wide(scale)
    y = y if bias is None else y + _wide(bias)
    return y.astype(jnp.result_type(x))


class GroupNorm(nnx.Module):
    """`group_norm` with learned `scale` and `bias` unless switched off; as many groups as channels when None."""

    def __init__(
        self,
        features: int,
        groups: int | None = 1,
        *,
        eps: float = 1e-5,
        use_scale: bool = True,
        use_bias: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.groups, self.eps = features if groups is None else groups, eps
        if self.groups < 1 or features % self.groups:
            raise ValueError(f"groups must divide the {features} channels, got {groups}")
        shape, names = _parameter(features)
        self.scale = nnx.Param(jnp.ones(shape, param_dtype), logical_axes=names) if use_scale else nnx.data(None)
        self.bias = nnx.Param(jnp.zeros(shape, param_dtype), logical_axes=names) if use_bias else nnx.data(None)

    def __call__(self, x: ArrayLike) -> jax.Array:
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        return group_norm(x, scale, bias, groups=self.groups, eps=self.eps)


def response_norm(x: ArrayLike, scale: ArrayLike, bias: ArrayLike | None = None, *, eps: float = 1e-6) -> jax.Array:
    """x (1 + scale · |x| / (mean of |x| over channels + eps)) + bias (ConvNeXt V2, arXiv:2301.00808).

    Args:
      x: `(B, *S, C)`; |x| is the length of each channel over S.
      scale: `(C,)`.
      bias: `(C,)`, or None.
      eps: added to the mean.
    """
    wide = _wide(x)
    # max inside the root: at zero the length itself has no gradient.
    squares = jnp.square(wide).sum(tuple(range(1, wide.ndim - 1)), keepdims=True)
    length = jnp.sqrt(jnp.maximum(squares, 1e-24))
    y = wide * (1 + _wide(scale) * length / (length.mean(-1, keepdims=True) + eps))
    y = y if bias is None else y + _wide(bias)
    return y.astype(jnp.result_type(x))


class ResponseNorm(nnx.Module):
    """`response_norm` with learned `scale` and `bias`, both 0 at the start, where it changes nothing."""

    def __init__(self, features: int, *, eps: float = 1e-6, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.eps = eps
        self.scale, self.bias = (
            nnx.Param(jnp.zeros((features,), param_dtype), logical_axes=("embed",)) for _ in range(2)
        )

    def __call__(self, x: ArrayLike) -> jax.Array:
        return response_norm(x, self.scale[...], self.bias[...], eps=self.eps)


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation over all axes but the last, statistics in float32, result in the dtype of the input.

    `deterministic=True` uses the running statistics; otherwise the batch's, and the running ones are updated with
    `momentum` (weight of the old value; 0.9 where PyTorch says 0.1). As there the variance that is kept is unbiased,
    that of n entries n / (n - 1) times what the batch is divided by.
    """

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.9,
        use_affine: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            features,
            epsilon=eps,
            momentum=momentum,
            use_scale=use_affine,
            use_bias=use_affine,
            use_fast_variance=False,
            dtype=at_least_float32(param_dtype),
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: ArrayLike, *, deterministic: bool = True, mask: ArrayLike | None = None) -> jax.Array:
        """Normalises; entries where `mask`, of the shape of `x` without channels, is False are in no statistic."""
        x = jnp.asarray(x)
        where = None if mask is None else jnp.asarray(mask)[..., None]
        before = self.var[...]
        y = super().__call__(x, use_running_average=deterministic, mask=where).astype(x.dtype)
        if not deterministic:
            entries = x.size // x.shape[-1] if mask is None else jnp.sum(jnp.asarray(mask))
            after = self.var[...]
            self.var[...] = after + (after - self.momentum * before) / jnp.maximum(entries - 1, 1)
        return y

    def keep(self, mean: jax.Array, var: jax.Array, entries: int) -> None:
        """Updates the running statistics by those of a batch that was normalised elsewhere, its variance biased."""
        m, unbiased = self.momentum, var * (entries / max(entries - 1, 1))
        for held, new in ((self.mean, mean), (self.var, unbiased)):
            held[...] = (m * held[...] + (1 - m) * jax.lax.stop_gradient(new)).astype(held[...].dtype)
