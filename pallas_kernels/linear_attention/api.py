"""Linear attention: the contract that every implementation keeps.

Causal, per head, with log decays g ≤ 0 and a state S (D, E):

    S_i = exp(g_i) S_{i-1} + k_i v_iᵀ        the decay of token i acts on the state before token i is added
    y_i = scale · q_i S_i                     normalised: y_i = q_i S_i / (q_i · z_i),  z_i = exp(g_i) z_{i-1} + k_i

Non-causal: S = Σ_j k_j v_jᵀ over all keys, y_i = scale · q_i S.

Sources: Linear Transformers (arXiv:2006.16236), Lightning Attention-2 (arXiv:2401.04658), gated linear attention
(arXiv:2312.06635); the ε of the denominator is Hedgehog's (arXiv:2402.04347).
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels import dispatch, recurrence
from pallas_kernels.linear_attention import context_parallel
from pallas_kernels.linear_attention.arguments import FeatureMap, apply_feature_map
from pallas_kernels.promotion import numpy_ranks
from pallas_kernels.recurrence import Arguments, NormalizedState, State, check_tensors, check_token, init_state

__all__ = ["OP", "OP_STEP", "explain", "init_state", "linear_attention", "linear_attention_step", "normal_form"]

OP = "linear_attention"
OP_STEP = "linear_attention_step"
FeatureMaps = FeatureMap | tuple[FeatureMap, FeatureMap]

dispatch.register(
    OP,
    [
        dispatch.Implementation("tpu", "pallas_kernels.linear_attention.tpu.op", platforms=("tpu",)),
        dispatch.Implementation(
            "mosaic_gpu", "pallas_kernels.linear_attention.mosaic_gpu.op", platforms=("gpu",), packages=("absl",)
        ),
        dispatch.Implementation(
            "triton", "pallas_kernels.linear_attention.triton.op", platforms=("gpu",), packages=("triton", "jax_triton")
        ),
        dispatch.Implementation("xla", "pallas_kernels.linear_attention.xla"),
        dispatch.Implementation("reference", "pallas_kernels.linear_attention.reference"),
    ],
    trials="pallas_kernels.linear_attention.cases:trials",
)
dispatch.register(
    OP_STEP,
    [
        dispatch.Implementation("tpu", "pallas_kernels.linear_attention.tpu.step", platforms=("tpu",)),
        dispatch.Implementation("xla", "pallas_kernels.linear_attention.xla_step"),
    ],
    trials="pallas_kernels.linear_attention.cases:step_trials",
)


@numpy_ranks()
def linear_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    log_decay: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    causal: bool = True,
    normalize: bool = False,
    feature_map: FeatureMaps | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, State]:
    """Linear attention in time and memory linear in N; differentiable in every floating argument.

    Sums, decays and states are float32 (float64 for float64 inputs). Works under jit, grad, vmap, scan, remat and
    shard_map; for forward-mode derivatives see `dispatch.forward_mode`.

    Args:
      q: queries, (B, N, H, D); float16, bfloat16, float32 or float64.
      k: keys, (B, M, G, D), in the dtype of q; H is a multiple of G, and query head h reads key head h // (H / G).
      v: values, (B, M, G, E), in the dtype of q.
      log_decay: log of the decay, at most 0 (a positive value is read as 0), and -inf forgets everything: None for no
        decay, (H,) constant per head, (B, N, H) per token, (B, N, H, D) per token and key channel (D after the feature
        map). Causal only.
      scale: scalar that multiplies q·k; 1 when None.
      causal: token i reads tokens j ≤ i, itself included. If False it reads every key, and M may differ from N.
      normalize: divides by the sum of the weights, n / (d + sign(d) 1e-12). A row whose denominator is exactly 0, such
        as one with no key to read, gives zeros and zero gradients.
      feature_map: applied to q and to k before everything else, or a pair (map of q, map of k). A map takes an array in
        float32 (float64 for float64 inputs) and may change the last axis; its result is rounded to the dtype of q.
      initial_state: state before the first token, (B, H, D, E), or a `NormalizedState` when `normalize`.
      return_state: also return the state after the last token.
      segment_ids: packed sequences, integers. Causal: (B, N), each run of equal ids is a sequence of its own: the state
        is emptied where the id changes, `initial_state` belongs to the first run, and the returned state is that of the
        last run. Non-causal: (B, N), or a pair (B, N), (B, M): a query reads the keys of its id, wherever they stand.
      chunk_size: tokens per chunk; None for the implementation's own choice.
      axis_name: mesh axis over which one long sequence is cut, inside `jax.shard_map`: every shard calls with its N / n
        tokens, in order, and gets the y of those. Devices exchange states and no tokens, see `context_parallel`.
        `initial_state` is that before the first shard's tokens (the other shards' is not read), the returned state that
        after the last shard's, on every shard. Segments may cross the shards' borders. Non-causal: no segment_ids, and
        no implementation but "xla".
      implementation: name of one of `explain(...)`; None for the best one that supports these arguments here. A named
        implementation runs or raises, it never falls back.

    Returns:
      y (B, N, H, E) in the dtype of q; with `return_state` the pair (y, state), the state in float32.

    Raises:
      ValueError: for shapes, options or combinations that have no meaning; the message names the argument.
      TypeError: for dtypes that are not allowed.
      dispatch.UnsupportedError: if the named implementation, or all of them, refuse these arguments.
    """
    args = normal_form(
        q,
        k,
        v,
        log_decay=log_decay,
        scale=scale,
        causal=causal,
        normalize=normalize,
        feature_map=feature_map,
        initial_state=initial_state,
        return_state=return_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
    )
    if axis_name is None:
        y, state = dispatch.choose(OP, args, implementation).load().run(args)
    else:
        y, state = context_parallel.run(
            args, axis_name, lambda args: dispatch.choose(OP, args, implementation).load().run(args), implementation
        )
    return (y, cast(State, state)) if return_state else y


@numpy_ranks()
def linear_attention_step(
    q_t: ArrayLike,
    k_t: ArrayLike,
    v_t: ArrayLike,
    state: State,
    *,
    log_decay: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    normalize: bool = False,
    feature_map: FeatureMaps | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, State]:
    """One token, or a few, of causal `linear_attention`: for decoding, in constant time and memory.

    Several tokens take one pass over the state: for speculative decoding, or to write text in pieces. Give the state
    away, `jax.jit(step, donate_argnums=...)`, and the new one takes its place in memory.

    Args:
      q_t: query of the token, (B, H, D), or of T tokens in order, (B, T, H, D).
      k_t: its key, (B, G, D) or (B, T, G, D), in the dtype of q_t.
      v_t: its value, (B, G, E) or (B, T, G, E), in the dtype of q_t.
      state: state before the token, (B, H, D, E), or a `NormalizedState` when `normalize`; see `init_state`.
      log_decay: None, (H,), (B, H) of this token, or (B, H, D) of this token and key channel; of T tokens (H,),
        (B, T, H) or (B, T, H, D).
      scale: as in `linear_attention`.
      normalize: as in `linear_attention`.
      feature_map: as in `linear_attention`; it is given (B, 1, H, D) or (B, T, H, D).
      implementation: "tpu" or "xla"; None for the best one that supports these arguments here. A named implementation
        runs or raises, it never falls back.

    Returns:
      y_t (B, H, E) or (B, T, H, E) in the dtype of q_t, and the state after the last token.

    Raises:
      ValueError: for shapes or combinations that have no meaning; the message names the argument.
      TypeError: for dtypes that are not allowed.
      dispatch.UnsupportedError: if the named implementation, or all of them, refuse these arguments.
    """
    q_t, k_t, v_t = check_token(q_t, k_t, v_t, state, several=True)
    one = q_t.ndim == 3
    if log_decay is not None and jnp.ndim(log_decay) not in ((1, 2, 3) if one else (1, 3, 4)):
        allowed = "(H,), (B, H) or (B, H, D)" if one else "(H,), (B, T, H) or (B, T, H, D)"
        raise ValueError(f"log_decay of a step must be {allowed}, got shape {jnp.shape(log_decay)}")
    if one:
        q_t, k_t, v_t = (x[:, None] for x in (q_t, k_t, v_t))
        if log_decay is not None and jnp.ndim(log_decay) > 1:
            log_decay = jnp.asarray(log_decay)[:, None]
    args = normal_form(
        q_t,
        k_t,
        v_t,
        log_decay=log_decay,
        scale=scale,
        normalize=normalize,
        feature_map=feature_map,
        initial_state=state,
        return_state=True,
    )
    y, state = dispatch.choose(OP_STEP, args, implementation).load().run(args)
    return (y[:, 0] if one else y), state


def explain(*args: Any, platform: str | None = None, **options: Any) -> list[dispatch.Choice]:
    """Which implementations would run a call of `linear_attention`, best first, and why the others would not.

    Args:
      *args: q, k, v of the call; none of them to ask about the machine alone.
      platform: "cpu", "gpu" or "tpu"; the current one when None.
      **options: keyword arguments of the call, without `implementation` and `axis_name`.

    Returns:
      (name, ok, reason) of each implementation.

    Raises:
      ValueError: as `linear_attention`.
      TypeError: as `linear_attention`.
    """
    return dispatch.explain(OP, normal_form(*args, **options) if args or options else None, platform=platform)


def normal_form(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    log_decay: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    causal: bool = True,
    normalize: bool = False,
    feature_map: FeatureMaps | None = None,
    initial_state: ArrayLike | NormalizedState | None = None,
    return_state: bool = False,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    chunk_size: int | None = None,
) -> Arguments:
    """Checks the arguments of `linear_attention` and brings them to the one form that implementations read.

    Raises:
      ValueError: as `linear_attention`.
      TypeError: as `linear_attention`.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    check_tensors(q, k, v, causal)
    q, k = apply_feature_map(feature_map, q, k)
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"feature_map must give q and k one size, got {q.shape[-1]} and {k.shape[-1]}")
    return recurrence.normal_form(
        q,
        k,
        v,
        log_decay=log_decay,
        scale=scale,
        causal=causal,
        normalize=normalize,
        initial_state=initial_state,
        return_state=return_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
    )
