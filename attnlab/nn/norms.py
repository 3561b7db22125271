"""Normalisations: computed in float32 (or wider), returned in the dtype of the input."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike


def _wide(x: ArrayLike) -> jax.Array:
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def layer_norm(
    x: ArrayLike, scale: ArrayLike | None = None, bias: ArrayLike | None = None, *, eps: float = 1e-6
) -> jax.Array:
    """(x - mean) / √(variance + eps) · scale + bias over the last axis."""
    wide = _wide(x)
    centred = wide - wide.mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    y = y if scale is None else y * _wide(scale)
    y = y if bias is None else y + _wide(bias)
    return y.astype(jnp.result_type(x))


def rms_norm(x: ArrayLike, scale: ArrayLike | None = None, *, eps: float = 1e-6) -> jax.Array:
    """x / √(mean(x²) + eps) · scale over the last axis; without `scale`, the SRMSNorm of TransNormerLLM."""
    wide = _wide(x)
    y = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    return (y if scale is None else y * _wide(scale)).astype(jnp.result_type(x))


class LayerNorm(nnx.Module):
    """`layer_norm` over the last axis, with learned `scale` and `bias` unless switched off."""

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-6,
        use_scale: bool = True,
        use_bias: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.eps = eps
        axes = ("embed",)
        self.scale = nnx.Param(jnp.ones((features,), param_dtype), logical_axes=axes) if use_scale else nnx.data(None)
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype), logical_axes=axes) if use_bias else nnx.data(None)

    def __call__(self, x: ArrayLike) -> jax.Array:
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        return layer_norm(x, scale, bias, eps=self.eps)


class RMSNorm(nnx.Module):
    """`rms_norm` over the last axis, with a learned `scale` unless switched off."""

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-6,
        use_scale: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.eps = eps
        ones = jnp.ones((features,), param_dtype)
        self.scale = nnx.Param(ones, logical_axes=("embed",)) if use_scale else nnx.data(None)

    def __call__(self, x: ArrayLike) -> jax.Array:
        return rms_norm(x, None if self.scale is None else self.scale[...], eps=self.eps)


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation over all axes but the last, statistics in float32, result in the dtype of the input.

    `deterministic=True` uses the running statistics; otherwise the batch's, and the running ones are updated with
    `momentum` (weight of the old value; 0.9 where PyTorch says 0.1).
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
            dtype=jnp.promote_types(param_dtype, jnp.float32),
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: ArrayLike, *, deterministic: bool = True, mask: ArrayLike | None = None) -> jax.Array:
        """Normalises; entries where `mask`, of the shape of `x` without channels, is False are in no statistic."""
        where = None if mask is None else jnp.asarray(mask)[..., None]
        return super().__call__(x, use_running_average=deterministic, mask=where).astype(jnp.result_type(x))
