"""What surrounds token mixers in a block: feed-forwards, stochastic depth, layer scale."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.activations import Activation, gelu, silu
from attnlab.nn.chain import call
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.linear import Linear


class MLP(nnx.Module):
    """Feed-forward: `linear, activation, linear` on the last axis; of images with a depthwise convolution between them.

        h = fc1(x);   h = f(h) "map";   c = f(conv(h)) "conv";   h = f(c or h + c) "sum";   y = fc2(norm(h))

    where f, the activation, stands at the places that `activation_at` names; without a convolution at any of them.
    PVTv2 has it at ("sum",), the families of RMT and A2Mamba at ("map",) with a residual, CATANet at ("map", "conv").

    Args:
      features: channels C in.
      hidden_features: hidden channels; 4 C when None.
      out_features: channels out; C when None.
      activation: `gelu` (exact) unless given.
      depthwise: side of a depthwise convolution of the hidden channels, 0 for none; or what builds a module in its
        place: `depthwise(hidden, dtype=…, param_dtype=…, rngs=…)`.
      residual: whether the convolution is added to what goes into it.
      activation_at: places of the activation, some of "map", "conv" and "sum"; there may be none.
      norm: builds a norm in front of the second map: `norm(hidden, param_dtype=…, rngs=…)`; none when None.
      use_bias: whether both maps have a bias.
      dropout: rate after each map, in training.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params` and, for dropout, `dropout`.

    Raises:
      ValueError: for another place of the activation, or a residual without a convolution.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int | None = None,
        *,
        out_features: int | None = None,
        activation: Activation = gelu,
        depthwise: int | Callable[..., nnx.Module] = 0,
        residual: bool = False,
        activation_at: Sequence[str] = ("sum",),
        norm: Callable[..., nnx.Module] | None = None,
        use_bias: bool = True,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if set(activation_at) - {"map", "conv", "sum"}:
            raise ValueError(f"activation_at must be some of 'map', 'conv', 'sum', got {tuple(activation_at)}")
        if not depthwise and (residual or tuple(activation_at) != ("sum",)):
            raise ValueError("residual and activation_at say where a depthwise convolution stands, and there is none")
        hidden = 4 * features if hidden_features is None else hidden_features
        out = features if out_features is None else out_features
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"use_bias": use_bias, "dtype": dtype, **stored}
        self.activation, self.residual, self.activation_at = activation, residual, frozenset(activation_at)
        self.fc1 = Linear(features, hidden, axes=("embed", "mlp"), **common)
        self.conv = nnx.data(None)
        if callable(depthwise):
            self.conv = depthwise(hidden, dtype=dtype, **stored)
        elif depthwise:
            self.conv = DepthwiseConv(hidden, (depthwise, depthwise), axes=("mlp",), dtype=dtype, **stored)
        self.norm = nnx.data(None) if norm is None else norm(hidden, **stored)
        self.fc2 = Linear(hidden, out, axes=("mlp", "embed"), **common)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout > 0 else nnx.data(None)

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """`(…, C)` to `(…, out_features)`; images `(B, H, W, C)` if there is a convolution."""
        y = self.fc1(x)
        if self.conv is not None:
            y = self._activated(y, "map")
            local = self._activated(call(self.conv, y, deterministic), "conv")
            y = y + local if self.residual else local
        y = self._activated(y, "sum")
        y = y if self.norm is None else call(self.norm, y, deterministic)
        y = y if self.dropout is None else self.dropout(y, deterministic=deterministic)
        y = self.fc2(y)
        return y if self.dropout is None else self.dropout(y, deterministic=deterministic)

    def _activated(self, x: jax.Array, place: str) -> jax.Array:
        return self.activation(x) if place in self.activation_at else x


class GatedMLP(nnx.Module):
    """Gated feed-forward (Shazeer, 2020, arXiv:2002.05202): `out(activation(gate(x)) · up(x))`; SwiGLU by default.

    Args:
      features: channels C in and out.
      hidden_features: channels of the gate; 8/3 C when None (rounded down), which has the weights of an MLP of ratio 4.
      activation: of the gate; `silu` unless given.
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
        activation: Activation = silu,
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
    """A learned factor per channel (Touvron et al., 2021, arXiv:2103.17239), `init` at the start; maybe with a bias."""

    def __init__(
        self,
        features: int,
        *,
        init: float = 1e-5,
        use_bias: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.scale = nnx.Param(jnp.full((features,), init, param_dtype), logical_axes=("embed",))
        bias = nnx.Param(jnp.zeros((features,), param_dtype), logical_axes=("embed",)) if use_bias else None
        self.bias = nnx.data(bias)

    def __call__(self, x: ArrayLike) -> jax.Array:
        """`(…, C)` to the same shape and dtype."""
        x = jnp.asarray(x)
        y = x * self.scale[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
