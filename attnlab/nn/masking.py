"""The kinds of masks that a call may bring, as one boolean array; shared by all mechanisms with dense scores.

Everywhere: True means that the query may attend to the key. None means that nothing is masked.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.contract import View
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.integers import runs, segments
from pallas_kernels.masks import And, Mask, Not, Or

SegmentIds = ArrayLike | tuple[ArrayLike, ArrayLike]


def full_mask(mask: ArrayLike) -> jax.Array:
    """A key mask `(B, M)` or a full mask `(B|1, H|1, N|1, M|1)` as a full one.

    Raises:
      ValueError: for another rank, or values that are not booleans.
    """
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise ValueError(f"mask must be boolean, True where attention is allowed, got {mask.dtype}")
    if mask.ndim not in (2, 4):
        raise ValueError(f"mask must be (B, M) or (B|1, H|1, N, M), got shape {mask.shape}")
    return mask[:, None, None, :] if mask.ndim == 2 else mask


def existing_keys(mask: ArrayLike | None) -> jax.Array | None:
    """Which keys exist, `(B|1, M)`: those that any query of any head may see. None if all do.

    Args:
      mask: a key mask `(B, M)` or a full mask `(B|1, H|1, N|1, M)`.
    """
    return None if mask is None else jnp.any(full_mask(mask), axis=(1, 2))


def both(*masks: jax.Array | None) -> jax.Array | None:
    """Logical and of the masks that are not None; None if all are."""
    combined = None
    for mask in masks:
        if mask is not None:
            combined = mask if combined is None else combined & mask
    return combined


class LabelRule(Mask):
    """Base of rules on the labels of query and key, which a `View` brings, not on indices; `allowed_by` evaluates them.

    A subclass is a frozen dataclass that defines `on_labels`. More of them are in `attnlab.nn.visibility`.
    """

    def __call__(self, q_idx: Any, k_idx: Any) -> Any:
        raise ValueError(f"{type(self).__name__} looks at labels: give them in a View, with q_labels")

    def on_labels(self, q_labels: jax.Array, k_labels: jax.Array) -> jax.Array:
        """Booleans of the shape that the labels broadcast to; a negative label is none."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SameLabel(LabelRule):
    """Pairs of tokens with one label of at least 0: `Causal() | SameLabel()` opens such spans to be seen both ways."""

    def on_labels(self, q_labels: jax.Array, k_labels: jax.Array) -> jax.Array:
        return (q_labels == k_labels) & (q_labels >= 0)


def allowed_by(
    rule: Mask, q_idx: ArrayLike, k_idx: ArrayLike, q_labels: ArrayLike | None = None, k_labels: ArrayLike | None = None
) -> jax.Array:
    """What a rule on indices and labels allows; all arrays broadcast against each other.

    Raises:
      ValueError: if the rule looks at labels and there are none.
    """
    match rule:
        case LabelRule():
            if q_labels is None or k_labels is None:
                name = type(rule).__name__
                raise ValueError(f"the rule {name} needs labels: give the View q_labels, and k_labels with a context")
            return rule.on_labels(jnp.asarray(q_labels), jnp.asarray(k_labels))
        case And(first, second):
            parts = (allowed_by(part, q_idx, k_idx, q_labels, k_labels) for part in (first, second))
            return next(parts) & next(parts)
        case Or(first, second):
            parts = (allowed_by(part, q_idx, k_idx, q_labels, k_labels) for part in (first, second))
            return next(parts) | next(parts)
        case Not(part):
            return ~allowed_by(part, q_idx, k_idx, q_labels, k_labels)
    return jnp.asarray(rule(q_idx, k_idx))


def visible_keys(view: View) -> jax.Array | None:
    """All that a complete view says of who sees whom, in one mask.

    Returns:
      Boolean `(B|1, H|1, N|1, M)`, or None if every query sees every key.
    """
    given = None if view.mask is None else full_mask(view.mask)
    same = by_rule = None
    if view.segment_ids is not None:
        q_ids, k_ids = segment_pair(view.segment_ids)
        same = q_ids[:, None, :, None] == k_ids[:, None, None, :]
    if view.rule is not None:
        rows, columns = jnp.atleast_2d(view.q_idx)[:, None, :, None], jnp.atleast_2d(view.k_idx)[:, None, None, :]
        q_labels = None if view.q_labels is None else jnp.atleast_2d(view.q_labels)[:, None, :, None]
        k_labels = None if view.k_labels is None else jnp.atleast_2d(view.k_labels)[:, None, None, :]
        by_rule = allowed_by(view.rule, rows, columns, q_labels, k_labels)
    return both(given, same, by_rule)


def visible_count(visible: ArrayLike | None, num_keys: int) -> jax.Array:
    """How many keys each query sees, float32, broadcastable to `(B, H, N, 1)`.

    Args:
      visible: boolean, broadcastable to `(B, H, N, M)`, what `visible_keys` returns; None if all see all.
      num_keys: M.
    """
    if visible is None:
        return jnp.full((1, 1, 1, 1), num_keys, jnp.float32)
    visible = jnp.asarray(visible)
    return jnp.broadcast_to(visible, (*visible.shape[:-1], num_keys)).sum(-1, keepdims=True, dtype=jnp.float32)


def segment_pair(segment_ids: SegmentIds) -> tuple[jax.Array, jax.Array]:
    """Segment ids of queries `(B, N)` and keys `(B, M)`; one array serves for both."""
    pair = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids, segment_ids)
    if len(pair) != 2 or any(jnp.ndim(ids) != 2 for ids in pair):
        shapes = [jnp.shape(ids) for ids in pair]
        raise ValueError(f"segment_ids must be (B, N), or a pair of (B, N) and (B, M), got shapes {shapes}")
    if pair[0] is pair[1]:
        return segments(pair[0]) * 2
    return segments(*pair)  # type: ignore[return-value]  # as many as were given


