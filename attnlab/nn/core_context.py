"""Attention to core tokens of groups that are far and to tokens that are near.

The equations are those of `attnlab.attention.sparse.core_context_attention`.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnlab.nn.masking import masked_softmax
from attnlab.nn.places import back, front, places_among, rows
from attnlab.nn.softmax import attention_scores
from pallas_kernels.array_masks import ArrayMask
from pallas_kernels.block_masks import Staircase
from pallas_kernels.block_sparse_attention import block_sparse_attention, merge_attention
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.integers import runs, segments
from pallas_kernels.masks import EMPTY, FULL, PARTIAL, Causal, Index, Interval, Mask

PoolingName = Literal["cca", "mean", "max"]
NOWHERE = np.iinfo(np.int32).max
"""The number of a core that is not there, beyond all windows."""


@dataclasses.dataclass(frozen=True)
class CoresBefore(Mask):
    """Cores in front of a query's window: (c + 1)·step ≤ q - (width - 1); the keys are numbers of cores."""

    step: int
    width: int

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        return (k_idx + 1) * self.step <= q_idx - (self.width - 1)

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        none = (k.lo + 1) * self.step > q.hi - (self.width - 1)
        every = (k.hi + 1) * self.step <= q.lo - (self.width - 1)
        return np.where(none, EMPTY, np.where(every, FULL, PARTIAL)).astype(np.int8)


class Cores(NamedTuple):
    """Core tokens, and of what they are made.

    Attributes:
      keys: `(B, P, H|G, D)`.
      values: `(B, P, H|G, E)`.
      shares: a, `(B, H|G, P, g)` in float32; None for "max".
    """

    keys: jax.Array
    values: jax.Array
    shares: jax.Array | None


def pool_groups(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, pooling: PoolingName = "cca", scale: float | None = None
) -> Cores:
    """Core tokens of groups.

    Args:
      q: queries of the groups' last tokens, `(B, P, H, D)`.
      k: keys of their tokens, `(B, P, g, G, D)`.
      v: values, `(B, P, g, G, E)`.
      pooling: "cca" by the query, "mean", or "max" of each channel.
      scale: of the scores; D^-1/2 when None.
    """
    q, k, v = (jnp.asarray(a) for a in (q, k, v))
    if pooling == "max":
        return Cores(k.max(2), v.max(2), None)
    wide = at_least_float32(q.dtype)
    batch, count, size, groups = k.shape[:4]
    if pooling == "mean":
        shares = jnp.full((batch, groups, count, size), 1 / size, wide)
        return Cores(k.astype(wide).mean(2).astype(k.dtype), v.astype(wide).mean(2).astype(v.dtype), shares)
    q = q.reshape(batch, count, groups, -1, q.shape[-1])
    scores = jnp.einsum("bpgrd,bptgd->bgrpt", q, k, preferred_element_type=wide)
    shares = jax.nn.softmax(scores * (q.shape[-1] ** -0.5 if scale is None else scale), axis=-1)

    def sums(x: jax.Array) -> jax.Array:
        y = jnp.einsum("bgrpt,bptgd->bpgrd", shares.astype(x.dtype), x, preferred_element_type=wide)
        return y.reshape(batch, count, -1, x.shape[-1]).astype(x.dtype)

    return Cores(sums(k), sums(v), shares.reshape(batch, -1, count, size))


class Parts(NamedTuple):
    """What queries attend to: cores `(B, P, …)` and tokens `(B, M, …)`, either with the mask that leaves what is seen.

    `ids` are segments of queries, cores and tokens, if there are any.
    """

    cores: Cores | None
    core_mask: Mask
    k: jax.Array
    v: jax.Array
    mask: Mask
    ids: tuple[jax.Array, jax.Array, jax.Array] | None = None


def _core_seen(i: Any, j: Any, before: Any, number: Any) -> Any:
    return number < before


def _token_seen(i: Any, j: Any, first: Any, last: Any, place: Any) -> Any:
    return (place >= first) & (place <= last)


