"""Selective scan: the contract that every implementation keeps.

A state h of S numbers for each channel, decayed and written to by what the token says of both:

    δ_t = softplus(delta_t + delta_bias), or delta_t + delta_bias
    h_t = exp(δ_t a) h_{t-1} + δ_t x_t b_t                   per channel, elementwise over S
    y_t = (Σ_s c_t h_t + skip x_t) silu(gate_t)

b and c are shared by the channels of a group. Source: the S6 layer of Mamba (arXiv:2312.00752), whose a is negative.
"""

import operator
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from pallas_kernels import dispatch, recurrence
from pallas_kernels.integers import segments
from pallas_kernels.promotion import numpy_ranks
from pallas_kernels.recurrence import FLOATS, run_starts
from pallas_kernels.selective_scan.arguments import Arguments, finish, per_channel, step_sizes
from pallas_kernels.selective_scan.reference import token

__all__ = ["OP", "explain", "init_state", "normal_form", "selective_scan", "selective_scan_step"]

OP = "selective_scan"

dispatch.register(
    OP,
    [
        dispatch.Implementation("tpu", "pallas_kernels.selective_scan.tpu.op", platforms=("tpu",)),
        dispatch.Implementation(
            "triton", "pallas_kernels.selective_scan.triton.op", platforms=("gpu",), packages=("triton", "jax_triton")
        ),
        dispatch.Implementation("xla", "pallas_kernels.selective_scan.xla"),
        dispatch.Implementation("reference", "pallas_kernels.selective_scan.reference"),
    ],
    trials="pallas_kernels.selective_scan.cases:trials",
)


