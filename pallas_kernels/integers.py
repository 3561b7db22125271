"""Integers that a caller gives: ids, positions and lengths, of which no bit is lost on the way into an array.

JAX narrows 64-bit integers to 32 bits unless it is told otherwise, and says nothing: two hashes become one id.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def integers(name: str, values: ArrayLike) -> jax.Array:
    """The values as an array of integers.

    Args:
      name: of the argument, for messages.
      values: integers of any shape.

    Raises:
      TypeError: if they are no integers.
      ValueError: if one of them does not fit the integers that JAX is set to (32 bits, unless `jax_enable_x64`).
    """
    given, dtype = _whole(name, values)
    if isinstance(given, np.ndarray) and not _fits(given, dtype):
        raise ValueError(f"{name} must fit {dtype.name}, got values from {given.min()} to {given.max()}")
    return jnp.asarray(given)


def segments(*ids: ArrayLike) -> tuple[jax.Array, ...]:
    """Ids of segments, each array's the same where they were the same; numbered anew where they do not fit.

    Raises:
      TypeError: if they are no integers.
    """
    given = [_whole("segment_ids", each) for each in ids]
    if all(not isinstance(each, np.ndarray) or _fits(each, dtype) for each, dtype in given):
        return tuple(jnp.asarray(each) for each, _ in given)
    arrays = [np.asarray(each) for each, _ in given]
    # Objects: one array may be signed and another unsigned, which have no common integer type.
    _, numbers = np.unique(np.concatenate([each.ravel().astype(object) for each in arrays]), return_inverse=True)
    parts = np.split(numbers.astype(np.int32), np.cumsum([each.size for each in arrays])[:-1])
    return tuple(jnp.asarray(part.reshape(each.shape)) for part, each in zip(parts, arrays, strict=True))


def runs(ids: jax.Array) -> jax.Array:
    """The number of each token's run of equal ids, from 0, (B, N) int32."""
    starts = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32)


def _whole(name: str, values: Any) -> tuple[jax.Array | np.ndarray, np.dtype]:
    """Integers as given, and the type that JAX has for them."""
    given = values if isinstance(values, jax.Array) else np.asarray(values)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {given.dtype.name}")
    return given, np.dtype(jax.dtypes.canonicalize_dtype(given.dtype))


def _fits(values: np.ndarray, dtype: np.dtype) -> bool:
    limits = np.iinfo(dtype)
    return values.size == 0 or (int(values.min()) >= limits.min and int(values.max()) <= limits.max)
