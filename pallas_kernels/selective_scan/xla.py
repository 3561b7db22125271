"""Chunked selective scan in plain JAX: every platform, linear time and memory, forward and backward.

A sweep over chunks of tokens (`pallas_kernels.chunks`) carries the state, and keeps it at borders of chunks alone. In a
chunk the states (B, S, G, R), with the R = C / G channels of a group last, follow from one first-order recurrence,

    h_t = α_t h_{t-1} + w_t        α = exp(δ a), w = δ x b

On a CPU it goes from token to token, and all that is as large as a state is made and used there, in the caches;
elsewhere it is an associative scan of a chunk's tokens: (α, w) of two stretches are (α' α, α' w + w') of both. Products
of decays are at most 1, nothing is divided by them.

The derivative of a chunk is written out. With λ_t = dL/dh_t, α' the decay of the token after and dp the cotangent of
Σ_s c h (+ skip x), it is the same recurrence backwards, λ_t = dp_t c_t + α'_t λ_{t+1}, and

    db = Σ_r λ δ x     dc = Σ_r dp h     d(δ x) = Σ_s λ b     d(δ a) = λ α h_{t-1}
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.chunks import Plan, Tokens, sweep, tokens_per_chunk
from pallas_kernels.partition import same_manual_axes
from pallas_kernels.selective_scan.arguments import Arguments, decays, sigmoid, softplus

CHUNK = 32  # of 16 to 128 the gradient was fastest with, on a busy CPU

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


class _Token(NamedTuple):
    """What is known of a token, in the accumulator; of the tokens of a chunk with an axis c in front.

    Attributes:
      x: (B, G, R).
      delta: the step size, (B, G, R).
      b: (B, S, G).
      c: (B, S, G).
      start: where a segment starts, (B,), or None.
    """

    x: jax.Array
    delta: jax.Array
    b: jax.Array
    c: jax.Array
    start: jax.Array | None

    def decay(self, a: jax.Array) -> tuple[jax.Array, jax.Array]:
        """δ a (B, S, G, R), and the decay, 0 where a segment starts."""
        exponent = self.delta[:, None] * a
        decay = decays(exponent)
        return exponent, decay if self.start is None else jnp.where(self.start[:, None, None, None], 0, decay)

    def write(self) -> jax.Array:
        """δ x b, (B, S, G, R)."""
        return (self.delta * self.x)[:, None] * self.b[..., None]

    def advance(self, a: jax.Array, state: jax.Array) -> jax.Array:
        """The state after the token."""
        return self.decay(a)[1] * state + self.write()


_EXACT = jax.lax.Precision.HIGHEST


def _read(state: jax.Array, along: jax.Array) -> jax.Array:
    """Σ_s of (B, S, G, R) and (B, S, G): (B, G, R)."""
    return jnp.einsum("bsgr,bsg->bgr", state, along, precision=_EXACT)


def _gathered(state: jax.Array, channels: jax.Array) -> jax.Array:
    """Σ_r of (B, S, G, R) and (B, G, R): (B, S, G)."""
    return jnp.einsum("bsgr,bgr->bsg", state, channels, precision=_EXACT)


def _tokens(
    chunk: _Chunk, starts: jax.Array | None, shared: Shared, tokens: Tokens, dtype: jnp.dtype, groups: int
) -> tuple[_Token, jax.Array]:
    """The tokens of a chunk, and delta + bias (c, B, G, R)."""
    x, raw = (_in_front(tokens[name], dtype, groups) for name in ("x", "delta"))
    b, c = (jnp.transpose(tokens[name].astype(dtype), (1, 0, 3, 2)) for name in "bc")
    raw = raw + shared["bias"] if "bias" in shared else raw
    delta = softplus(raw) if chunk.softplus else raw
    return _Token(x, delta, b, c, None if starts is None else starts.T), raw


def _in_front(x: jax.Array, dtype: jnp.dtype, groups: int) -> jax.Array:
    """(B, c, C) as (c, B, G, R), in the accumulator."""
    return _by_group(jnp.swapaxes(x, 0, 1).astype(dtype), groups)


def _merged(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """(c, B, G, R) as (B, c, C)."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], -1), 0, 1).astype(dtype)


