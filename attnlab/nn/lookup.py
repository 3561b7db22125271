"""Rows of a table by their numbers: never another row than was asked for."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pallas_kernels.integers import integers


def table_rows(table: jax.Array, index: ArrayLike, name: str) -> jax.Array:
    """`table[index]`, where JAX would take the last row for numbers beyond it, and count negative ones from the end.

    Args:
      table: `(R, ...)`, floating.
      index: integers of any shape, each in 0..R-1.
      name: what the index is, for messages.

    Returns:
      `(*index.shape, ...)`; NaN where a traced index is out of range, since nothing can be raised there.

    Raises:
      TypeError: if the index is no integers.
      ValueError: if one is out of range, where its value is known.
    """
    count, array = table.shape[0], integers(name, index)
    if not isinstance(index, jax.core.Tracer):
        values = np.asarray(index)
        if values.size and (values.min() < 0 or values.max() >= count):
            raise ValueError(f"{name} must be in 0..{count - 1}, got {values.min()} to {values.max()}")
    return table.at[array].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
