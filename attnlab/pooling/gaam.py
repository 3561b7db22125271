"""Pooling by Gaussian weights, after Gaussian adaptive attention (Ioannides et al., 2024, arXiv:2401.11143).

Each channel is averaged over the tokens with the weights of GAAM along them: with the channel's mean μ and unbiased
variance σ² + eps over the tokens that exist, and G offsets δ and widths c,

    p_n = Π_g exp(-(x_n - μ - δ_g)² / 2c_g²σ²)         w_n = p_n / Σ_m p_m         y = Σ_n w_n x_n

so that tokens near the mean plus an offset count, and outliers do not. H groups of channels have offsets and widths of
their own: H·G·2 weights in all, cost O(N·C).

The pooling is ours: the paper and its code weigh values and leave their number as it is (`attnlab.mixers.gaam`). There
heads cut the axis of the weights, here channels, since a pool of a part of the tokens is no pool. The sum has no floor
here, where a row without weight would have no gradient to come back by.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Pooling, record
from attnlab.mixers.gaam import PAPER
from attnlab.nn.gaussian_weights import GaussianHead, head_arrays, product
from attnlab.nn.masking import masked_softmax
from attnlab.registry import Cost, Source, register
from pallas_kernels.dtypes import at_least_float32


def gaussian_pooling(
    x: ArrayLike,
    mean_offsets: ArrayLike,
    widths: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    eps: float = 1e-8,
) -> tuple[jax.Array, jax.Array]:
    """Average of tokens by Gaussian weights; the operator of `GaussianPooling`.

    Args:
      x: tokens, (B, N, C).
      mean_offsets: δ, (H, G), in the units of `x`; head h has channels h·(C // H) and on, the last one all that remain.
      widths: c, (H, G), in standard deviations.
      mask: (B, N) boolean, which tokens exist; all when None.
      eps: added to the variance.

    Returns:
      (B, C) in the dtype of `x`, and the weights (B, N, C) in float32; zeros where no token exists.

    Raises:
      ValueError: if there are more heads than channels.
    """
    x = jnp.asarray(x)
    values, (heads, _), channels = x.astype(at_least_float32(x.dtype)), jnp.shape(widths), x.shape[-1]
    if heads > channels:
        raise ValueError(f"{heads} heads are more than the {channels} channels that they share")
    gaussian = product(mean_offsets, widths).take(np.minimum(np.arange(channels) // (channels // heads), heads - 1))
    exists = jnp.ones((1, x.shape[1], 1), bool) if mask is None else jnp.asarray(mask)[..., None]
    values = jnp.where(exists, values, 0)
    count = exists.sum(1, keepdims=True)
    mean = values.sum(1, keepdims=True) / jnp.maximum(count, 1)
    difference = values - mean
    square = jnp.where(exists, jnp.square(difference), 0)
    variance = square.sum(1, keepdims=True) / jnp.maximum(count - 1, 1) + eps
    weights = masked_softmax(gaussian.exponent(difference, variance), None if mask is None else exists, axis=1)
    return (weights * values).sum(1).astype(x.dtype), weights


@register(
    "gaam.pooling",
    paper=PAPER,
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N·C)", memory="O(N·C)"),
    summary="each channel averaged over the tokens by a product of learned Gaussians around its mean",
)
class GaussianPooling(Pooling):
    """Tokens (B, N, C) to one vector (B, C). See the module docstring for the equations.

    Args:
      features: channels C of the tokens.
      num_heads: groups H of channels, each with Gaussians of its own.
      num_gaussians: G.
      eps: added to the variance.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for heads below 1 or above the channels, or a Gaussian too few.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 1,
        num_gaussians: int = 5,
        eps: float = 1e-8,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not 1 <= num_heads <= features:
            raise ValueError(f"num_heads must be from 1 to the {features} channels, got {num_heads}")
        self.features = self.out_features = features
        self.eps, self.dtype = eps, dtype
        self.heads = nnx.List(
            [GaussianHead(num_gaussians, param_dtype=param_dtype, rngs=rngs) for _ in range(num_heads)]
        )

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        y, weights = gaussian_pooling(x, *head_arrays(self.heads), mask=mask, eps=self.eps)
        record(self, "attention", lambda: jnp.broadcast_to(weights, x.shape).swapaxes(1, 2)[:, :, None])
        return y
