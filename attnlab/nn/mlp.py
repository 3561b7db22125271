"""What surrounds token mixers in a block: feed-forwards, stochastic depth, layer scale."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.linear import Linear

Activation = Callable[[jax.Array], jax.Array]


def gelu(x: ArrayLike) -> jax.Array:
    """x·Φ(x) by the error function, not its tanh approximation (which `jax.nn.gelu` takes unless told)."""
    return jax.nn.gelu(x, approximate=False)


class MLP(nnx.Module):
    """Feed-forward: `linear, activation, linear` on the last axis; of images with a depthwise convolution before it.

    Args:
      features: channels C in.
      hidden_features: hidden channels; 4 C when None.
      out_features: channels out; C when None.
      activation: `gelu` (exact) unless given.
      depthwise: side of the depthwise convolution between the first map and the activation; 0 for none.
      use_bias: whether both maps have a bias.
      dropout: rate after each map, in training.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params` and, for dropout, `dropout`.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int | None = None,
        *,
        out_features: int | None = None,
        activation: Activation = gelu,
        depthwise: int = 0,
        use_bias: bool = True,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        hidden = 4 * features if hidden_features is None else hidden_features
        out = features if out_features is None else out_features
        common = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.activation = activation
        self.fc1 = Linear(features, hidden, axes=("embed", "mlp"), **common)
        self.conv = nnx.data(None)
        if depthwise:
            options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
            self.conv = DepthwiseConv(hidden, (depthwise, depthwise), axes=("mlp",), **options)
        self.fc2 = Linear(hidden, out, axes=("mlp", "embed"), **common)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout > 0 else nnx.data(None)

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """`(…, C)` to `(…, out_features)`; images `(B, H, W, C)` if there is a convolution."""
        y = self.fc1(x)
        y = self.activation(y if self.conv is None else self.conv(y))
        y = y if self.dropout is None else self.dropout(y, deterministic=deterministic)
        y = self.fc2(y)
        return y if self.dropout is None else self.dropout(y, deterministic=deterministic)


class GatedMLP(nnx.Module):
    """Gated feed-forward (Shazeer, 2020, arXiv:2002.05202): `out(activation(gate(x)) · up(x))`; SwiGLU by default.

    Args:
      features: channels C in and out.
      hidden_features: channels of the gate; 8/3 C when None (rounded down), which has the weights of an MLP of ratio 4.
      activation: of the gate; `jax.nn.silu` unless given.
      use_bias: whether the maps have a bias.
      dropout: rate before the last map, in training.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params` and, for dropout, `dropout`.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int | None = None,
        *,
        activation: Activation = jax.nn.silu,
        use_bias: bool = False,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        hidden = 8 * features // 3 if hidden_features is None else hidden_features
        common = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.activation = activation
        self.gate = Linear(features, hidden, axes=("embed", "mlp"), **common)
        self.up = Linear(features, hidden, axes=("embed", "mlp"), **common)
        self.down = Linear(hidden, features, axes=("mlp", "embed"), **common)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout > 0 else nnx.data(None)

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """`(…, C)` to `(…, C)`."""
        y = self.activation(self.gate(x)) * self.up(x)
        y = y if self.dropout is None else self.dropout(y, deterministic=deterministic)
        return self.down(y)


class DropPath(nnx.Module):
    """Stochastic depth (Huang et al., 2016, arXiv:1603.09382): in training, drops the branch of a whole example.

    What stays is divided by the probability to stay, so that the mean is kept.

    Args:
      rate: probability to drop, 0 ≤ rate < 1.
      rngs: stream `dropout`; unused at rate 0.

    Raises:
      ValueError: for a rate out of its range.
    """

    def __init__(self, rate: float, *, rngs: nnx.Rngs):
        if not 0 <= rate < 1:
            raise ValueError(f"rate must be in [0, 1), got {rate}")
        self.rate = rate
        # A stream of its own: a shared one would be a reference shared between modules.
        self.rngs = rngs["dropout"].fork() if rate > 0 else nnx.data(None)

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """`(B, …)` to the same shape."""
        x = jnp.asarray(x)
        if deterministic or self.rngs is None:
            return x
        keep = 1 - self.rate
        kept = jax.random.bernoulli(self.rngs(), keep, (x.shape[0], *(1,) * (x.ndim - 1)))
        return jnp.where(kept, x / keep, jnp.zeros_like(x))


class LayerScale(nnx.Module):
    """A learned factor per channel (Touvron et al., 2021, arXiv:2103.17239), `init` at the start."""

    def __init__(self, features: int, *, init: float = 1e-5, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.full((features,), init, param_dtype), logical_axes=("embed",))

    def __call__(self, x: ArrayLike) -> jax.Array:
        """`(…, C)` to the same shape and dtype."""
        x = jnp.asarray(x)
        return x * self.scale[...].astype(x.dtype)
