"""Softmax over blocks of keys that landmarks gate, as `attnlab.attention.sparse.landmark_attention` has it."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnlab.nn.masking import masked_softmax
from attnlab.nn.places import front, places_among, rows
from attnlab.nn.softmax import attention_scores
from pallas_kernels.array_masks import ArrayMask
from pallas_kernels.block_sparse_attention import Indexed, ScoreMod, block_sparse_attention, key_group_lse
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.integers import runs, segments
from pallas_kernels.masks import Causal, Columns, Mask, SlidingWindow

SoftmaxName = Literal["grouped", "plain", "tokens"]
ORDINARY, LANDMARK, MISSING = 0, 1, 2
"""Kinds of keys."""


def check_softmax(softmax: str) -> None:
    """Raises `ValueError` for an unknown name."""
    if softmax not in get_args(SoftmaxName):
        raise ValueError(f"softmax must be one of {', '.join(get_args(SoftmaxName))}, got {softmax!r}")


def _sections(flags: jax.Array) -> jax.Array:
    """How many landmarks stand before each key, `(B, M)` int32."""
    return jnp.cumsum(flags, axis=-1, dtype=jnp.int32) - flags.astype(jnp.int32)


def landmark_grouped_softmax(scores: ArrayLike, is_landmark: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
    """Weights of scores that exist, all at once.

    Args:
      scores: `(B, H, N, M)`, scaled.
      is_landmark: `(B|1, M)` boolean.
      mask: boolean, broadcastable to the scores, True where attention is allowed; causal with N = M when None.

    Returns:
      `(B, H, N, M)` in float32 (or wider); a row sums to 1, less what falls to blocks without tokens, and is zero where
      nothing is seen.

    Raises:
      ValueError: without a mask if there are not as many queries as keys, or if landmarks are not boolean.
    """
    scores = jnp.asarray(scores)
    scores = scores.astype(at_least_float32(scores.dtype))
    queries, keys = scores.shape[2:]
    flags = jnp.asarray(is_landmark)
    if flags.dtype != jnp.bool_ or flags.ndim != 2 or flags.shape[1] != keys or flags.shape[0] not in (1, len(scores)):
        wanted = f"(B, M) = {(len(scores), keys)}"
        raise ValueError(f"is_landmark must be boolean {wanted}, got {flags.dtype} {flags.shape}")
    if mask is None:
        if queries != keys:
            raise ValueError(f"mask is needed where {queries} queries are not the {keys} keys")
        mask = jnp.tri(queries, dtype=bool)
    allowed = jnp.broadcast_to(jnp.asarray(mask), scores.shape)
    flags = jnp.broadcast_to(flags, (len(scores), keys))
    section, flags = _sections(flags), flags[:, None, None]
    at = section[:, None, None]
    own = allowed & (at == jnp.max(jnp.where(allowed, at, -1), axis=-1, keepdims=True))
    earlier = allowed & ~own
    local, gates, inside = own & ~flags, earlier & flags, earlier & ~flags
    outer = masked_softmax(scores, local | gates)

    def per_section(reduce: Any, x: jax.Array) -> jax.Array:
        """`(B, H, N, M)` reduced over the keys of a section, at each key."""

        def one(x: jax.Array, section: jax.Array) -> jax.Array:
            return jnp.moveaxis(reduce(jnp.moveaxis(x, -1, 0), section, num_segments=keys)[section], 0, -1)

        return jax.vmap(one)(x, section)

    masked = jnp.where(inside, scores, -jnp.inf)
    top = per_section(jax.ops.segment_max, jax.lax.stop_gradient(masked))
    powers = jnp.exp(masked - jnp.where(top == -jnp.inf, 0, top))
    total = per_section(jax.ops.segment_sum, powers)
    within = powers / jnp.where(total == 0, 1, total)
    gate = per_section(jax.ops.segment_sum, jnp.where(gates, outer, 0))
    return jnp.where(local, outer, within * gate)


def _until(i: Any, j: Any, index: Any) -> Any:
    return j <= index


def _ordinary(i: Any, j: Any, kind: Any) -> Any:
    return kind == ORDINARY


def _own_landmark(i: Any, j: Any, index: Any, kind: Any) -> Any:
    return (j == index) & (kind == LANDMARK)


def _real(i: Any, j: Any, kind: Any) -> Any:
    return kind < MISSING


def _shifted(score: Any, b: Any, h: Any, i: Any, j: Any, shift: Any) -> Any:
    return score + shift


def landmark_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    landmarks: ArrayLike | int,
    *,
    index: ArrayLike | int = 0,
    mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    softmax: SoftmaxName = "grouped",
    max_landmarks: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal attention whose softmax is grouped by landmarks, without weights in memory.

    Args:
      q: queries `(B, N, H, D)`.
      k: keys `(B, M, G, D)`, H a multiple of G.
      v: values `(B, M, G, E)`.
      landmarks: which keys are landmarks, `(B|1, M)` boolean; or the tokens of a block, the last of which is one.
      index: query i is key i + index; or the key that each query is, integers `(B, N)`, -1 for one before the first.
      mask: `(B, M)` boolean, which keys exist; those that do not are no landmarks either.
      segment_ids: integers `(B, M)`, one for each run, where queries are the keys.
      softmax: "grouped"; or "plain", landmarks being tokens like others, though unseen by themselves; or "tokens",
        without landmarks.
      max_landmarks: most landmarks of a row of the batch, where an array says which they are; as many as keys when
        None. With more of them results are NaN. The table of shifts takes O(N · max_landmarks) memory.
      scale: of the scores; D^-1/2 when None.
      return_lse: also return the log of the sum of exponentials of the outer softmax.
      implementation: of `block_sparse_attention`; the best one here when None.

    Returns:
      `(B, N, H, E)` in the dtype of `q`; with `return_lse` also `(B, N, H)` in float32 (or wider).

    Raises:
      ValueError: for an unknown softmax, or blocks of less than two tokens.
    """
    check_softmax(softmax)
    q, k, v = (jnp.asarray(a) for a in (q, k, v))
    queries, keys, real = q.shape[1], k.shape[1], None if mask is None else jnp.asarray(mask)
    step = int(landmarks) if isinstance(landmarks, int | np.integer) else None
    if step is not None and step < 2:
        raise ValueError(f"landmarks must close blocks of at least 2 tokens, got {landmarks}")
    if segment_ids is not None:
        segment_ids = runs(segments(segment_ids)[0])
    if step is not None and not (real is None and segment_ids is None):
        there = jnp.ones(k.shape[:2], bool) if real is None else real
        landmarks = places_among(there, segment_ids) % step == step - 1
        step, max_landmarks = None, keys // step
    exist: Mask | None = None
    if step is not None:
        places = jnp.arange(keys, dtype=jnp.int32)[None]
        flags, section, count = places % step == step - 1, places // step, keys // step
        closing = jnp.arange(count)[None] * step + step - 1
        every, unlike = Columns(step, step - 1), ~Columns(step, step - 1)
        kind = None
    else:
        flags = jnp.asarray(landmarks) if real is None else jnp.asarray(landmarks) & real
        section, count = _sections(flags), keys if max_landmarks is None else min(max_landmarks, keys)
        closing = front(flags, count)
        kind = jnp.where(flags, LANDMARK, ORDINARY).astype(jnp.int32)
        kind = kind if real is None else jnp.where(real, kind, MISSING)
        unlike: Mask = ArrayMask(_ordinary, keys=(kind[:, None],))
        exist = None if real is None else ArrayMask(_real, keys=(kind[:, None],))
    index = int(index) if isinstance(index, np.integer) else index
    if isinstance(index, int):
        seen: Mask = Causal(index)
        here = jnp.arange(queries)[None] + index
    else:
        here = jnp.asarray(index)
        seen = ArrayMask(_until, (here[:, None],))
    given: dict[str, Any] = {"segment_ids": segment_ids, "scale": scale}
    attend: dict[str, Any] = given | {"return_lse": True, "implementation": implementation}
    if softmax != "grouped" or count == 0:
        rule = exist if softmax == "plain" else unlike
        if softmax == "plain" and kind is None and isinstance(index, int):
            rule = ~(SlidingWindow(-index, index) & every)
        elif softmax == "plain":
            kind = jnp.where(flags, LANDMARK, ORDINARY).astype(jnp.int32) if kind is None else kind
            own = ~ArrayMask(_own_landmark, (here[:, None],), (kind[:, None],))
            rule = own if rule is None else rule & own
        y, lse = block_sparse_attention(q, k, v, mask=seen if rule is None else seen & rule, **attend)
        return (y, lse) if return_lse else y

    ids = jnp.where(flags if real is None else flags | ~real, count, section)
    group_lse = key_group_lse(q, k, ids, num_groups=count, mask=seen, **given)
    gate = attention_scores(q, rows(k, closing), scale=scale)
    batch = max(len(here), len(section))
    own = jnp.take_along_axis(
        jnp.broadcast_to(section, (batch, keys)),
        jnp.broadcast_to(jnp.clip(here, 0, keys - 1), (batch, queries)),
        axis=1,
    )
    number = jnp.arange(count)
    visible = (number < own[..., None]) & (here >= 0)[..., None]
    if step is None:
        visible = visible & (number < flags.sum(-1)[:, None, None])
    if segment_ids is not None:
        ids_of = jnp.asarray(segment_ids)
        visible = visible & (ids_of[:, :, None] == rows(ids_of, closing)[:, None])
    visible = visible[:, None]
    closed = visible & (group_lse > -jnp.inf)
    shift = jnp.where(closed, gate - jnp.where(closed, group_lse, 0), 0)
    # The last column is that of the section behind all landmarks, whose keys are not shifted.
    shift = jnp.pad(shift, [(0, 0), (0, 0), (0, 0), (0, 1)])
    mod = ScoreMod(_shifted, (Indexed(shift, "b h i id[j]", jnp.minimum(ids, count)),))
    y, lse = block_sparse_attention(q, k, v, mask=seen & unlike, score_mod=mod, **attend)
    if step is None:
        y, lse = _with_empty(y, lse, jnp.where(visible & ~closed, gate, -jnp.inf))
        if max_landmarks is not None:
            y = jnp.where((flags.sum(-1) <= max_landmarks)[:, None, None, None], y, jnp.nan)
    return (y, lse) if return_lse else y


def _with_empty(y: jax.Array, lse: jax.Array, gates: jax.Array) -> tuple[jax.Array, jax.Array]:
    """With the weights `(B, H, N, S)`, as scores, of blocks that hold nothing but their landmarks."""
    lost = jnp.moveaxis(_logsumexp(gates), 1, 2)
    there = lost > -jnp.inf
    kept = jax.nn.sigmoid(jnp.where(there, lse - jnp.where(there, lost, 0), jnp.inf))
    total = jnp.where(there, jnp.where(there, lost, 0) + jax.nn.softplus(lse - jnp.where(there, lost, 0)), lse)
    return (y * kept[..., None].astype(y.dtype)).astype(y.dtype), total


def _logsumexp(x: jax.Array) -> jax.Array:
    """Over the last axis; -inf, and no gradient, for what is -inf alone."""
    top = jax.lax.stop_gradient(x.max(-1, keepdims=True))
    total = jnp.exp(x - jnp.where(top == -jnp.inf, 0, top)).sum(-1)
    none = total == 0
    return jnp.where(none, -jnp.inf, top[..., 0] + jnp.log(jnp.where(none, 1, total)))
