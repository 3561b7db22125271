"""Position-invariant inference, PINE (Wang et al., 2024, arXiv:2407.01100), code at wzq016/PINE.

A prompt is a prefix, K documents whose order should not matter, and a suffix. In a causal model with rotary positions
the documents see each other, and for every head each token places them by how much it attends to them, the nearest the
most important. With l_j tokens of document j, L of all, P of the prefix, and scores q·k / √D without rotary positions:

    base positions: prefix 0, 1, …; every document the last places P + L - l_j, …, P + L - 1 of their region;
                    suffix, and what is generated, P + L, …
    importance of j for document i: Σ_{t ∈ i} mean_{m ∈ j} softmax_m over the tokens of all but i; i is the first
                    for a token behind them: mean_{m ∈ j} softmax_m over the tokens of all
    shift of j:     the tokens of all documents that are more important; equal ones in their order
    y = softmax of q·k over v, with k of document j rotated at its base position - shift;
        the prefix sees what is before, a document the prefix and all documents, itself causally, others what is before

A rotary product depends on differences alone, so keys are rotated once, at their base positions, and the query once for
each document, at its position + shift: K + 1 calls of the op, each over one document's keys, joined by their sums, and
importance by sums of exponentials over the keys of each document. Nothing is as large as N × M or rotated keys for each
query. The cache holds keys that are not rotated.

Permuted documents give permuted results, and the suffix the same, to rounding. Documents of equal importance keep their
order, which shows. The prompt up to the end of its documents comes in one prefill.

    labels = document_labels(prefix=12, documents=(40, 31, 55))
    model = with_core(model, lambda core: PositionInvariantCore.of(core, labels, num_documents=3))
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, UnsupportedArgument, View, record
from attnlab.nn.cache import KVCache, slots_of
from attnlab.nn.dense_mixer import Core, Heads, HeadSizes
from attnlab.nn.masking import masked_softmax
from attnlab.nn.plain_core import check_causal, plain_softmax
from attnlab.nn.rotary import Rotary
from attnlab.nn.softmax import attention_scores
from attnlab.points import Edits, Setting
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.array_masks import ArrayMask
from pallas_kernels.block_sparse_attention import block_sparse_attention, key_group_lse, merge_attention


def document_labels(prefix: int, documents: Sequence[int]) -> np.ndarray:
    """Which document each token of a prompt belongs to, `(1, P + L)` int32; -1 for the prefix.

    Args:
      prefix: P, tokens before the documents.
      documents: tokens of each of them, in order.
    """
    return np.concatenate([np.full(prefix, -1), np.repeat(np.arange(len(documents)), documents)]).astype(np.int32)[None]


class Places(NamedTuple):
    """Where N tokens stand, in the order of all tokens.

    Attributes:
      order: place of each, `(B, N)` int32; -1 for none.
      label: its document, `(B, N)`; -1 for the prefix and what is behind the documents, -2 for a token that is not.
      at: base position, `(B, N)`.
      behind: whether it is behind the documents, `(B, N)`.
    """

    order: jax.Array
    label: jax.Array
    at: jax.Array
    behind: jax.Array


def places_of(labels: jax.Array, order: jax.Array, num_documents: int) -> tuple[Places, jax.Array]:
    """Where tokens of these orders `(B, N)` stand, and the lengths `(B, K)` of the documents.

    Args:
      labels: `(B, L)` int32, those of the first L tokens; documents follow on each other.
      order: -1 for a token that is not there.
      num_documents: K.
    """
    labels = jnp.broadcast_to(labels, (order.shape[0], labels.shape[1]))
    each = labels[..., None] == jnp.arange(num_documents)
    lengths, start = each.sum(1, dtype=jnp.int32), jnp.argmax(each, axis=1).astype(jnp.int32)
    end = jnp.max(jnp.where(labels >= 0, jnp.arange(1, labels.shape[1] + 1), 0), axis=1).astype(jnp.int32)
    known = (order >= 0) & (order < labels.shape[1])
    label = jnp.take_along_axis(labels, jnp.clip(order, 0, labels.shape[1] - 1), axis=1)
    label = jnp.where(order < 0, -2, jnp.where(known, label, -1))
    own = jnp.maximum(label, 0)
    own_length, own_start = (jnp.take_along_axis(x, own, axis=1) for x in (lengths, start))
    at = jnp.where(label >= 0, end[:, None] - own_length + order - own_start, jnp.maximum(order, 0))
    return Places(order, label, at, order >= end[:, None]), lengths


def document_shifts(
    q: jax.Array, k: jax.Array, queries: Places, keys: Places, lengths: jax.Array, scale: float | None
) -> jax.Array:
    """How much nearer than its base position each document is to each query, `(B, H, N, K)` int32.

    Args:
      q: queries `(B, N, H, D)`, not rotated.
      k: keys `(B, M, G, D)`, not rotated.
      queries: where the queries are.
      keys: where the keys are.
      lengths: of documents, `(B, K)`.
      scale: of the scores; D^-1/2 when None.
    """
    q, k, count = jax.lax.stop_gradient(q), jax.lax.stop_gradient(k), lengths.shape[1]
    groups = jnp.where(keys.label < 0, count, keys.label)
    lse = key_group_lse(q, k.astype(q.dtype), groups, num_groups=count, scale=scale)
    documents = jnp.arange(count)
    own = (queries.label[..., None] == documents)[:, None]
    # Among the documents that are not its own; of one that is behind them, among all.
    weights = masked_softmax(jnp.where(own, -jnp.inf, lse))
    means = weights / jnp.maximum(lengths, 1).astype(weights.dtype)[:, None, None]
    inside = own.astype(means.dtype)[:, 0]
    highest = jax.lax.Precision.HIGHEST
    summed = jnp.einsum("bni,bhnj->bhij", inside, means, precision=highest)
    of_document = jnp.einsum("bni,bhij->bhnj", inside, summed, precision=highest)
    importance = jnp.where(queries.behind[:, None, :, None], means, of_document)
    importance = jnp.where(own, jnp.inf, importance)
    order = jnp.argsort(-importance, axis=-1, stable=True)
    sizes = jnp.take_along_axis(jnp.broadcast_to(lengths[:, None, None], order.shape), order, axis=-1)
    before = jnp.cumsum(sizes, axis=-1, dtype=jnp.int32) - sizes
    return jnp.take_along_axis(before, jnp.argsort(order, axis=-1), axis=-1)


def position_invariant_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    labels: ArrayLike,
    *,
    num_documents: int,
    rotary: Rotary | None = None,
    order: ArrayLike | None = None,
    key_order: ArrayLike | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention in which documents have no order; see the module docstring.

    Args:
      q: queries, (B, N, H, D), not rotated.
      k: keys, (B, M, G, D), not rotated, G a divisor of H.
      v: values, (B, M, G, E).
      labels: the document of each of the first L tokens, integers (B|1, L); -1 for none. A document's tokens follow on
        each other, and so do the documents, all K of them.
      num_documents: K.
      rotary: rotary positions; none when None, and then the suffix sees no order at all.
      order: place of each query among all tokens, integers (B, N), -1 for none; 0..N-1 when None.
      key_order: that of each key, (B, M); that of the queries when None.
      scale: of the scores; D^-1/2 when None.
      implementation: of `block_sparse_attention`.

    Returns:
      (B, N, H, E) in the dtype of `q`.
    """
    q, k, v, labels = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(labels, jnp.int32)
    order = _whole_order(q) if order is None else jnp.asarray(order, jnp.int32)
    key_order = order if key_order is None else jnp.asarray(key_order, jnp.int32)
    queries, lengths = places_of(labels, order, num_documents)
    keys, _ = places_of(labels, key_order, num_documents)
    shifts = document_shifts(q, k, queries, keys, lengths, scale)
    k = k if rotary is None else rotary(k, keys.at)
    stored = k.dtype

    def one(inputs: tuple[jax.Array, jax.Array]) -> Any:
        """Over the keys of one document, or of none."""
        wanted, shift = inputs
        turned = _turned(q, queries.at, shift, rotary).astype(stored)
        limit, group = _limit(queries, keys, wanted)[:, None], jnp.broadcast_to(wanted, order.shape)[:, None]
        mask = ArrayMask(_in_document, (group, limit), (keys.label[:, None], keys.order[:, None]))
        options: dict[str, Any] = {"scale": scale, "implementation": implementation}
        y, lse = block_sparse_attention(turned, k, v, mask=mask, return_lse=True, **options)
        return y.astype(lse.dtype), lse

    ys, lses = jax.lax.map(one, (jnp.arange(-1, num_documents), _with_none(shifts)))
    return merge_attention(list(zip(ys, lses, strict=True)))[0].astype(q.dtype)


