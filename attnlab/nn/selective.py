"""Mamba's selective state space model, S6 (arXiv:2312.00752), as a part of mixers: of several routes side by side.

Each of K routes, of d channels, has parameters of its own. With r the rank of step sizes and S the size of the state,

    [δ', b, c] = W x,  of r, S and S channels       δ = softplus(W_δ δ' + bias)       a = -exp(log_rates)
    h_t = exp(δ_t a) h_{t-1} + δ_t x_t b_t           y_t = Σ_s c_t h_t + skip x_t

`pallas_kernels.selective_scan` is the recurrence; the routes are its groups, so that all go through in one call.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.linear import uniform_init
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.selective_scan import selective_scan, selective_scan_step

STEPS = (1e-3, 0.1)
LEAST_STEP = 1e-4


class Weights(NamedTuple):
    """Parameters of K routes.

    Attributes:
      inputs: W, (K, r + 2 S, d).
      step: W_δ, (K, d, r).
      step_bias: (K, d).
      log_rates: (K, d, S).
      skip: (K, d).
    """

    inputs: jax.Array
    step: jax.Array
    step_bias: jax.Array
    log_rates: jax.Array
    skip: jax.Array

    @classmethod
    def joined(cls, parts: Sequence["Weights"]) -> "Weights":
        """The routes of all parts, one after the other."""
        return cls(*(jnp.concatenate(each) if len(each) > 1 else each[0] for each in zip(*parts, strict=True)))


def selective_state_space(
    x: ArrayLike, weights: Weights, *, real: ArrayLike | None = None, states: bool = False, **options: Any
) -> Any:
    """S6 along the tokens of each route, in float32 (or wider).

    Args:
      x: (B, N, K, d).
      weights: of the routes.
      real: (B, N) or (B, N, K) boolean, which tokens exist; the others leave the state as it is, and write nothing.
      states: whether the states are asked for in place of y.
      **options: `initial_state` (B, K·d, S), `return_state` and `segment_ids` of `selective_scan`.

    Returns:
      y (B, N, K, d); with `return_state` a pair of it and the state (B, K·d, S). With `states` the read-outs c
      (B, N, K, S) and all states (B, N, K, d, S).
    """
    x, weights, delta, b, c = _inputs(x, weights, real)
    batch, n, routes, size = x.shape
    given = {**_constants(weights), "softplus": True, **options}
    arrays = (x.reshape(batch, n, -1), delta.reshape(batch, n, -1), _rates(weights), b, c)
    if states:
        _, every = selective_scan(*arrays, **given, return_states=True)
        return c, every.reshape(batch, n, routes, size, -1)
    y = selective_scan(*arrays, **given)
    if options.get("return_state"):
        return y[0].reshape(x.shape), y[1]
    return y.reshape(x.shape)


def selective_step(x_t: ArrayLike, weights: Weights, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token (B, K, d) of `selective_state_space`, from a state (B, K·d, S): y of the same shape, and the state."""
    x, weights, delta, b, c = _inputs(jnp.asarray(x_t)[:, None], weights, None)
    arrays = (x[:, 0].reshape(len(x), -1), delta[:, 0].reshape(len(x), -1), _rates(weights), b[:, 0], c[:, 0])
    y, state = selective_scan_step(*arrays, state, **_constants(weights), softplus=True)
    return y.reshape(x[:, 0].shape), state


def _inputs(x: ArrayLike, weights: Weights, real: ArrayLike | None) -> tuple[jax.Array, Weights, Any, Any, Any]:
    """x in the accumulator, weights in it, and what a token says: raw steps, b and c."""
    x = jnp.asarray(x)
    wide = at_least_float32(x.dtype)
    x, weights = x.astype(wide), Weights(*(each.astype(wide) for each in weights))
    rank, size = weights.step.shape[-1], weights.log_rates.shape[-1]
    said = jnp.einsum("bnkd,ked->bnke", x, weights.inputs)
    delta, b, c = jnp.split(said, [rank, rank + size], axis=-1)
    delta = jnp.einsum("bnkr,kdr->bnkd", delta, weights.step)
    if real is not None:
        real = jnp.asarray(real)
        real = real[..., None, None] if real.ndim == 2 else real[..., None]
        # A step of softplus(-inf) = 0 decays nothing and writes nothing.
        delta = jnp.where(real, delta, -jnp.inf)
    return x, weights, delta, b, c


def _rates(weights: Weights) -> jax.Array:
    return -jnp.exp(weights.log_rates).reshape(-1, weights.log_rates.shape[-1])


def _constants(weights: Weights) -> dict[str, jax.Array]:
    return {"skip": weights.skip.reshape(-1), "delta_bias": weights.step_bias.reshape(-1)}


class SelectiveScan(nnx.Module):
    """The parameters of `selective_state_space`, and its calls.

    Args:
      features: channels d of a route.
      routes: K.
      state_size: S.
      rank: r; a sixteenth of the channels, rounded up, when None.
      step_range: of the step sizes at the start, log-uniform.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for sizes below 1, or a range that is none.
    """

    def __init__(
        self,
        features: int,
        *,
        routes: int = 1,
        state_size: int = 16,
        rank: int | None = None,
        step_range: tuple[float, float] = STEPS,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        rank = math.ceil(features / 16) if rank is None else rank
        for name, value in (("features", features), ("routes", routes), ("state_size", state_size), ("rank", rank)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        low, high = step_range
        if not 0 < low <= high:
            raise ValueError(f"step_range must be two positive numbers, the smaller first, got {step_range}")
        shapes = {
            "inputs": (routes, rank + 2 * state_size, features),
            "step": (routes, features, rank),
        }
        draws = {"inputs": uniform_init(features), "step": uniform_init(rank)}
        for name, shape in shapes.items():
            value = draws[name](rngs.params(), shape, param_dtype)
            setattr(self, name, nnx.Param(value, logical_axes=(None, None, None), weight_decay=True))
        steps = jax.random.uniform(rngs.params(), (routes, features), jnp.float32, math.log(low), math.log(high))
        steps = jnp.maximum(jnp.exp(steps), LEAST_STEP)
        bias = steps + jnp.log(-jnp.expm1(-steps))  # the inverse of softplus
        rates = jnp.broadcast_to(jnp.log(jnp.arange(1.0, state_size + 1)), (routes, features, state_size))
        fixed: dict[str, Any] = {"logical_axes": (None, None), "weight_decay": False}
        self.step_bias = nnx.Param(bias.astype(param_dtype), **fixed)
        self.log_rates = nnx.Param(rates.astype(param_dtype), logical_axes=(None, None, None), weight_decay=False)
        self.skip = nnx.Param(jnp.ones((routes, features), param_dtype), **fixed)

    @property
    def weights(self) -> Weights:
        """The parameters as arrays."""
        return Weights(*(getattr(self, name)[...] for name in Weights._fields))

    def __call__(self, x: ArrayLike, **options: Any) -> Any:
        """`selective_state_space` of (B, N, K, d) with these parameters."""
        return selective_state_space(x, self.weights, **options)

    def init_state(self, batch_size: int) -> jax.Array:
        """Before the first token: zeros (B, K·d, S) float32."""
        routes, features, size = self.log_rates.shape
        return jnp.zeros((batch_size, routes * features, size), jnp.float32)

    def advance(self, x_t: ArrayLike, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`selective_step` with these parameters."""
        return selective_step(x_t, self.weights, state)
