"""Activations as functions of this package: JAX's own are compiled objects, which cannot be pickled with a module."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.dtypes import at_least_float32

Activation = Callable[[jax.Array], jax.Array]


def gelu(x: ArrayLike) -> jax.Array:
    """x·Φ(x) by the error function, in float32 (or wider), not its tanh approximation.

    `jax.nn.gelu(x, approximate=False)` takes erfc, exact in the far tail too, and on a CPU three times as long.
    """
    x = jnp.asarray(x)
    wide = x.astype(at_least_float32(x.dtype))
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def gelu_tanh(x: ArrayLike) -> jax.Array:
    """The approximation of `gelu` by a tanh."""
    return jax.nn.gelu(x, approximate=True)


def relu(x: ArrayLike) -> jax.Array:
    """max(x, 0)."""
    return jax.nn.relu(x)


def relu6(x: ArrayLike) -> jax.Array:
    """min(max(x, 0), 6)."""
    return jnp.clip(x, 0, 6)


def leaky_relu(x: ArrayLike, slope: float = 0.01) -> jax.Array:
    """x, or `slope` x where it is negative."""
    return jax.nn.leaky_relu(x, slope)


def silu(x: ArrayLike) -> jax.Array:
    """x·σ(x), also called swish."""
    return jax.nn.silu(x)


def sigmoid(x: ArrayLike) -> jax.Array:
    """σ(x) = 1 / (1 + exp(-x))."""
    return jax.nn.sigmoid(x)


def hard_sigmoid(x: ArrayLike) -> jax.Array:
    """min(max(x + 3, 0), 6) / 6."""
    return jax.nn.hard_sigmoid(x)


def tanh(x: ArrayLike) -> jax.Array:
    """The hyperbolic tangent."""
    return jnp.tanh(x)