def by_run(segment_ids: SegmentIds) -> SegmentIds:
    """Segment ids with one id for each segment: a run of equal ids is one, also where its id comes back later.

    A pair is as it is: there segments are told by their ids alone.
    """
    if isinstance(segment_ids, tuple | list):
        return segment_ids
    return runs(segment_pair(segment_ids)[0])


def segment_orders(segment_ids: SegmentIds) -> tuple[jax.Array, jax.Array]:
    """Place of each query and of each key in its segment, `(B, N)` and `(B, M)` int32, from 0.

    One array is the ids of both: each run of equal ids is a segment. In a pair, segments are told by their ids, and a
    token's place is the number of tokens of its id before it.
    """
    q_ids, k_ids = segment_pair(segment_ids)
    if not isinstance(segment_ids, tuple | list):
        place = segment_positions(q_ids)
        return place, place
    return _places_by_id(q_ids), _places_by_id(k_ids)


def _places_by_id(ids: jax.Array) -> jax.Array:
    """How many equal ids stand before each, `(B, N)` int32."""
    order = jnp.argsort(ids, axis=1, stable=True)
    place = segment_positions(jnp.take_along_axis(ids, order, axis=1))
    return jnp.take_along_axis(place, jnp.argsort(order, axis=1), axis=1)


def segment_positions(segment_ids: ArrayLike) -> jax.Array:
    """Place of each token in its run of equal ids, `(B, N)` int32, from 0."""
    (ids,) = segments(segment_ids)
    index = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    starts = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def index_mask(
    q_idx: ArrayLike, k_idx: ArrayLike, *, causal: bool = False, structural_mask: Mask | None = None
) -> jax.Array | None:
    """What the indices alone decide.

    Args:
      q_idx: `(N,)` or `(B, N)`, places of the queries.
      k_idx: `(M,)` or `(B, M)`, places of the keys.
      causal: query i sees keys j ≤ i.
      structural_mask: a further rule.

    Returns:
      Boolean `(B|1, 1, N, M)`, or None.
    """
    rows, columns = jnp.atleast_2d(q_idx)[:, None, :, None], jnp.atleast_2d(k_idx)[:, None, None, :]
    by_rule = None if structural_mask is None else jnp.asarray(structural_mask(rows, columns))
    return both(columns <= rows if causal else None, by_rule)


def attention_mask(
    num_queries: int,
    num_keys: int,
    *,
    mask: ArrayLike | None = None,
    segment_ids: SegmentIds | None = None,
    structural_mask: Mask | None = None,
    causal: bool = False,
) -> jax.Array | None:
    """All that restricts who sees whom, in one mask.

    With `segment_ids`, the indices of `structural_mask` and `causal` count from the start of each segment, so that a
    packed sequence is treated as it would be alone.

    Args:
      num_queries: N.
      num_keys: M.
      mask: `(B, M)` or `(B|1, H|1, N, M)`.
      segment_ids: `(B, N)`, or a pair `(B, N)`, `(B, M)`.
      structural_mask: a rule on indices.
      causal: query i sees keys j ≤ i, both counted from the start.

    Returns:
      Boolean `(B|1, H|1, N|1, M)`, or None if nothing is masked.
    """
    q_idx, k_idx, same = mask_indices(num_queries, num_keys, segment_ids)
    given = None if mask is None else full_mask(mask)
    return both(given, same, index_mask(q_idx, k_idx, causal=causal, structural_mask=structural_mask))


def mask_indices(
    num_queries: int, num_keys: int, segment_ids: SegmentIds | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Indices of queries and keys, counted within segments if there are any, and the mask of equal segments."""
    if segment_ids is None:
        return jnp.arange(num_queries), jnp.arange(num_keys), None
    segment_ids = by_run(segment_ids)
    q_ids, k_ids = segment_pair(segment_ids)
    if q_ids.shape[1] != num_queries or k_ids.shape[1] != num_keys:
        raise ValueError(
            f"segment_ids must be for {num_queries} queries and {num_keys} keys, got {q_ids.shape} and {k_ids.shape}"
        )
    return *segment_orders(segment_ids), (q_ids[:, None, :, None] == k_ids[:, None, None, :])


def masked_softmax(scores: ArrayLike, mask: ArrayLike | None = None, *, axis: Any = -1) -> jax.Array:
    """Softmax in float32 (or wider) over what the mask allows; a row without any gives zeros and zero gradients.

    Its derivative is written by hand, y ∘ (ds - Σ y ds): derived step by step it would keep and read several arrays
    as large as the scores.

    Args:
      scores: any shape; -inf counts as masked.
      mask: boolean, broadcastable to the scores.
      axis: over which the weights sum to 1; one or several.
    """
    scores = jnp.asarray(scores)
    scores = scores.astype(at_least_float32(scores.dtype))
    axes = tuple(a % scores.ndim for a in (axis if isinstance(axis, Sequence) else (axis,)))
    return _masked_softmax(axes, scores, mask)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _masked_softmax(axes: tuple[int, ...], scores: jax.Array, mask: ArrayLike | None) -> jax.Array:
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    # At least the lowest finite number: a row of -inf would give -inf - -inf.
    top = jnp.max(scores, axis=axes, keepdims=True, initial=jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - top)
    total = weights.sum(axes, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


@_masked_softmax.defjvp
def _masked_softmax_jvp(axes: tuple[int, ...], primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    weights = _masked_softmax(axes, *primals)
    change = weights * tangents[0]
    return weights, change - weights * change.sum(axes, keepdims=True)
