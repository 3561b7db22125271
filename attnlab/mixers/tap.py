"""Token-aware average pooling (TAP, Guo et al., ICCV 2023, arXiv:2303.11126).

Each token of an image takes in its surroundings at scales of its own choice, in front of attention:

    P_0(x) = x,   P_i(x) = mean of 3 x 3 tokens at distances i, zeros around the image counted
    w = softmax_i(conv3×3(BN(conv3×3(x))) / temperature)                         (B, H, W, K)
    y = Σ_i w_i P_i(x)

With one scale y = x. Cost O(N·C·K) time.

Reference for names and defaults: guoyongcs/TAPADL, TAPADL_FAN/models/convnext_utils.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, TokenMixer, record
from attnlab.nn.chain import call
from attnlab.nn.conv import ConvNorm
from attnlab.nn.norms import BatchNorm
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper("Robustifying Token Attention for Vision Transformers", "Guo et al.", 2023, "2303.11126", number=32)


def dilated_mean(x: ArrayLike, dilation: int) -> jax.Array:
    """Mean of the 3 tokens at distances -d, 0 and d along each axis, zeros around the grid: `(B, *S, C)` to the same.

    Args:
      x: tokens.
      dilation: d; 0 leaves them as they are.
    """
    x = jnp.asarray(x)
    if dilation == 0:
        return x
    y = x.astype(at_least_float32(x.dtype))
    for axis in range(1, x.ndim - 1):
        length = x.shape[axis]
        widths = [(dilation, dilation) if a == axis else (0, 0) for a in range(x.ndim)]
        padded = jnp.pad(y, widths)
        parts = [
            jax.lax.slice_in_dim(padded, start, start + length, axis=axis) for start in (0, dilation, 2 * dilation)
        ]
        y = sum(parts[1:], parts[0]) / 3
    return y.astype(x.dtype)


def pools(x: ArrayLike, num_scales: int) -> jax.Array:
    """P_0..P_(K-1) of `(B, *S, C)`: `(B, *S, K, C)`."""
    return jnp.stack([dilated_mean(x, dilation) for dilation in range(num_scales)], -2)


def token_aware_pooling(x: ArrayLike, weights: ArrayLike) -> jax.Array:
    """Σ_i w_i P_i(x).

    Args:
      x: tokens `(B, *S, C)`.
      weights: w, `(B, *S, K)`.

    Returns:
      `(B, *S, C)` in the dtype of `x`.
    """
    x, weights = jnp.asarray(x), jnp.asarray(weights)
    y = jnp.zeros(x.shape, weights.dtype)
    for dilation in range(weights.shape[-1]):
        y = y + weights[..., dilation, None] * dilated_mean(x, dilation).astype(weights.dtype)
    return y.astype(x.dtype)


@register(
    "tap_adl",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="guoyongcs/TAPADL",
    cost=Cost(time="O(N·C·K)", memory="O(N·C)"),
    summary="each token is averaged with those around it, at scales that it weighs itself",
)
class TokenAwarePooling(TokenMixer):
    """Images `(B, H, W, C)` to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_scales: K, of which the first leaves tokens as they are.
      temperature: of the weights.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for no scale, or a temperature that is not positive.
    """

    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE

    def __init__(
        self,
        features: int,
        *,
        num_scales: int = 4,
        temperature: float = 1.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if num_scales < 1 or temperature <= 0:
            raise ValueError(
                f"num_scales must be at least 1 and temperature positive, got {num_scales} and {temperature}"
            )
        self.features, self.num_scales, self.temperature, self.dtype = features, num_scales, temperature, dtype
        common = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.first = ConvNorm(features, num_scales, 3, norm=BatchNorm, axes=("embed", None), **common)
        self.second = ConvNorm(num_scales, num_scales, 3, norm=None, axes=(None, None), **common)

    def weights(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """w `(B, H, W, K)` in float32 (or wider)."""
        scores = self.second(call(self.first, x, deterministic))
        return jax.nn.softmax(scores.astype(at_least_float32(x.dtype)) / self.temperature)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        weights = self.weights(x, deterministic=given.deterministic)
        record(self, "gate", lambda: weights)
        return token_aware_pooling(x, weights)