def _associative(decay: jax.Array, writes: jax.Array, state: jax.Array, reverse: bool = False) -> jax.Array:
    """All h_t = decay_t h_{t-1} + writes_t along the first axis, from `state`; from the end if `reverse`."""
    at = -1 if reverse else 0
    writes = writes.at[at].add(decay[at] * state)

    def joined(first, second):
        return second[0] * first[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(joined, (decay, writes), reverse=reverse)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(chunk: _Chunk, starts, shared: Shared, tokens: Tokens, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, (dtype, groups) = shared["a"], (state.dtype, state.shape[2])
    token, _ = _tokens(chunk, starts, shared, tokens, dtype, groups)
    if chunk.sequential:

        def step(h, one):
            h = one.advance(a, h)
            return h, _read(h, one.c)

        state, mixed = jax.lax.scan(step, state, token)
    else:
        decay = jax.vmap(lambda one: one.decay(a)[1])(token)
        states = _associative(decay, jax.vmap(_Token.write)(token), state)
        state, mixed = states[-1], jax.vmap(_read)(states, token.c)
    mixed = mixed + shared["skip"] * token.x if "skip" in shared else mixed
    if "gate" in tokens:
        mixed = mixed * jax.nn.silu(_in_front(tokens["gate"], dtype, groups))
    return _merged(mixed, tokens["x"].dtype), state


def _scan_forward(chunk: _Chunk, starts, shared: Shared, tokens: Tokens, state: jax.Array):
    return _scan(chunk, starts, shared, tokens, state), (starts, shared, tokens, state)


class _Gradients(NamedTuple):
    """Of one token, or of the tokens of a chunk.

    Attributes:
      write: d(δ x), (B, G, R).
      step: Σ_s a d(δ a), (B, G, R).
      b: (B, S, G).
      c: (B, S, G).
      mixed: Σ_s c h, which the gate's gradient needs, (B, G, R).
    """

    write: jax.Array
    step: jax.Array
    b: jax.Array
    c: jax.Array
    mixed: jax.Array


def _of_token(
    a: jax.Array, token: _Token, dmixed: jax.Array, decay: jax.Array, before: jax.Array, adjoint: jax.Array
) -> tuple[jax.Array, jax.Array, _Gradients]:
    """α λ, da and the others, of a token with α, the state before it and λ (B, S, G, R)."""
    after, passing = decay * before + token.write(), decay * adjoint
    # Where an exponent is positive its decay does not depend on it; where a segment starts the decay is 0.
    dexponent = jnp.where(token.delta[:, None] * a > 0, 0, passing * before)
    gradients = _Gradients(
        write=_read(adjoint, token.b),
        step=jnp.sum(dexponent * a, axis=1),
        b=_gathered(adjoint, token.delta * token.x),
        c=_gathered(after, dmixed),
        mixed=_read(after, token.c),
    )
    return passing, jnp.sum(dexponent * token.delta[:, None], axis=0), gradients


def _scan_backward(chunk: _Chunk, residuals, cotangents):
    starts, shared, tokens, state = residuals
    dy, dlast = cotangents
    a, (dtype, groups) = shared["a"], (state.dtype, state.shape[2])
    token, raw = _tokens(chunk, starts, shared, tokens, dtype, groups)
    dmixed = _in_front(dy, dtype, groups)
    if "gate" in tokens:
        gate = _in_front(tokens["gate"], dtype, groups)
        open_ = sigmoid(gate)
        slope = dmixed * open_ * (1 + gate * (1 - open_))
        dmixed = dmixed * gate * open_
    if chunk.sequential:

        def rebuild(h, one):
            decay = one.decay(a)[1]
            return decay * h + one.write(), (decay, h)

        # Decays are kept for a chunk: XLA would take each exponential again in every sum below.
        _, (decay, before) = jax.lax.scan(rebuild, state, token)

        def step(carry, inputs):
            passing, da = carry
            one, dmixed, decay, before = inputs
            adjoint = passing + one.c[..., None] * dmixed[:, None]
            passing, da_t, gradients = _of_token(a, one, dmixed, decay, before, adjoint)
            return (passing, da + da_t), gradients

        start = dlast, jnp.sum(jnp.zeros_like(dlast), axis=0)
        (dstate, da), found = jax.lax.scan(step, start, (token, dmixed, decay, before), reverse=True)
    else:
        decay = jax.vmap(lambda one: one.decay(a)[1])(token)
        states = _associative(decay, jax.vmap(_Token.write)(token), state)
        before = jnp.concatenate([state[None], states[:-1]])
        later = jnp.concatenate([decay[1:], jnp.ones_like(decay[:1])])
        adjoint = _associative(later, token.c[..., None] * dmixed[:, :, None], dlast, reverse=True)
        passing, da, found = jax.vmap(functools.partial(_of_token, a))(token, dmixed, decay, before, adjoint)
        dstate, da = passing[0], jnp.sum(da, axis=0)
    dtokens, dshared = {}, {"a": da}
    dx, ddelta, mixed = found.write * token.delta, found.write * token.x + found.step, found.mixed
    if "skip" in shared:
        dx, mixed = dx + dmixed * shared["skip"], mixed + shared["skip"] * token.x
        dshared["skip"] = jnp.sum(dmixed * token.x, axis=(0, 1))
    if "gate" in tokens:
        dtokens["gate"] = _merged(slope * mixed, tokens["gate"].dtype)
    ddelta = ddelta * sigmoid(raw) if chunk.softplus else ddelta
    if "bias" in shared:
        dshared["bias"] = jnp.sum(ddelta, axis=(0, 1))
    dtokens["x"], dtokens["delta"] = _merged(dx, tokens["x"].dtype), _merged(ddelta, tokens["delta"].dtype)
    for name, each in (("b", found.b), ("c", found.c)):
        dtokens[name] = jnp.transpose(each, (1, 0, 3, 2)).astype(tokens[name].dtype)
    return None, dshared, dtokens, dstate


_scan.defvjp(_scan_forward, _scan_backward)
