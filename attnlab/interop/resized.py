"""The authors' tables of one image size, brought to those of another as fine-tuning scripts do.

The scripts of DeiT and Swin, and after them of Agent Attention (LeapLabTHU/Agent-Attention, `utils.py`), interpolate
what depends on the size of the image or window before they load it: relative position tables, position embeddings
(class tokens stay as they are) and kernels of patches by bicubic interpolation, agent biases of rows and columns
linearly along their one axis. None of them antialiases.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.nn.resampling import resize_bicubic, resize_bilinear

_ROWS_OR_COLUMNS = ("ah_bias", "aw_bias", "ha_bias", "wa_bias")


def resized_to(wanted: Mapping[str, ArrayLike], arrays: Mapping[str, ArrayLike]) -> dict[str, ArrayLike]:
    """The arrays, those of other shapes than wanted resized where it is known how.

    Args:
      wanted: arrays, or their shapes and dtypes, by official names.
      arrays: the authors', by the same names; what cannot be resized is as it was.
    """
    found = dict(arrays)
    for name, array in arrays.items():
        have, want = jnp.shape(array), jnp.shape(wanted[name]) if name in wanted else None
        if want is not None and have != want and len(have) == len(want):
            found[name] = _resized(name, jnp.asarray(array), want)
    return found


def _resized(name: str, array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    last = name.rpartition(".")[2]
    differ = [axis for axis, (a, b) in enumerate(zip(array.shape, shape, strict=True)) if a != b]
    if last in _ROWS_OR_COLUMNS and len(differ) == 1:
        (axis,) = differ
        front = jnp.moveaxis(array, axis, 0)
        line = resize_bilinear(front.reshape(1, array.shape[axis], -1), (shape[axis],))
        return jnp.moveaxis(line.reshape(shape[axis], *front.shape[1:]), 0, axis)
    if last == "relative_position_bias_table" and differ == [0]:
        return _resized_square(array, 0, shape[0])
    if last in ("pos_embed", "absolute_pos_embed") and differ == [1]:
        prefix = array.shape[1] - math.isqrt(array.shape[1]) ** 2
        if prefix == shape[1] - math.isqrt(shape[1]) ** 2:
            return jax.vmap(lambda table: _resized_square(table, prefix, shape[1]))(array)
    if "patch_embed" in name and last == "weight" and array.ndim == 4 and set(differ) <= {2, 3}:
        return jnp.moveaxis(resize_bicubic(jnp.moveaxis(array, 1, -1), shape[2:]), -1, 1)
    return array


def _resized_square(table: jax.Array, prefix: int, rows: int) -> jax.Array:
    """Rows `(prefix + s², C)` of a square to `(rows, C)` of another; as they were if either is no square."""
    old, new = math.isqrt(table.shape[0] - prefix), math.isqrt(rows - prefix)
    if old**2 != table.shape[0] - prefix or new**2 != rows - prefix:
        return table
    square = resize_bicubic(table[prefix:].reshape(1, old, old, -1), (new, new))
    return jnp.concatenate([table[:prefix], square.reshape(new**2, -1)])
