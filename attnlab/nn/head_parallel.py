"""Functions of heads on several devices: each device computes its own part of the batch and of the heads.

What walks over lists that heads have for themselves, one after the other, is to XLA one loop over all heads: it would
gather them onto every device. But heads do not need each other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.partition import batched_and_partitioned


def head_parallel(fn: Callable[..., jax.Array], in_axes: Sequence[str], out_axes: str, *arrays: jax.Array) -> jax.Array:
    """`fn(*arrays)`; on several devices of parts of the batch and of the heads, as the arrays are cut.

    It is differentiable. Where there are several devices, what the derivative needs is computed anew.

    Args:
      fn: of arrays to one array; the sizes of batch and heads it reads from its arguments.
      in_axes: the axes of each array, a letter each: B the batch, H the heads, G the key heads; others are not cut.
      out_axes: those of the result.
      *arrays: of which those that are floating have gradients.
    """
    if jax.device_count() == 1:
        return fn(*arrays)
    floating = [i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]

    @jax.custom_vjp
    def call(*arrays: jax.Array) -> Any:
        return batched_and_partitioned(lambda *parts: (fn(*parts),), in_axes, (out_axes,))(*arrays)[0]

    def gradients(dy: jax.Array, *parts: jax.Array) -> Any:
        def of_floating(*moved: jax.Array) -> jax.Array:
            every = list(parts)
            for i, x in zip(floating, moved, strict=True):
                every[i] = x
            return fn(*every)

        return jax.vjp(of_floating, *(parts[i] for i in floating))[1](dy)

    def backward(arrays: tuple[jax.Array, ...], dy: jax.Array) -> tuple[Any, ...]:
        wanted = tuple(in_axes[i] for i in floating)
        found = batched_and_partitioned(gradients, (out_axes, *in_axes), wanted)(dy, *arrays)
        by_place = dict(zip(floating, found, strict=True))
        return tuple(by_place.get(i) for i in range(len(arrays)))

    call.defvjp(lambda *arrays: (call(*arrays), arrays), backward)
    return call(*arrays)
