"""Delta rule attention: the contract that every implementation keeps.

Causal, per head, with log decays g ≤ 0, strengths β and a state S (D, E) that maps keys to values:

    S̃_i = exp(g_i) S_{i-1}
    S_i = S̃_i + β_i k_i (v_i - S̃_iᵀ k_i)ᵀ  =  exp(g_i) (I - β_i k_i k_iᵀ) S_{i-1} + β_i k_i v_iᵀ
    y_i = scale · q_i S_i

A token corrects, by the part β, the error of what the state predicts for its key: the rule of Widrow and Hoff, and of
Rescorla and Wagner. A value that is already predicted writes nothing.

Sources: DeltaNet (arXiv:2406.06484), gated DeltaNet (arXiv:2412.06464); β up to 2: arXiv:2411.12537.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels import dispatch, recurrence
from pallas_kernels.delta_rule_attention.arguments import Arguments, per_head
from pallas_kernels.delta_rule_attention.reference import token
from pallas_kernels.promotion import numpy_ranks
from pallas_kernels.recurrence import check_tensors, check_token, finish, init_state, normal_log_decay

__all__ = ["OP", "delta_rule_attention", "delta_rule_attention_step", "explain", "init_state", "normal_form"]

OP = "delta_rule_attention"

dispatch.register(
    OP,
    [
        dispatch.Implementation("tpu", "pallas_kernels.delta_rule_attention.tpu.op", platforms=("tpu",)),
        dispatch.Implementation("xla", "pallas_kernels.delta_rule_attention.xla"),
        dispatch.Implementation("reference", "pallas_kernels.delta_rule_attention.reference"),
    ],
    trials="pallas_kernels.delta_rule_attention.cases:trials",
)


@numpy_ranks()
def delta_rule_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    beta: ArrayLike,
    *,
    log_decay: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    initial_state: ArrayLike | None = None,
    return_state: bool = False,
    segment_ids: ArrayLike | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal attention by the (gated) delta rule, in time and memory linear in N; every float argument has a gradient.

    Keys are used as they are given. The recurrence is stable when they are L2-normalised and β lies in [0, 1], or in
    [0, 2], where the state may also change sign: then no eigenvalue of I - β k kᵀ exceeds 1 in magnitude. Other values
    are computed, and may grow without bound.

    Sums, decays and states are float32 (float64 for float64 inputs). Works under jit, grad, vmap, scan, remat and
    shard_map; for forward-mode derivatives see `dispatch.forward_mode`.

    Args:
      q: queries, (B, N, H, D); float16, bfloat16, float32 or float64.
      k: keys, (B, N, G, D), in the dtype of q; H is a multiple of G, and query head h reads key head h // (H / G).
      v: values, (B, N, G, E), in the dtype of q.
      beta: strength of each token's correction, (B, N, H), floating. A token with β = 0 writes nothing.
      log_decay: log of the decay, at most 0 (a positive value is read as 0), and -inf forgets everything: None for no
        decay, (H,) constant per head, (B, N, H) per token.
      scale: scalar that multiplies the outputs; 1 when None.
      initial_state: state before the first token, (B, H, D, E).
      return_state: also return the state after the last token.
      segment_ids: packed sequences, integers (B, N): each run of equal ids is a sequence of its own. The state is
        emptied where the id changes, `initial_state` belongs to the first run, the returned state is the last run's.
      chunk_size: tokens per chunk; None for the implementation's own choice.
      implementation: name of one of `explain(...)`; None for the best one that supports these arguments here. A named
        implementation runs or raises, it never falls back.

    Returns:
      y (B, N, H, E) in the dtype of q; with `return_state` the pair (y, state), the state (B, H, D, E) in float32.

    Raises:
      ValueError: for shapes, options or combinations that have no meaning; the message names the argument.
      TypeError: for dtypes that are not allowed.
      dispatch.UnsupportedError: if the named implementation, or all of them, refuse these arguments.
    """
    args = normal_form(
        q,
        k,
        v,
        beta,
        log_decay=log_decay,
        scale=scale,
        initial_state=initial_state,
        return_state=return_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
    )
    y, state = dispatch.choose(OP, args, implementation).load().run(args)
    return (y, state) if return_state else y


