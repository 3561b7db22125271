"""Linear attention: the contract that every implementation keeps.

Causal, per head, with log decays g ≤ 0 and a state S (D, E):

    S_i = exp(g_i) S_{i-1} + k_i v_iᵀ        the decay of token i acts on the state before token i is added
    y_i = scale · q_i S_i                     normalised: y_i = q_i S_i / (q_i · z_i),  z_i = exp(g_i) z_{i-1} + k_i

Non-causal: S = Σ_j k_j v_jᵀ over all keys, y_i = scale · q_i S.

Sources: Linear Transformers (arXiv:2006.16236), Lightning Attention-2 (arXiv:2401.04658), gated linear attention
(arXiv:2312.06635); the ε of the denominator is Hedgehog's (arXiv:2402.04347).
"""

import operator
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels import dispatch
from pallas_kernels.linear_attention import context_parallel
from pallas_kernels.linear_attention.arguments import (
    FLOATS,
    Arguments,
    FeatureMap,
    NormalizedState,
    State,
    accumulator,
    apply_feature_map,
    normal_log_decay,
)

OP = "linear_attention"
OP_STEP = "linear_attention_step"
FeatureMaps = FeatureMap | tuple[FeatureMap, FeatureMap]

dispatch.register(
    OP,
    [
        dispatch.Implementation("tpu", "pallas_kernels.linear_attention.tpu", platforms=("tpu",)),
        dispatch.Implementation(
            "mosaic_gpu", "pallas_kernels.linear_attention.mosaic_gpu", platforms=("gpu",), packages=("absl",)
        ),
        dispatch.Implementation(
            "triton", "pallas_kernels.linear_attention.triton", platforms=("gpu",), packages=("triton", "jax_triton")
        ),
        dispatch.Implementation("xla", "pallas_kernels.linear_attention.xla"),
        dispatch.Implementation("reference", "pallas_kernels.linear_attention.reference"),
    ],
)
dispatch.register(
    OP_STEP,
    [
        dispatch.Implementation("tpu", "pallas_kernels.linear_attention.tpu_step", platforms=("tpu",)),
        dispatch.Implementation("xla", "pallas_kernels.linear_attention.xla_step"),
    ],
)


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
    shard_map.

    Args:
      q: queries, (B, N, H, D); float16, bfloat16, float32 or float64.
      k: keys, (B, M, G, D), in the dtype of q; H is a multiple of G, and query head h reads key head h // (H / G).
      v: values, (B, M, G, E), in the dtype of q.
      log_decay: log of the decay, at most 0 (a positive value is read as 0): None for no decay, (H,) constant per
        head, (B, N, H) per token, (B, N, H, D) per token and key channel (D after the feature map). Causal only.
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


def init_state(
    batch: int,
    heads: int,
    key_size: int,
    value_size: int,
    *,
    normalize: bool = False,
    dtype: jnp.dtype = jnp.float32,
) -> State:
    """The empty state: zeros (B, H, D, E), or a `NormalizedState` of zeros.

    Args:
      batch: B.
      heads: H, of the queries.
      key_size: D, after the feature map.
      value_size: E.
      normalize: whether it is for a normalised recurrence.
      dtype: float32, or float64 for float64 inputs.
    """
    kv = jnp.zeros((batch, heads, key_size, value_size), dtype)
    return NormalizedState(kv, jnp.zeros((batch, heads, key_size), dtype)) if normalize else kv


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
    _check_tensors(q, k, v, causal)
    q, k = apply_feature_map(feature_map, q, k)
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"feature_map must give q and k one size, got {q.shape[-1]} and {k.shape[-1]}")
    dtype = accumulator(q.dtype)
    if log_decay is not None:
        if not causal:
            raise ValueError("log_decay must be None when causal=False: decay needs an order of the tokens")
        allowed = {1: q.shape[2:3], 3: q.shape[:3], 4: q.shape}
        if jnp.shape(log_decay) != allowed.get(jnp.ndim(log_decay)):
            raise ValueError(
                f"log_decay must be (H,) = {allowed[1]}, (B, N, H) = {allowed[3]} or (B, N, H, D) = {allowed[4]}, "
                f"got shape {jnp.shape(log_decay)}"
            )
        log_decay = normal_log_decay(log_decay, dtype)
    if scale is not None:
        if jnp.ndim(scale) != 0:
            raise ValueError(f"scale must be a scalar or None, got shape {jnp.shape(scale)}")
        scale = jnp.asarray(scale, dtype)
    query_ids, key_ids = _check_segments(segment_ids, q.shape[:2], k.shape[:2], causal)
    if not causal and query_ids is not None and (return_state or initial_state is not None):
        name = "return_state" if return_state else "initial_state"
        raise ValueError(f"{name} has no meaning for causal=False with segment_ids: each id has a state of its own")
    if chunk_size is not None:
        try:
            chunk_size = operator.index(chunk_size)
        except TypeError:
            raise TypeError(f"chunk_size must be a positive integer or None, got {chunk_size!r}") from None
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be a positive integer or None, got {chunk_size}")
    if initial_state is not None:
        initial_state = _check_state(initial_state, (q.shape[0], q.shape[2], q.shape[3], v.shape[3]), normalize, dtype)
    return Arguments(
        q=q,
        k=k,
        v=v,
        log_decay=log_decay,
        scale=scale,
        causal=bool(causal),
        normalize=bool(normalize),
        initial_state=initial_state,
        return_state=bool(return_state),
        query_ids=query_ids,
        key_ids=key_ids,
        chunk_size=chunk_size,
    )


