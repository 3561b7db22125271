"""The normal form of the arguments of a selective scan, and the small functions that all implementations share."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import recurrence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Checked arguments in one form.

    Attributes:
      x: (B, N, C), float.
      delta: (B, N, C), dtype of x, before bias and softplus.
      a: (C, S), in `accumulator`.
      b: (B, N, G, S), dtype of x; G divides C, and channel c reads group c // (C / G).
      c: (B, N, G, S), dtype of x.
      skip: (C,) in `accumulator`, or None.
      gate: (B, N, C), dtype of x, or None.
      delta_bias: (C,) in `accumulator`, or None.
      softplus: whether the step size is softplus(delta + bias).
      initial_state: (B, C, S) in `accumulator`, or None.
      return_state: whether the last state is asked for.
      starts: where the state is emptied, (B, N) bool, or None.
      chunk_size: tokens per chunk, or None for the implementation's own choice.
    """

    x: jax.Array
    delta: jax.Array
    a: jax.Array
    b: jax.Array
    c: jax.Array
    skip: jax.Array | None = None
    gate: jax.Array | None = None
    delta_bias: jax.Array | None = None
    softplus: bool = False
    initial_state: jax.Array | None = None
    return_state: bool = False
    starts: jax.Array | None = None
    chunk_size: int | None = None

    @property
    def accumulator(self) -> jnp.dtype:
        """Dtype of step sizes, decays and states: float64 for float64 inputs, float32 otherwise."""
        return recurrence.accumulator(self.x.dtype)


jax.tree_util.register_dataclass(
    Arguments,
    data_fields=["x", "delta", "a", "b", "c", "skip", "gate", "delta_bias", "initial_state", "starts"],
    meta_fields=["softplus", "return_state", "chunk_size"],
)


def softplus(x: jax.Array) -> jax.Array:
    """log(1 + exp(x)); 0 at -inf, where its derivative is 0 too."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x)), the derivative of softplus."""
    return jax.nn.sigmoid(x)


def step_sizes(delta: jax.Array, bias: jax.Array | None, positive: bool) -> jax.Array:
    """δ (…, C) of what was given, all in one dtype."""
    raw = delta if bias is None else delta + bias
    return softplus(raw) if positive else raw


def decays(exponent: jax.Array) -> jax.Array:
    """exp(δ a); no exponent is positive."""
    return jnp.exp(jnp.where(exponent > 0, 0, exponent))


def per_channel(x: jax.Array, channels: int) -> jax.Array:
    """Groups (…, G, S), repeated to channels (…, C, S)."""
    return jnp.repeat(x, channels // x.shape[-2], axis=-2)


def finish(y: jax.Array, x: jax.Array, skip: jax.Array | None, gate: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """(y + skip · x) silu(gate) in `dtype`, all of the same number of axes with channels last, y of the accumulator."""
    y = y if skip is None else y + skip * x.astype(y.dtype)
    return (y if gate is None else y * jax.nn.silu(gate.astype(y.dtype))).astype(dtype)