def _whole_order(x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])


def _with_none(shifts: jax.Array) -> jax.Array:
    """Shifts of no document, 0, and of each: `(K + 1, B, H, N)`."""
    return jnp.pad(jnp.moveaxis(shifts, -1, 0), ((1, 0), (0, 0), (0, 0), (0, 0)))


def _turned(q: jax.Array, at: jax.Array, shift: jax.Array, rotary: Rotary | None) -> jax.Array:
    """Queries `(B, N, H, D)` rotated at their positions `(B, N)` and a shift `(B, H, N)`."""
    if rotary is None:
        return q
    places = at[:, None] + shift
    turn = jax.vmap(lambda one, where: rotary(one[:, :, None], where)[:, :, 0], in_axes=(2, 1), out_axes=2)
    return turn(q, places)


def _limit(queries: Places, keys: Places, wanted: jax.Array) -> jax.Array:
    """The last place that each query sees among the keys of a document, or of none, `(B, N)`; -1 for nothing."""
    last = keys.order.max(-1, keepdims=True)
    of_other = jnp.where(queries.label >= 0, last, jnp.where(queries.behind, queries.order, -1))
    return jnp.where((queries.label == wanted) | (wanted < 0), queries.order, of_other)


def _in_document(i: Any, j: Any, group: Any, limit: Any, label: Any, place: Any) -> Any:
    return (label == group) & (place <= limit)


