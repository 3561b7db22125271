"""Rotary positions by tables of cosines and sines, as the `transformers` library hands them to its layers."""

import jax
import jax.numpy as jnp


def turned_by_tables(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Heads `(B, N, H, D)`, whose halves turn by tables `(1|B, N, D)`."""
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos[:, :, None] + jnp.concatenate([-second, first], axis=-1) * sin[:, :, None]