def by_places(
    place: jax.Array, numbers: jax.Array, places: jax.Array, group_size: int, window: int
) -> tuple[Mask, Mask]:
    """Masks by the places of queries `(B, N)`, of cores, as numbers `(B, P)`, and of tokens `(B, M)`, -1 for none."""
    before = jnp.maximum((place - (window - 1)) // group_size, 0)
    cores = ArrayMask(_core_seen, (before[:, None],), (numbers[:, None],))
    return cores, ArrayMask(_token_seen, ((before * group_size)[:, None], place[:, None]), (places[:, None],))


def core_context_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    group_size: int = 16,
    window: int = 1024,
    pooling: PoolingName = "cca",
    mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention to core tokens of what is far and to the tokens that are near.

    Args:
      q: queries `(B, N, H, D)`, rotated where there are rotary positions.
      k: keys `(B, N, G, D)`, H a multiple of G.
      v: values `(B, N, G, E)`.
      group_size: tokens g of a group.
      window: tokens w that are seen as they are, at least.
      pooling: how a group becomes a core token: "cca", "mean" or "max".
      mask: `(B, N)` boolean, which tokens exist; the others are as if they were not there, and their rows are zeros.
      segment_ids: integers `(B, N)`; groups and windows start anew with each run of equal ids.
      scale: of all scores; D^-1/2 when None.
      implementation: of `block_sparse_attention`; the best one here when None.

    Returns:
      `(B, N, H, E)` in the dtype of `q`.

    Raises:
      ValueError: for options out of range, or shapes that do not fit.
    """
    check_options(group_size, window, pooling)
    q, k, v = (jnp.asarray(a) for a in (q, k, v))
    given = _attended(q, k, v, group_size, window, pooling, mask, segment_ids, scale)
    y = attend(given.q, given.parts, scale, implementation)
    return y if given.order is None else back(y, given.order, jnp.asarray(mask))


def core_context_weights(q: ArrayLike, k: ArrayLike, **options: Any) -> jax.Array:
    """The weights `(B, H, N, N)` of `core_context_attention` on tokens, those of cores shared out; O(N²) memory.

    Args:
      q: queries.
      k: keys.
      **options: of `core_context_attention`.

    Raises:
      ValueError: for `pooling="max"`, which is no sum of tokens.
    """
    group_size, window, pooling = (options.get(name, usual) for name, usual in _USUAL.items())
    if pooling == "max":
        raise ValueError("pooling='max' has no weights: its cores are no sums of tokens")
    q, k = jnp.asarray(q), jnp.asarray(k)
    mask, scale = options.get("mask"), options.get("scale")
    given = _attended(q, k, k, group_size, window, pooling, mask, options.get("segment_ids"), scale)
    weights = _dense(given, scale)
    if given.order is None:
        return weights
    turned = jnp.moveaxis(weights, 1, 3)  # (B, N, M, H)
    for _ in range(2):
        turned = jnp.swapaxes(back(turned, given.order, jnp.asarray(mask)), 1, 2)
    return jnp.moveaxis(turned, 3, 1)


_USUAL: dict[str, Any] = {"group_size": 16, "window": 1024, "pooling": "cca"}


def check_options(group_size: int, window: int, pooling: str) -> None:
    """Raises `ValueError` for options out of range."""
    if group_size < 1 or window < 1:
        raise ValueError(f"group_size and window must be at least 1, got {group_size} and {window}")
    if pooling not in get_args(PoolingName):
        raise ValueError(f"pooling must be one of {', '.join(get_args(PoolingName))}, got {pooling!r}")


class _Given(NamedTuple):
    """Queries and what they attend to; tokens of the groups `(B|1, P, g)`; the order of tokens, if they were moved."""

    q: jax.Array
    parts: Parts
    members: jax.Array
    order: jax.Array | None


def _attended(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    group_size: int,
    window: int,
    pooling: PoolingName,
    mask: ArrayLike | None,
    segment_ids: ArrayLike | None,
    scale: float | None,
) -> _Given:
    batch, count = q.shape[:2]
    pool = functools.partial(pool_groups, pooling=pooling, scale=scale)
    if mask is None and segment_ids is None:
        groups = max((count - window) // group_size, 0)
        used = groups * group_size
        raw = Causal() & Staircase(group_size, window - 1)
        members = jnp.arange(used).reshape(1, groups, group_size)
        if not groups:
            return _Given(q, Parts(None, raw, k, v, Causal()), members, None)
        shape = batch, groups, group_size
        parts = (a[:, :used].reshape(*shape, *a.shape[2:]) for a in (k, v))
        cores = pool(q[:, group_size - 1 : used : group_size], *parts)
        return _Given(q, Parts(cores, CoresBefore(group_size, window), k, v, raw), members, None)
    real = jnp.ones((batch, count), bool) if mask is None else jnp.asarray(mask)
    if real.shape != (batch, count) or real.dtype != jnp.bool_:
        raise ValueError(f"mask must be boolean (B, N) = {(batch, count)}, got {real.dtype} {real.shape}")
    ids = jnp.zeros((batch, count), jnp.int32) if segment_ids is None else runs(segments(segment_ids)[0])
    order = None
    if mask is not None:
        order = front(real)
        q, k, v, real, ids = (rows(a, order) for a in (q, k, v, real, ids))
        ids = jnp.where(real, ids, -1)
    place = places_among(real, ids)
    ends = real & (place % group_size == group_size - 1)
    last = front(ends, max(count // group_size, 1))
    members = jnp.maximum(last[..., None] - jnp.arange(group_size)[::-1], 0)
    cores = pool(rows(q, last), rows(k, members), rows(v, members))
    numbers = jnp.where(rows(ends, last), rows(place, last) // group_size, NOWHERE)
    masks = by_places(place, numbers, jnp.where(real, place, -1), group_size, window)
    parts = Parts(cores, masks[0], k, v, masks[1], (ids, rows(ids, last), ids))
    return _Given(q, parts, members, order)


def attend(q: jax.Array, parts: Parts, scale: float | None, implementation: str | None) -> jax.Array:
    """Queries `(B, N, H, D)` to cores and tokens: two calls, joined by their sums of exponentials."""

    def one(k: jax.Array, v: jax.Array, mask: Mask, ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        pair = None if parts.ids is None else (parts.ids[0], ids)
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        given: dict[str, Any] = {"mask": mask, "segment_ids": pair, "implementation": implementation}
        y, lse = block_sparse_attention(q, k, v, scale=scale, return_lse=True, **given)
        return y.astype(lse.dtype), lse

    _, of_cores, of_tokens = (None,) * 3 if parts.ids is None else parts.ids
    found = [one(parts.k, parts.v, parts.mask, of_tokens)]
    if parts.cores is not None:
        found.append(one(parts.cores.keys, parts.cores.values, parts.core_mask, of_cores))
    return merge_attention(found)[0].astype(q.dtype)


def _dense(given: _Given, scale: float | None) -> jax.Array:
    """Weights `(B, H, N, M)` on tokens."""
    q, parts = given.q, given.parts
    scores, seen = [], []
    pairs = [(parts.k, parts.mask, None if parts.ids is None else parts.ids[2])]
    if parts.cores is not None:
        pairs.append((parts.cores.keys, parts.core_mask, None if parts.ids is None else parts.ids[1]))
    for k, mask, ids in pairs:
        scores.append(attention_scores(q, k, scale=scale))
        allowed = _allowed(mask, q.shape[1], k.shape[1])
        if ids is not None and parts.ids is not None:
            allowed = allowed & (parts.ids[0][:, None, :, None] == ids[:, None, None, :])
        seen.append(jnp.broadcast_to(allowed, scores[-1].shape))
    weights = masked_softmax(jnp.concatenate(scores, -1), jnp.concatenate(seen, -1))
    weights, far = jnp.split(weights, [parts.k.shape[1]], axis=-1)
    if parts.cores is None or parts.cores.shares is None:
        return weights
    shares = jnp.repeat(parts.cores.shares, weights.shape[1] // parts.cores.shares.shape[1], axis=1)
    spread = (far[..., None] * shares[:, :, None]).reshape(*far.shape[:3], -1)
    members = jnp.broadcast_to(given.members.reshape(given.members.shape[0], -1), (q.shape[0], spread.shape[-1]))
    return jax.vmap(lambda one, more, at: one.at[..., at].add(more))(weights, spread, members)


def _allowed(mask: Mask, queries: int, keys: int) -> jax.Array:
    """`(B|1, 1, N, M)`."""
    i, j = jnp.arange(queries)[:, None], jnp.arange(keys)
    if isinstance(mask, ArrayMask):
        return mask.rule(i, j, *(a[..., None] for a in mask.queries), *(a[:, :, None] for a in mask.keys))
    return jnp.asarray(mask(i, j))[None, None]