@numpy_ranks()
def selective_scan(
    x: ArrayLike,
    delta: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    c: ArrayLike,
    *,
    skip: ArrayLike | None = None,
    gate: ArrayLike | None = None,
    delta_bias: ArrayLike | None = None,
    softplus: bool = False,
    initial_state: ArrayLike | None = None,
    return_state: bool = False,
    return_states: bool = False,
    segment_ids: ArrayLike | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Any:
    """The selective scan, in time and memory linear in N; every float argument has a gradient.

    Step sizes, decays and states are float32 (float64 for float64 inputs). Works under jit, grad, vmap, scan, remat and
    shard_map; for forward-mode derivatives see `dispatch.forward_mode`.

    Args:
      x: inputs, (B, N, C); float16, bfloat16, float32 or float64.
      delta: step sizes before bias and softplus, (B, N, C), in the dtype of x.
      a: rates of decay, (C, S), floating, at most 0: a positive product of step size and rate is read as 0.
      b: what is written along the state, (B, N, G, S), or (B, N, S) for G = 1, in the dtype of x; C is a multiple of G,
        and channel i reads group i // (C / G).
      c: what is read along the state, in the shape and dtype of b.
      skip: part of x that is added to y, (C,), floating; none when None. The D of the paper.
      gate: (B, N, C), in the dtype of x; y is multiplied by silu(gate). The z of Mamba's block.
      delta_bias: added to delta, (C,), floating.
      softplus: whether the step size is softplus(delta + delta_bias); otherwise it is the sum itself.
      initial_state: state before the first token, (B, C, S).
      return_state: also return the state after the last token.
      return_states: also return the state after every token; memory is then that of the states, S times that of x.
      segment_ids: packed sequences, integers (B, N): each run of equal ids is a sequence of its own. The state is
        emptied where the id changes, `initial_state` belongs to the first run, the returned state is the last run's.
      chunk_size: tokens per chunk; None for the implementation's own choice.
      implementation: name of one of `explain(...)`; None for the best one that supports these arguments here. A named
        implementation runs or raises, it never falls back.

    Returns:
      y (B, N, C) in the dtype of x. With `return_state` or `return_states` a tuple of y, of the last state (B, C, S) if
      asked for, and of all states (B, N, C, S) if asked for; states are float32.

    Raises:
      ValueError: for shapes, options or combinations that have no meaning; the message names the argument.
      TypeError: for dtypes that are not allowed.
      dispatch.UnsupportedError: if the named implementation, or all of them, refuse these arguments.
    """
    args = normal_form(
        x,
        delta,
        a,
        b,
        c,
        skip=skip,
        gate=gate,
        delta_bias=delta_bias,
        softplus=softplus,
        initial_state=initial_state,
        return_state=return_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
    )
    if return_states:
        y, states = _all_states(args, implementation)
        return (y, states[:, -1], states) if return_state else (y, states)
    y, state = dispatch.choose(OP, args, implementation).load().run(args)
    return (y, state) if return_state else y


@numpy_ranks()
def selective_scan_step(
    x_t: ArrayLike,
    delta_t: ArrayLike,
    a: ArrayLike,
    b_t: ArrayLike,
    c_t: ArrayLike,
    state: ArrayLike,
    *,
    skip: ArrayLike | None = None,
    gate: ArrayLike | None = None,
    delta_bias: ArrayLike | None = None,
    softplus: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """One token of `selective_scan`: for decoding, in constant time and memory.

    Args:
      x_t: input of the token, (B, C).
      delta_t: its step size, (B, C), in the dtype of x_t.
      a: as in `selective_scan`.
      b_t: what is written, (B, G, S), or (B, S) for G = 1, in the dtype of x_t.
      c_t: what is read, in the shape and dtype of b_t.
      state: state before the token, (B, C, S); see `init_state`.
      skip: as in `selective_scan`.
      gate: of the token, (B, C).
      delta_bias: as in `selective_scan`.
      softplus: as in `selective_scan`.

    Returns:
      y_t (B, C) in the dtype of x_t, and the state after the token.

    Raises:
      ValueError: for shapes that have no meaning; the message names the argument.
      TypeError: for dtypes that are not allowed.
    """
    if state is None:
        raise ValueError("state must be given; init_state makes an empty one")
    for name, x, ranks, form in (
        ("x_t", x_t, (2,), "(B, C)"),
        ("delta_t", delta_t, (2,), "(B, C)"),
        ("b_t", b_t, (2, 3), "(B, G, S) or (B, S)"),
        ("c_t", c_t, (2, 3), "(B, G, S) or (B, S)"),
    ):
        if jnp.ndim(x) not in ranks:
            raise ValueError(f"{name} must be {form}, got shape {jnp.shape(x)}")
    args = normal_form(
        jnp.asarray(x_t)[:, None],
        jnp.asarray(delta_t)[:, None],
        a,
        jnp.asarray(b_t)[:, None],
        jnp.asarray(c_t)[:, None],
        skip=skip,
        gate=None if gate is None else jnp.asarray(gate)[:, None],
        delta_bias=delta_bias,
        softplus=softplus,
        initial_state=state,
        return_state=True,
    )
    dtype, channels = args.accumulator, args.x.shape[2]
    delta = step_sizes(args.delta.astype(dtype), args.delta_bias, args.softplus)
    x, b, c = (each[:, 0].astype(dtype) for each in (args.x, args.b, args.c))
    state, y = token(
        cast(jax.Array, args.initial_state), args.a, x, delta[:, 0], per_channel(b, channels), per_channel(c, channels)
    )
    return finish(y[:, None], args.x, args.skip, args.gate, args.x.dtype)[:, 0], state


def init_state(batch: int, channels: int, state_size: int, *, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The empty state: zeros (B, C, S).

    Args:
      batch: B.
      channels: C.
      state_size: S.
      dtype: float32, or float64 for float64 inputs.
    """
    return jnp.zeros((batch, channels, state_size), dtype)


def explain(*args: Any, platform: str | None = None, **options: Any) -> list[dispatch.Choice]:
    """Which implementations would run a call of `selective_scan`, best first, and why the others would not.

    Args:
      *args: x, delta, a, b, c of the call; none of them to ask about the machine alone.
      platform: "cpu", "gpu" or "tpu"; the current one when None.
      **options: keyword arguments of the call, without `implementation` and `return_states`.

    Returns:
      (name, ok, reason) of each implementation.

    Raises:
      ValueError: as `selective_scan`.
      TypeError: as `selective_scan`.
    """
    return dispatch.explain(OP, normal_form(*args, **options) if args or options else None, platform=platform)


def _all_states(args: Arguments, implementation: str | None) -> tuple[jax.Array, jax.Array]:
    """y, and the states (B, N, C, S) after all tokens.

    Each number of a state is a channel of its own with a state of one, whose output is the state itself.
    """
    dtype, (batch, n, channels), (groups, size) = args.accumulator, args.x.shape, args.b.shape[2:]

    def spread(x: jax.Array | None) -> jax.Array | None:  # (…, C) to (…, G·S·R)
        if x is None:
            return None
        x = x.astype(dtype).reshape(*x.shape[:-1], groups, 1, channels // groups)
        return jnp.broadcast_to(x, (*x.shape[:-2], size, x.shape[-1])).reshape(*x.shape[:-3], size * channels)

    def entries(x: jax.Array) -> jax.Array:  # (…, C, S) to (…, G·S·R, 1)
        x = x.reshape(*x.shape[:-2], groups, channels // groups, size)
        return jnp.swapaxes(x, -1, -2).reshape(*x.shape[:-3], size * channels, 1)

    b = args.b.astype(dtype).reshape(batch, n, groups * size, 1)
    whole = Arguments(
        x=cast(jax.Array, spread(args.x)),
        delta=cast(jax.Array, spread(args.delta)),
        a=entries(args.a),
        b=b,
        c=jnp.ones_like(b),
        delta_bias=spread(args.delta_bias),
        softplus=args.softplus,
        initial_state=None if args.initial_state is None else entries(args.initial_state),
        starts=args.starts,
        chunk_size=args.chunk_size,
    )
    states, _ = dispatch.choose(OP, whole, implementation).load().run(whole)
    states = jnp.swapaxes(states.reshape(batch, n, groups, size, -1), -1, -2)
    y = jnp.sum(args.c.astype(dtype)[:, :, :, None] * states, axis=-1).reshape(args.x.shape)
    return finish(y, args.x, args.skip, args.gate, args.x.dtype), states.reshape(batch, n, channels, size)


def normal_form(
    x: ArrayLike,
    delta: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    c: ArrayLike,
    *,
    skip: ArrayLike | None = None,
    gate: ArrayLike | None = None,
    delta_bias: ArrayLike | None = None,
    softplus: bool = False,
    initial_state: ArrayLike | None = None,
    return_state: bool = False,
    segment_ids: ArrayLike | None = None,
    chunk_size: int | None = None,
) -> Arguments:
    """Checks the arguments of `selective_scan` and brings them to the one form that implementations read.

    Raises:
      ValueError: as `selective_scan`.
      TypeError: as `selective_scan`.
    """
    x, delta, b, c = (jnp.asarray(each) for each in (x, delta, b, c))
    gate = None if gate is None else jnp.asarray(gate)
    if x.ndim != 3:
        raise ValueError(f"x must be (B, N, C), got shape {x.shape}")
    if 0 in x.shape:
        raise ValueError(f"x must have no empty axis, got shape {x.shape}")
    if x.dtype.name not in FLOATS:
        raise TypeError(f"x must be one of {', '.join(FLOATS)}, got {x.dtype.name}")
    for name, each in (("delta", delta), ("gate", gate)):
        if each is not None and each.shape != x.shape:
            raise ValueError(f"{name} must be (B, N, C) = {x.shape}, got shape {each.shape}")
    dtype, channels = recurrence.accumulator(x.dtype), x.shape[2]
    if jnp.ndim(a) != 2 or jnp.shape(a)[0] != channels or not jnp.shape(a)[1]:
        raise ValueError(f"a must be (C, S) with C = {channels}, got shape {jnp.shape(a)}")
    size = jnp.shape(a)[1]
    for name, each in (("b", b), ("c", c)):
        if each.ndim not in (3, 4) or each.shape[:2] != x.shape[:2] or each.shape[-1] != size:
            wanted = f"(B, N, G, S) or (B, N, S) with B, N = {x.shape[:2]} and S = {size}"
            raise ValueError(f"{name} must be {wanted}, got shape {each.shape}")
    b, c = (each[:, :, None] if each.ndim == 3 else each for each in (b, c))
    if b.shape != c.shape:
        raise ValueError(f"b and c must have as many groups, got {b.shape[2]} and {c.shape[2]}")
    if not b.shape[2] or channels % b.shape[2]:
        raise ValueError(f"channels of x must be a multiple of the groups of b, got {channels} and {b.shape[2]}")
    for name, each in (("delta", delta), ("b", b), ("c", c), ("gate", gate)):
        if each is not None and each.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype.name}, got {each.dtype.name}")
    given = {"a": a, "skip": skip, "delta_bias": delta_bias, "initial_state": initial_state}
    shapes: dict[str, tuple[tuple[int, ...], str]] = dict.fromkeys(("skip", "delta_bias"), ((channels,), "(C,)"))
    shapes["initial_state"] = (x.shape[0], channels, size), "(B, C, S)"
    wide: dict[str, jax.Array] = {}
    for name, each in given.items():
        if each is None:
            continue
        if name in shapes and jnp.shape(each) != shapes[name][0]:
            raise ValueError(f"{name} must be {shapes[name][1]} = {shapes[name][0]}, got shape {jnp.shape(each)}")
        if not jnp.issubdtype(jnp.result_type(each), jnp.floating):
            raise TypeError(f"{name} must be floating, got {jnp.result_type(each)}")
        wide[name] = jnp.asarray(each).astype(dtype)
    starts = None
    if segment_ids is not None:
        ids = segments(segment_ids)[0]
        if ids.shape != x.shape[:2]:
            raise ValueError(f"segment_ids must have shape (B, N) = {x.shape[:2]}, got {ids.shape}")
        starts = run_starts(ids)
    if chunk_size is not None:
        try:
            chunk_size = operator.index(chunk_size)
        except TypeError:
            raise TypeError(f"chunk_size must be a positive integer or None, got {chunk_size!r}") from None
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be a positive integer or None, got {chunk_size}")
    return Arguments(
        x=x,
        delta=delta,
        b=b,
        c=c,
        gate=gate,
        softplus=bool(softplus),
        return_state=bool(return_state),
        starts=starts,
        chunk_size=chunk_size,
        **wide,
    )
