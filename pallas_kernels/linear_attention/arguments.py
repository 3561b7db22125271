"""The normal form of the arguments of linear attention, and the rules that every implementation shares.

`api.linear_attention` checks what the caller gave and brings it to one `Arguments`; implementations read nothing else.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

FLOATS = ("float16", "bfloat16", "float32", "float64")
EPSILON = 1e-12  # added to the magnitude of the denominator, as in Hedgehog (arXiv:2402.04347)

FeatureMap = Callable[[jax.Array], jax.Array]


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
      log_decay: None, (H,), (B, N, H) or (B, N, H, D); values at most 0, in `accumulator`.
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
    return jnp.promote_types(dtype, jnp.float32)


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
    y = y if scale is None else y * scale
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


def in_order_of_ids(causal: Callable[..., jax.Array], args: Arguments, v: jax.Array) -> jax.Array:
    """Non-causal attention where a query reads the keys of its own id, wherever they stand, by a causal sweep.

    Keys and queries are laid out in one sequence sorted by id, keys before queries. There a causal sweep whose state is
    emptied at each new id has summed all keys of an id when it comes to that id's queries.

    Args:
      causal: (q, k, v, ids) of one length -> outputs (B, length, H, ...) of a causal sweep without decay.
      args: arguments with ids.
      v: values to read, (B, M, G, ...).
    """
    n, m = args.q.shape[1], args.k.shape[1]
    ids = jnp.concatenate([args.key_ids, args.query_ids], axis=1)
    order = jnp.argsort(ids, axis=1, stable=True)

    def sort(x, before, after):
        padded = jnp.pad(x, ((0, 0), (before, after), (0, 0), (0, 0)))
        return jnp.take_along_axis(padded, order[:, :, None, None], axis=1)

    q, k, v = sort(args.q, m, 0), sort(args.k, 0, n), sort(v, 0, n)
    y = causal(q, k, v, jnp.take_along_axis(ids, order, axis=1))
    place = jnp.argsort(order, axis=1)[:, m:]
    return jnp.take_along_axis(y, place[:, :, None, None], axis=1)


def normal_log_decay(log_decay: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    """Log decays in `dtype`; values above 0 are read as 0, so that no exponent is positive."""
    log_decay = jnp.asarray(log_decay).astype(dtype)
    return jnp.where(log_decay > 0, 0, log_decay)  # not minimum: its gradient is halved at 0


def apply_feature_map(feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] | None, q: jax.Array, k: jax.Array):
    """Features of q and k: mapped in the accumulator dtype, then rounded to the dtype of the inputs.

    Raises:
      TypeError: if `feature_map` is neither None, a callable nor a pair of callables.
      ValueError: if the map changes anything but the last axis.
    """
    if feature_map is None:
        return q, k
    maps = feature_map if isinstance(feature_map, tuple | list) else (feature_map, feature_map)
    if len(maps) != 2 or not all(callable(f) for f in maps):
        raise TypeError(f"feature_map must be None, a callable, or a pair (map of q, map of k), got {feature_map!r}")
    mapped = []
    for name, f, x in (("q", maps[0], q), ("k", maps[1], k)):
        y = f(x.astype(accumulator(x.dtype)))
        if y.ndim != x.ndim or y.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"feature_map may change the last axis alone, but it took {name} from {x.shape} to {y.shape}"
            )
        mapped.append(y.astype(x.dtype))
    return mapped[0], mapped[1]
