"""Chunked selective scan in plain JAX: every platform, linear time and memory, forward and backward.

A sweep over chunks of tokens (`pallas_kernels.chunks`) carries the state, and keeps it at borders of chunks alone. In a
chunk all states are there at once, (c, B, S, G, R) with the R = C / G channels of a group last, as what they are made
of: exp(δ a) and δ x b. They follow from one first-order linear recurrence,

    h_t = α_t h_{t-1} + w_t,

one token after another on a CPU, whose caches hold a state, and by an associative scan elsewhere: (α, w) of two
stretches of tokens are (α' α, α' w + w') of both. Products of decays are at most 1, nothing is divided by them.

The derivative of a chunk is written out. With λ_t = dL/dh_t, α' the decay of the token after and dp the cotangent of
Σ_s c h (+ skip x), it is the same recurrence backwards, λ_t = dp_t c_t + α'_t λ_{t+1}, and

    db = Σ_r λ δ x     dc = Σ_r dp h     d(δ x) = Σ_s λ b     d(δ a) = λ α h_{t-1}
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.chunks import Plan, Tokens, sweep, tokens_per_chunk
from pallas_kernels.partition import same_manual_axes
from pallas_kernels.selective_scan.arguments import Arguments, decays, sigmoid, softplus

CHUNK = 64

Shared = dict[str, jax.Array]  # a (S, G, R); skip and bias (G, R), where there are any


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """The function of one chunk; a value, so that equal plans compile once.

    Attributes:
      softplus: whether step sizes are softplus(delta + bias).
      sequential: whether the recurrence goes token by token.
    """

    softplus: bool
    sequential: bool

    def __call__(self, shared: Shared, tokens: Tokens, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Outputs (B, c, C) of a chunk, and the state (B, S, G, R) after it."""
        tokens = dict(tokens)
        starts = tokens.pop("starts", None)
        return _scan(self, starts, shared, tokens, state)


def supports(args: Arguments) -> str | None:
    """Why this implementation cannot take `args`: it takes all."""
    return None


def run(args: Arguments) -> tuple[jax.Array, jax.Array | None]:
    """y (B, N, C) and, if asked for, the state."""
    return _run(args, dispatch.current_platform() == "cpu")


@functools.partial(jax.jit, static_argnums=1)
def _run(args: Arguments, sequential: bool) -> tuple[jax.Array, jax.Array | None]:
    """Whole chunks are filled up in front, with tokens of no step, which leave the state as it is."""
    dtype, (batch, n, channels), (groups, states) = args.accumulator, args.x.shape, args.b.shape[2:]
    size = tokens_per_chunk(n, args.chunk_size, CHUNK)
    padding = -n % size
    delta, bias = args.delta, args.delta_bias
    if bias is not None and not args.softplus:
        delta, bias = delta.astype(dtype) + bias, None
    shared = {"a": _by_group(args.a.T, groups)}
    for name, x in (("skip", args.skip), ("bias", bias)):
        if x is not None:
            shared[name] = _by_group(x, groups)
    tokens = {"x": args.x, "delta": delta, "b": args.b, "c": args.c, "gate": args.gate, "starts": args.starts}
    tokens = {name: x for name, x in tokens.items() if x is not None}
    if padding:
        fill = {"delta": -jnp.inf if args.softplus else 0}
        tokens = {
            name: jnp.pad(x, ((0, 0), (padding, 0), *((0, 0),) * (x.ndim - 2)), constant_values=fill.get(name, 0))
            for name, x in tokens.items()
        }
    # Typed as the inputs are: under shard_map and explicit sharding a constant would be no valid loop carry.
    first = _by_group(args.x[:, None, 0], groups) * jnp.swapaxes(args.b[:, 0], 1, 2)[..., None]
    state = jnp.zeros_like(first, dtype=dtype)
    if args.initial_state is not None:
        state = state + _by_group(jnp.swapaxes(args.initial_state, 1, 2), groups)
    tokens, shared, state = same_manual_axes((tokens, shared, state))
    y, state = sweep(Plan(size, _Chunk(args.softplus, sequential), _empty), shared, tokens, state)
    state = jnp.swapaxes(state.reshape(batch, states, channels), 1, 2) if args.return_state else None
    return y[:, padding:], state


def _empty(tokens: Tokens) -> jax.Array:
    return jnp.zeros_like(tokens["x"])


def _by_group(x: jax.Array, groups: int) -> jax.Array:
    """(…, C) as (…, G, R)."""
    return x.reshape(*x.shape[:-1], groups, -1)


# ---- one chunk


@dataclasses.dataclass(frozen=True)
class _Values:
    """A chunk's tokens in front, in the accumulator; those of the axis S are 1 where nothing depends on it.

    Attributes:
      x: (c, B, 1, G, R).
      raw: delta + bias, (c, B, 1, G, R).
      delta: the step size, (c, B, 1, G, R).
      a: (S, G, R).
      b: (c, B, S, G, 1).
      c: (c, B, S, G, 1).
      skip: (G, R), or None.
      gate: (c, B, 1, G, R), or None.
      exponent: δ a, (c, B, S, G, R).
      decay: (c, B, S, G, R), 0 where a segment starts.
      states: after each token, (c, B, S, G, R).
    """

    x: jax.Array
    raw: jax.Array
    delta: jax.Array
    a: jax.Array
    b: jax.Array
    c: jax.Array
    skip: jax.Array | None
    gate: jax.Array | None
    exponent: jax.Array
    decay: jax.Array
    states: jax.Array

    @property
    def mixed(self) -> jax.Array:
        """Σ_s c h + skip x, (c, B, 1, G, R)."""
        y = jnp.sum(self.c * self.states, axis=2, keepdims=True)
        return y if self.skip is None else y + self.skip * self.x


