"""Who sees whom by the roles of tokens: rules on labels, and the labels of spans.

A `View` gives each token a label, an integer that stands for its role, and a rule that combines what its order and its
labels allow. With roles IMAGE, QUESTION and so on as labels, on top of the causal rule:

    Causal() | SameLabel()                                          the tokens of a span see each other
    Causal() | LabelPairs((None, PREFIX))                           a prefix that every token sees whole
    Causal() | LabelPairs((IMAGE, QUESTION))                        an image sees the question that follows it
    Causal() & ~LabelPairs((ANSWER, FIRST_VIDEO))                   an answer does not see the first video
    LabelPairs((IMAGE, IMAGE)) & SlidingWindow(0, 0) | ...          tokens of an image see themselves alone
    (Causal() & ~BothLabelled()) | LabelAtMost()                    rings: the inner see the outer, of lower label
    Causal() & ~RolePairs((ANSWER, VIDEO | FIRST))                  the same where a token has several roles, bits

The rules hold in decoding too, where the labels of tokens in the cache are kept.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.nn.masking import LabelRule, SameLabel

__all__ = ["BothLabelled", "LabelAtMost", "LabelPairs", "LabelRule", "RolePairs", "SameLabel", "span_labels"]


@dataclasses.dataclass(frozen=True, init=False)
class LabelPairs(LabelRule):
    """Pairs of a query's label and a key's; None stands for any label, and for none.

    Attributes:
      pairs: the pairs (query, key).
    """

    pairs: tuple[tuple[int | None, int | None], ...]

    def __init__(self, *pairs: tuple[int | None, int | None]):
        if not pairs or any(len(pair) != 2 or any(one is not None and one < 0 for one in pair) for pair in pairs):
            raise ValueError(f"pairs must be (query, key) of labels of at least 0, or None for any, got {pairs}")
        object.__setattr__(self, "pairs", tuple(tuple(pair) for pair in pairs))

    def on_labels(self, q_labels: jax.Array, k_labels: jax.Array) -> jax.Array:
        allowed = jnp.zeros(jnp.broadcast_shapes(q_labels.shape, k_labels.shape), bool)
        for query, key in self.pairs:
            by_query = True if query is None else q_labels == query
            by_key = True if key is None else k_labels == key
            allowed |= by_query & by_key
        return allowed


@dataclasses.dataclass(frozen=True, init=False)
class RolePairs(LabelRule):
    """Pairs of tokens with certain roles, where a label is a set of them: the sum of powers of two, 0 for none.

    Attributes:
      pairs: of what the query's label must hold and what the key's must, each a role or a sum of roles.
    """

    pairs: tuple[tuple[int, int], ...]

    def __init__(self, *pairs: tuple[int, int]):
        if not pairs or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
            raise ValueError(f"pairs must be (query, key) of sets of roles, of at least 0, got {pairs}")
        object.__setattr__(self, "pairs", tuple((int(query), int(key)) for query, key in pairs))

    def on_labels(self, q_labels: jax.Array, k_labels: jax.Array) -> jax.Array:
        allowed = jnp.zeros(jnp.broadcast_shapes(q_labels.shape, k_labels.shape), bool)
        for query, key in self.pairs:
            # A negative label is none, though all its bits are set.
            by_query = (q_labels >= 0) & ((q_labels & query) == query)
            allowed |= by_query & (k_labels >= 0) & ((k_labels & key) == key)
        return allowed


@dataclasses.dataclass(frozen=True)
class BothLabelled(LabelRule):
    """Pairs of tokens that both have a label."""

    def on_labels(self, q_labels: jax.Array, k_labels: jax.Array) -> jax.Array:
        return (q_labels >= 0) & (k_labels >= 0)


@dataclasses.dataclass(frozen=True)
class LabelAtMost(LabelRule):
    """Pairs of tokens that both have a label, the key's at most that of the query: labels are an order of their own."""

    def on_labels(self, q_labels: jax.Array, k_labels: jax.Array) -> jax.Array:
        return (k_labels >= 0) & (k_labels <= q_labels)


def span_labels(num_tokens: int, spans: ArrayLike, labels: Sequence[int] | None = None) -> jax.Array:
    """Labels of tokens by the spans they stand in.

    Args:
      num_tokens: N.
      spans: integers `(B, S, 2)`: start, and end behind the last token, of S spans in each example; a span whose end is
        not behind its start is empty. Where spans overlap, the last one counts.
      labels: of the spans; 0..S-1 when None.

    Returns:
      `(B, N)` int32, -1 in no span.

    Raises:
      ValueError: for spans of another shape, or another number of labels.
    """
    spans = jnp.asarray(spans)
    if spans.ndim != 3 or spans.shape[2] != 2:
        raise ValueError(f"spans must be (B, S, 2), got shape {spans.shape}")
    labels = range(spans.shape[1]) if labels is None else labels
    if len(labels) != spans.shape[1]:
        raise ValueError(f"labels must be {spans.shape[1]}, one for each span, got {len(labels)}")
    place = jnp.arange(num_tokens)
    of = jnp.full((spans.shape[0], num_tokens), -1, jnp.int32)
    for span, label in enumerate(labels):
        inside = (place >= spans[:, span, :1]) & (place < spans[:, span, 1:])
        of = jnp.where(inside, label, of)
    return of