def _example() -> Example:
    from attnlab.models.language_model import LanguageModel
    from attnlab.nn.dense_mixer import with_core

    model = LanguageModel(11, features=8, depth=2, num_heads=2, rngs=nnx.Rngs(0))
    labels = document_labels(1, (2, 3))
    invariant = with_core(model, lambda core: PositionInvariantCore.of(core, labels, num_documents=2))
    return Example(invariant, (jnp.arange(14).reshape(2, 7) % 11,), differentiable=())


@register(
    "pine",
    kind=Kind.INTERVENTION,
    paper=Paper(
        "Eliminating Position Bias of Language Models: A Mechanistic Approach",
        "Wang et al.",
        2024,
        arxiv="2407.01100",
        number=104,
    ),
    source=Source.AUTHORS_CODE,
    repository="wzq016/PINE",
    cost=Cost("O(N·M·H·(D+E) + N·K·log K·H)", "O(K·N·H·(D+E))", state="M·G·(D+E)"),
    kernel="block_sparse_attention",
    summary="documents of a prompt see each other and stand nearer the more they are attended to, in no order",
    small=_example,
)
class PositionInvariantCore(Core):
    """That attention between the projections of a causal mixer of sequences; nothing is edited in it.

    Args:
      labels: the document of each of the first L tokens of a prompt, (B, L) or (1, L) integers, -1 for none, see
        `document_labels`; padding in front of a prompt does not count.
      num_documents: K.
      rotary: rotary positions, or theta for `Rotary(theta)`; none when None.
      scale: of the scores; D^-1/2 when None.

    Raises:
      ValueError: for labels of another rank or dtype, or no documents.
    """

    def __init__(
        self,
        labels: ArrayLike,
        *,
        num_documents: int,
        rotary: Rotary | float | None = None,
        scale: float | None = None,
    ):
        labels = jnp.asarray(labels)
        if labels.ndim != 2 or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(f"labels must be integers (B, L), got {labels.dtype}{list(labels.shape)}")
        if num_documents < 1:
            raise ValueError(f"num_documents must be at least 1, got {num_documents}")
        self.labels, self.num_documents = Setting(labels.astype(jnp.int32)), num_documents
        self.rotary, self.scale = Rotary.of(rotary), scale
        self.permutation_equivariant = False

    @classmethod
    def of(cls, core: Core, labels: ArrayLike, **options: Any) -> Self:
        """In the place of a plain softmax, with its rotary positions and scale.

        Raises:
          ValueError: for a core that is more than a softmax of products.
        """
        return cls(labels, **(plain_softmax(core) | options))

    def check(self, sizes: HeadSizes, layout: Layout) -> None:
        if layout is not Layout.SEQUENCE:
            raise ValueError(f"documents stand in a sequence, the layout is {layout}")
        if self.rotary is not None:
            self.rotary.check(sizes.key_size, 1)

    def init_cache(
        self,
        sizes: HeadSizes,
        batch_size: int,
        max_length: int,
        dtype: Any,
        *,
        context: Heads | None = None,
        context_mask: ArrayLike | None = None,
    ) -> Any:
        if context is not None:
            raise UnsupportedArgument("context: documents stand in the sequence itself")
        return KVCache.create(batch_size, max_length, *sizes, dtype=dtype)

    def __call__(
        self,
        heads: Heads,
        view: View,
        cache: Any = None,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
        owner: nnx.Module | None = None,
    ) -> tuple[jax.Array, Any]:
        q, k, v, options, cache = self._placed(heads, view, cache)
        y = position_invariant_attention(
            q, k, v, self.labels[...], num_documents=self.num_documents, rotary=self.rotary, scale=self.scale, **options
        )
        if owner is not None:
            record(owner, "attention", lambda: self._weights(q, k, **options))
        return y.astype(heads.v.dtype), cache

    def attention(self, heads: Heads, view: View) -> jax.Array:
        q, k, _, options, _ = self._placed(heads, view, None)
        return self._weights(q, k, **options)

    def _placed(self, heads: Heads, view: View, cache: Any) -> tuple[Any, ...]:
        """Queries, keys and values as they are, their orders, and the new cache."""
        check_causal(self, view)
        q, k, v = heads[:3]
        real = jnp.ones(q.shape[:2], bool) if view.mask is None else view.mask
        if cache is None:
            place = slots_of(real, jnp.zeros(q.shape[0], jnp.int32))
            return q, k, v, {"order": place, "key_order": jnp.where(real, place, -1)}, None
        place, cache = cache.order(q.shape[1], real), cache.append(k, v, real)
        slots = jnp.arange(cache.max_length, dtype=jnp.int32)
        stored = jnp.where(slots < cache.length[:, None], slots, -1)
        return q, cache.keys, cache.values, {"order": place, "key_order": stored}, cache

    def _weights(self, q: jax.Array, k: jax.Array, order: jax.Array, key_order: jax.Array) -> jax.Array:
        """(B, H, N, M), to look at."""
        queries, lengths = places_of(self.labels[...], order, self.num_documents)
        keys, _ = places_of(self.labels[...], key_order, self.num_documents)
        shifts = _with_none(document_shifts(q, k, queries, keys, lengths, self.scale))
        k = k if self.rotary is None else self.rotary(k, keys.at)
        scores, seen = jnp.asarray(-jnp.inf, jnp.float32), jnp.asarray(False)
        for document, shift in zip(range(-1, self.num_documents), shifts, strict=True):
            turned = _turned(q, queries.at, shift, self.rotary).astype(k.dtype)
            of_document = (keys.label == document)[:, None, None]
            limit = _limit(queries, keys, jnp.asarray(document))[:, None, :, None]
            scores = jnp.where(of_document, attention_scores(turned, k, scale=self.scale), scores)
            seen |= of_document & (keys.order[:, None, None] <= limit)
        return masked_softmax(scores, seen)