def _values(chunk: _Chunk, starts: jax.Array | None, shared: Shared, tokens: Tokens, state: jax.Array) -> _Values:
    dtype, groups = state.dtype, state.shape[2]

    def channels(x: jax.Array) -> jax.Array:
        return _by_group(jnp.swapaxes(x, 0, 1).astype(dtype), groups)[:, :, None]

    x, raw = channels(tokens["x"]), channels(tokens["delta"])
    b, c = (jnp.transpose(tokens[name].astype(dtype), (1, 0, 3, 2))[..., None] for name in "bc")
    raw = raw + shared["bias"] if "bias" in shared else raw
    delta = softplus(raw) if chunk.softplus else raw
    exponent = delta * shared["a"]
    decay = decays(exponent)
    if starts is not None:
        decay = jnp.where(starts.T[:, :, None, None, None], 0, decay)
    states = _recurrence(chunk, decay, delta * x * b, state)
    gate = channels(tokens["gate"]) if "gate" in tokens else None
    return _Values(x, raw, delta, shared["a"], b, c, shared.get("skip"), gate, exponent, decay, states)


def _recurrence(chunk: _Chunk, decay: jax.Array, writes: jax.Array, state: jax.Array, reverse: bool = False):
    """All h_t = decay_t h_{t-1} + writes_t along the first axis, from `state`; from the end if `reverse`."""
    if chunk.sequential:

        def step(h, inputs):
            h = inputs[0] * h + inputs[1]
            return h, h

        return jax.lax.scan(step, state, (decay, writes), reverse=reverse)[1]
    at = -1 if reverse else 0
    writes = writes.at[at].add(decay[at] * state)

    def joined(first, second):
        return second[0] * first[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(joined, (decay, writes), reverse=reverse)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(chunk: _Chunk, starts, shared: Shared, tokens: Tokens, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    values = _values(chunk, starts, shared, tokens, state)
    y = values.mixed
    y = y if values.gate is None else y * jax.nn.silu(values.gate)
    return _merged(y, tokens["x"].dtype), values.states[-1]


def _scan_forward(chunk: _Chunk, starts, shared: Shared, tokens: Tokens, state: jax.Array):
    return _scan(chunk, starts, shared, tokens, state), (starts, shared, tokens, state)


def _scan_backward(chunk: _Chunk, residuals, cotangents):
    starts, shared, tokens, state = residuals
    dy, dlast = cotangents
    v = _values(chunk, starts, shared, tokens, state)
    dmixed = _by_group(jnp.swapaxes(dy, 0, 1).astype(state.dtype), state.shape[2])[:, :, None]
    dtokens, dshared = {}, {}
    if v.gate is not None:
        open_ = sigmoid(v.gate)
        dgate = dmixed * v.mixed * open_ * (1 + v.gate * (1 - open_))
        dtokens["gate"] = _merged(dgate, tokens["gate"].dtype)
        dmixed = dmixed * v.gate * open_
    later = jnp.concatenate([v.decay[1:], jnp.ones_like(v.decay[:1])])
    adjoint = _recurrence(chunk, later, dmixed * v.c, dlast, reverse=True)
    before = jnp.concatenate([state[None], v.states[:-1]])
    # Where an exponent is positive its decay does not depend on it; where a segment starts the decay is 0.
    dexponent = jnp.where(v.exponent > 0, 0, adjoint * v.decay * before)
    dwrite = jnp.sum(adjoint * v.b, axis=2, keepdims=True)
    dx, ddelta = dwrite * v.delta, dwrite * v.x + jnp.sum(dexponent * v.a, axis=2, keepdims=True)
    if v.skip is not None:
        dx = dx + dmixed * v.skip
        dshared["skip"] = jnp.sum(dmixed * v.x, axis=(0, 1, 2))
    ddelta = ddelta * sigmoid(v.raw) if chunk.softplus else ddelta
    if "bias" in shared:
        dshared["bias"] = jnp.sum(ddelta, axis=(0, 1, 2))
    dshared["a"] = jnp.sum(dexponent * v.delta, axis=(0, 1))
    dtokens["x"], dtokens["delta"] = _merged(dx, tokens["x"].dtype), _merged(ddelta, tokens["delta"].dtype)
    for name, each in (("b", adjoint * (v.delta * v.x)), ("c", dmixed * v.states)):
        dtokens[name] = jnp.transpose(jnp.sum(each, axis=-1), (1, 0, 3, 2)).astype(tokens[name].dtype)
    return None, dshared, dtokens, v.decay[0] * adjoint[0]


_scan.defvjp(_scan_forward, _scan_backward)


def _merged(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """(c, B, 1, G, R) as (B, c, C)."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], -1), 0, 1).astype(dtype)
