"""What the recurrences of several ops share: the normal form of their arguments, their state, and the rules around it.

An op with a state S (D, E) per head checks what the caller gave and brings it to one `Arguments`; implementations read
nothing else.
"""

import dataclasses
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.integers import segments

FLOATS = ("float16", "bfloat16", "float32", "float64")
EPSILON = 1e-12  # added to the magnitude of the denominator, as in Hedgehog (arXiv:2402.04347)


class NormalizedState(NamedTuple):
    """State of a normalised recurrence, decayed to the last token.

    Attributes:
      kv: Σ_j decay_j k_j v_jᵀ, (B, H, D, E), float32.
      k: Σ_j decay_j k_j, (B, H, D), float32.
    """

    kv: jax.Array
    k: jax.Array


State = jax.Array | NormalizedState


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Checked arguments in one form; shapes after the feature map.

    Attributes:
      q: (B, N, H, D), float.
      k: (B, M, G, D), dtype of q; G divides H, and head h reads key head h // (H / G).
      v: (B, M, G, E), dtype of q.
      log_decay: None, (H,), (B, N, H) or (B, N, H, D); values at most 0, in `accumulator`, finite.
      scale: scalar in `accumulator`, or None for 1.
      causal: whether token i reads tokens j ≤ i alone (then M = N).
      normalize: whether to divide by q·Σk.
      initial_state: None, (B, H, D, E), or a `NormalizedState` when `normalize`; in `accumulator`.
      return_state: whether the state is asked for.
      query_ids: segment of each query, (B, N) integer, or None.
      key_ids: segment of each key, (B, M) integer; the same array as `query_ids` when causal.
      chunk_size: tokens per chunk, or None for the implementation's own choice.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None = None
    scale: jax.Array | None = None
    causal: bool = True
    normalize: bool = False
    initial_state: State | None = None
    return_state: bool = False
    query_ids: jax.Array | None = None
    key_ids: jax.Array | None = None
    chunk_size: int | None = None

    @property
    def accumulator(self) -> jnp.dtype:
        """Dtype of sums and states: float64 for float64 inputs, float32 otherwise."""
        return accumulator(self.q.dtype)

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """(B, H, D, E)."""
        return (self.q.shape[0], self.q.shape[2], self.q.shape[3], self.v.shape[3])


# `scale` and arrays are leaves, so Arguments can cross jit, grad and vmap; what remains is static.
jax.tree_util.register_dataclass(
    Arguments,
    data_fields=["q", "k", "v", "log_decay", "scale", "initial_state", "query_ids", "key_ids"],
    meta_fields=["causal", "normalize", "return_state", "chunk_size"],
)


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Dtype in which inputs of `dtype` are accumulated."""
    return at_least_float32(dtype)


def divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Rows (..., E) over denominators (...,): n / (d + sign(d) ε), ε = 1e-12.

    A denominator of exactly 0 gives zeros and zero gradients: that row attends to nothing.
    """
    empty = denominator == 0
    safe = jnp.where(empty, 1, denominator + jnp.where(denominator < 0, -EPSILON, EPSILON))
    return jnp.where(empty[..., None], 0, numerator / safe[..., None])


def with_ones(v: jax.Array) -> jax.Array:
    """Values with a column of ones, (..., E + 1), so that Σk is the last column of the state."""
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)


def pack_state(state: State) -> jax.Array:
    """One array of a state: itself, or (B, H, D, E + 1) of a `NormalizedState`."""
    if isinstance(state, NormalizedState):
        return jnp.concatenate([state.kv, state.k[..., None]], axis=-1)
    return state


def unpack_state(state: jax.Array, normalize: bool) -> State:
    """Inverse of `pack_state`."""
    return NormalizedState(kv=state[..., :-1], k=state[..., -1]) if normalize else state


def finish(y: jax.Array, scale: jax.Array | None, normalize: bool, dtype: jnp.dtype) -> jax.Array:
    """Scales raw outputs, divides by their last column if `normalize`, and casts to `dtype`."""
    y = y if scale is None else y.astype(scale.dtype) * scale
    return (divide(y[..., :-1], y[..., -1]) if normalize else y).astype(dtype)


def run_starts(ids: jax.Array) -> jax.Array:
    """Where the state is emptied: True at each token whose id differs from the one before, (B, N) bool."""
    return jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))


def decay_floor(dtype: jnp.dtype) -> float:
    """exp(-floor) is exactly 0 in `dtype`."""
    return 1024.0 if jnp.dtype(dtype) == jnp.float64 else 128.0


def decay_of_segments(args: Arguments, ids: jax.Array) -> jax.Array:
    """Log decays of a causal call, with one of weight exactly 0 at each token whose id differs from the one before.

    Args:
      args: arguments with any log decay.
      ids: segment of each token, (B, N).

    Returns:
      (B, N, H), or (B, N, H, D) for a decay per channel.
    """
    dtype, heads = args.accumulator, args.q.shape[2]
    decay = jnp.zeros((1, 1, heads), dtype) if args.log_decay is None else args.log_decay
    starts = run_starts(ids)[:, :, None]
    starts = starts[..., None] if decay.ndim == 4 else starts
    return jnp.where(starts, -decay_floor(dtype), decay).astype(dtype)


def normal_log_decay(log_decay: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    """Log decays in `dtype`; values above 0 are read as 0, so that no exponent is positive.

    Those whose decay is 0 are brought to the least that is needed for it: -inf times no step would be NaN.
    """
    log_decay, floor = jnp.asarray(log_decay).astype(dtype), decay_floor(dtype)
    log_decay = jnp.where(log_decay < -floor, -floor, log_decay)
    return jnp.where(log_decay > 0, 0, log_decay)  # not minimum: its gradient is halved at 0


# ---- what the caller gave


def init_state(
    batch: int,
    heads: int,
    key_size: int,
    value_size: int,
    *,
    normalize: bool = False,
    dtype: DTypeLike = jnp.float32,
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


def normal_form(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    causal: bool = True,
    normalize: bool = False,
    initial_state: ArrayLike | NormalizedState | None = None,
    return_state: bool = False,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    chunk_size: int | None = None,
) -> Arguments:
    """Checks what `check_tensors` leaves, and brings all to one form; the arguments are those of `linear_attention`.

    Raises:
      ValueError: for shapes, options or combinations that have no meaning; the message names the argument.
      TypeError: for dtypes that are not allowed.
    """
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


def check_tensors(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = True) -> None:
    """Checks shapes and dtypes of q (B, N, H, D), k (B, M, G, D) and v (B, M, G, E), whose D may yet be mapped.

    Raises:
      ValueError: for shapes that have no meaning; the message names the argument.
      TypeError: for dtypes that are not allowed.
    """
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
        queries_ids, keys_ids = segments(*segment_ids)
    else:
        queries_ids = keys_ids = segments(segment_ids)[0]
        if queries != keys:
            raise ValueError(f"segment_ids must be a pair (B, N), (B, M) when N != M, got N={queries[1]}, M={keys[1]}")
    for ids, shape, what in ((queries_ids, queries, "queries"), (keys_ids, keys, "keys")):
        if ids.shape != shape:
            raise ValueError(f"segment_ids of the {what} must have shape {shape}, got {ids.shape}")
    return queries_ids, keys_ids


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