@numpy_ranks()
def delta_rule_attention_step(
    q_t: ArrayLike,
    k_t: ArrayLike,
    v_t: ArrayLike,
    beta_t: ArrayLike,
    state: ArrayLike,
    *,
    log_decay: ArrayLike | None = None,
    scale: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `delta_rule_attention`: for decoding, in constant time and memory.

    Args:
      q_t: query of the token, (B, H, D).
      k_t: its key, (B, G, D), in the dtype of q_t.
      v_t: its value, (B, G, E), in the dtype of q_t.
      beta_t: its strength, (B, H).
      state: state before the token, (B, H, D, E); see `init_state`.
      log_decay: None, (H,), or (B, H) of this token.
      scale: as in `delta_rule_attention`.

    Returns:
      y_t (B, H, E) in the dtype of q_t, and the state after the token.

    Raises:
      ValueError: for shapes that have no meaning; the message names the argument.
      TypeError: for dtypes that are not allowed.
    """
    q_t, k_t, v_t = check_token(q_t, k_t, v_t, state)
    if jnp.ndim(beta_t) != 2:
        raise ValueError(f"beta_t must be (B, H), got shape {jnp.shape(beta_t)}")
    if log_decay is not None and jnp.ndim(log_decay) not in (1, 2):
        raise ValueError(f"log_decay of a step must be (H,) or (B, H), got shape {jnp.shape(log_decay)}")
    if log_decay is not None and jnp.ndim(log_decay) == 2:
        log_decay = jnp.asarray(log_decay)[:, None]
    args = normal_form(
        q_t[:, None],
        k_t[:, None],
        v_t[:, None],
        jnp.asarray(beta_t)[:, None],
        log_decay=log_decay,
        scale=scale,
        initial_state=state,
        return_state=True,
    )
    dtype, heads = args.accumulator, q_t.shape[1]
    q, k, v = (per_head(x[:, 0], heads, axis=1).astype(dtype) for x in (args.q, args.k, args.v))
    g = jnp.zeros((), dtype) if args.log_decay is None else args.log_decay
    g = jnp.broadcast_to(g, args.beta.shape)[:, 0]
    state, y = token(cast(jax.Array, args.initial_state), q, k, v, args.beta[:, 0], g)
    return finish(y, args.scale, normalize=False, dtype=args.q.dtype), state


def explain(*args: Any, platform: str | None = None, **options: Any) -> list[dispatch.Choice]:
    """Which implementations would run a call of `delta_rule_attention`, best first, and why the others would not.

    Args:
      *args: q, k, v, beta of the call; none of them to ask about the machine alone.
      platform: "cpu", "gpu" or "tpu"; the current one when None.
      **options: keyword arguments of the call, without `implementation`.

    Returns:
      (name, ok, reason) of each implementation.

    Raises:
      ValueError: as `delta_rule_attention`.
      TypeError: as `delta_rule_attention`.
    """
    return dispatch.explain(OP, normal_form(*args, **options) if args or options else None, platform=platform)


def normal_form(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    beta: ArrayLike,
    *,
    log_decay: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    initial_state: ArrayLike | None = None,
    return_state: bool = False,
    segment_ids: ArrayLike | None = None,
    chunk_size: int | None = None,
) -> Arguments:
    """Checks the arguments of `delta_rule_attention` and brings them to the one form that implementations read.

    Raises:
      ValueError: as `delta_rule_attention`.
      TypeError: as `delta_rule_attention`.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    check_tensors(q, k, v)
    args = recurrence.normal_form(
        q,
        k,
        v,
        scale=scale,
        initial_state=initial_state,
        return_state=return_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
    )
    heads, tokens = args.q.shape[2:3], args.q.shape[:3]
    if jnp.shape(beta) != tokens:
        raise ValueError(f"beta must be (B, N, H) = {tokens}, got shape {jnp.shape(beta)}")
    if not jnp.issubdtype(jnp.result_type(beta), jnp.floating):
        raise TypeError(f"beta must be floating, got {jnp.result_type(beta)}")
    if log_decay is not None:
        if jnp.shape(log_decay) not in (heads, tokens):
            raise ValueError(
                f"log_decay must be (H,) = {heads} or (B, N, H) = {tokens}, got shape {jnp.shape(log_decay)}"
            )
        log_decay = normal_log_decay(log_decay, args.accumulator)
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    return Arguments(**(fields | {"log_decay": log_decay}), beta=jnp.asarray(beta).astype(args.accumulator))