def check_token(
    q_t: ArrayLike, k_t: ArrayLike, v_t: ArrayLike, state: ArrayLike | NormalizedState, *, several: bool = False
) -> tuple[jax.Array, ...]:
    """q, k, v of one token, or of `several` with an axis T, as arrays; what is left to check, `normal_form` does.

    Raises:
      ValueError: if one of them has another number of axes, or there is no state.
    """
    q_t, k_t, v_t = (jnp.asarray(x) for x in (q_t, k_t, v_t))
    ranks = (3, 4) if several else (3,)
    for name, x, axes in (("q_t", q_t, "H, D"), ("k_t", k_t, "G, D"), ("v_t", v_t, "G, E")):
        if x.ndim not in ranks or x.ndim != q_t.ndim:
            forms = {3: f"(B, {axes})", 4: f"(B, T, {axes})"}
            wanted = " or ".join(forms[rank] for rank in ((q_t.ndim,) if q_t.ndim in ranks else ranks))
            raise ValueError(f"{name} must be {wanted}, got shape {x.shape}")
    if state is None:
        raise ValueError("state must be given; init_state makes an empty one")
    return q_t, k_t, v_t


def _check_tensors(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> None:
    for name, x, axes in (("q", q, "(B, N, H, D)"), ("k", k, "(B, M, G, D)"), ("v", v, "(B, M, G, E)")):
        if x.ndim != 4:
            raise ValueError(f"{name} must be {axes}, got shape {x.shape}")
        if 0 in x.shape:
            raise ValueError(f"{name} must have no empty axis, got shape {x.shape}")
        if x.dtype.name not in FLOATS:
            raise TypeError(f"{name} must be one of {', '.join(FLOATS)}, got {x.dtype.name}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype.name}, {k.dtype.name} and {v.dtype.name}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must agree in (B, M, G), got {k.shape} and {v.shape}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must agree in B, got {q.shape} and {k.shape}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in D, got {q.shape} and {k.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"heads of q must be a multiple of the heads of k, got {q.shape[2]} and {k.shape[2]}")
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"causal=True needs as many keys as queries, got N={q.shape[1]} and M={k.shape[1]}")


def _check_segments(
    segment_ids: Any, queries: tuple[int, ...], keys: tuple[int, ...], causal: bool
) -> tuple[jax.Array | None, jax.Array | None]:
    """Ids of queries and keys, int32 or wider, or (None, None)."""
    if segment_ids is None:
        return None, None
    if isinstance(segment_ids, tuple | list):
        if causal:
            raise ValueError("segment_ids must be one array (B, N) when causal=True, got a pair")
        if len(segment_ids) != 2:
            raise ValueError(f"segment_ids must be an array or a pair of them, got {len(segment_ids)} of them")
        pair = jnp.asarray(segment_ids[0]), jnp.asarray(segment_ids[1])
    else:
        pair = (jnp.asarray(segment_ids),) * 2
        if queries != keys:
            raise ValueError(f"segment_ids must be a pair (B, N), (B, M) when N != M, got N={queries[1]}, M={keys[1]}")
    for ids, shape, what in zip(pair, (queries, keys), ("queries", "keys"), strict=True):
        if ids.shape != shape:
            raise ValueError(f"segment_ids of the {what} must have shape {shape}, got {ids.shape}")
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"segment_ids must be integers, got {ids.dtype.name}")
    return pair


def _check_state(state: Any, shape: tuple[int, ...], normalize: bool, dtype: jnp.dtype) -> State:
    if normalize != isinstance(state, NormalizedState):
        form = "a NormalizedState" if normalize else "an array (B, H, D, E)"
        raise TypeError(f"the state must be {form} when normalize={normalize}, got {type(state).__name__}")
    arrays = state if normalize else (state,)
    for x, wanted in zip(arrays, (shape, shape[:-1]), strict=False):
        if jnp.shape(x) != wanted:
            raise ValueError(f"the state must have shape {wanted}, got {jnp.shape(x)}")
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise TypeError(f"the state must be floating, got {jnp.result_type(x)}")
    return jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), state)
