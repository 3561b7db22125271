"""Dtypes of sums, the same whatever JAX is told of promotion (`jax_numpy_dtype_promotion`)."""

from typing import Any

import jax.numpy as jnp


def at_least_float32(dtype: Any) -> jnp.dtype:
    """float32, or the dtype itself where it is float64 or complex: in which arrays of it are summed and normalised."""
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float64 or jnp.issubdtype(dtype, jnp.complexfloating):
        return dtype
    return jnp.dtype(jnp.float32)
