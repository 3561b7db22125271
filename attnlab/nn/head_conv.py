"""A convolution along a sequence with one kernel for each head, zeros around it; all channels of a head share it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.nn.depthwise import depthwise_conv


class HeadConv(nnx.Module):
    """`(B, N, H, D)` to the same shape.

    Args:
      num_heads: heads H.
      size: taps k of a kernel, odd.
      kernel_init: of the kernel `(k, H)`; zeros unless given.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for an even size.
    """

    def __init__(
        self,
        num_heads: int,
        size: int,
        *,
        kernel_init: nnx.Initializer = nnx.initializers.zeros,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if size < 1 or size % 2 == 0:
            raise ValueError(f"the convolution's size must be odd, got {size}")
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), (size, num_heads), param_dtype), logical_axes=(None, "heads")
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = jnp.broadcast_to(self.kernel[...][..., None], (*self.kernel.shape, x.shape[-1]))
        return depthwise_conv(x, kernel, channel_axes=2)
