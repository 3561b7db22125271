"""Extreme tokens (Guo et al., 2024, arXiv:2410.13835): how much the first token is a sink, drained, and massive.

Of each head, with weights A, scores S, values v and the layer's stream h, of queries n > 0 that are dormant or active
(in bigram-backcopy: behind no trigger, or behind one), and <s> the token at 0:

    sink    mean over dormant n, and over active n, of A_n0           near 1 and near 0 in an active-dormant head
    back    mean over active n of A_n,n-1                             what a head that copies attends to
    drain   |v_0| / mean over n > 0 of |v_n|                          values near 0: the sink adds nothing
    peak    |h_0| / mean over n > 0 of |h_n|
    gap     mean over dormant, and active, n > 1 of  S_n0 - mean over 0 < m < n of S_nm

Whether a head is dormant is seen from the loss without it: `HeadScaling` with the factor 0.

Reference: GuoTianYu2000/Active-Dormant-Attention, `probe_utils`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.attention.dense.relu_attention import PAPER
from attnlab.registry import Cost, Example, Kind, Source, register
from pallas_kernels.dtypes import at_least_float32


class ExtremeTokens(NamedTuple):
    """Measures of one layer, float32; means over nothing are 0.

    Attributes:
      dormant_sink: `(B, H)`.
      active_sink: `(B, H)`.
      active_back: `(B, H)`.
      drain: `(B, G)`.
      peak: `(B,)`.
      dormant_gap: `(B, H)`; zeros without scores, as is the next.
      active_gap: `(B, H)`.
    """

    dormant_sink: jax.Array
    active_sink: jax.Array
    active_back: jax.Array
    drain: jax.Array
    peak: jax.Array
    dormant_gap: jax.Array
    active_gap: jax.Array


def _example() -> Example:
    keys = jax.random.split(jax.random.key(0), 4)
    scores = jax.random.normal(keys[0], (2, 3, 6, 6))
    weights = jax.nn.softmax(jnp.where(jnp.tri(6, dtype=bool), scores, -jnp.inf))
    values, stream = jax.random.normal(keys[1], (2, 6, 3, 4)), jax.random.normal(keys[2], (2, 6, 8))
    active = jax.random.bernoulli(keys[3], 0.5, (2, 6))
    more = {"active": active, "scores": scores}
    return Example(extreme_tokens, (weights, values, stream), more, batched=(0, 1, 2, *more), differentiable=(0, 1, 2))


@register(
    "active_dormant.extreme_tokens",
    kind=Kind.ANALYSIS,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="GuoTianYu2000/Active-Dormant-Attention",
    cost=Cost("O(H·N²)", "O(H·N²)"),
    summary="attention sink, value drain and residual peak of the first token, for dormant and active queries",
    small=_example,
)
def extreme_tokens(
    attention: ArrayLike,
    values: ArrayLike,
    stream: ArrayLike,
    *,
    active: ArrayLike | None = None,
    scores: ArrayLike | None = None,
    renormalize: bool = False,
    start: int = 1,
) -> ExtremeTokens:
    """Measures of one layer.

    Args:
      attention: causal weights `(B, H, N, N)`, as recorded at the point `attention`.
      values: `(B, N, G, E)`, of the point `qkv`.
      stream: `(B, N, C)`, of the point `stream`.
      active: `(B, N)` boolean, which queries are active; none when None.
      scores: `(B, H, N, N)` of the point `scores`, for the gaps.
      renormalize: whether rows are divided by their sums first, for weights that do not sum to 1.
      start: queries in front of this place do not count; at least 1.

    Raises:
      ValueError: for shapes that do not fit.
    """
    weights, values, stream = (_wide(array) for array in (attention, values, stream))
    if weights.ndim != 4 or weights.shape[2] != weights.shape[3]:
        raise ValueError(f"attention must be (B, H, N, N), got shape {weights.shape}")
    batch, _, tokens, _ = weights.shape
    for name, array, rank in (("values", values, 4), ("stream", stream, 3)):
        if array.ndim != rank or array.shape[:2] != (batch, tokens):
            raise ValueError(f"{name} must have the batch and tokens {(batch, tokens)}, got shape {array.shape}")
    if start < 1:
        raise ValueError(f"start must be at least 1, got {start}")
    active = jnp.zeros((batch, tokens), bool) if active is None else jnp.asarray(active)
    if active.shape != (batch, tokens) or active.dtype != jnp.bool_:
        raise ValueError(f"active must be boolean {(batch, tokens)}, got {active.dtype} {active.shape}")
    if renormalize:
        total = weights.sum(-1, keepdims=True)
        weights = weights / jnp.where(total > 0, total, 1)
    counted = jnp.arange(tokens) >= start
    dormant, active = counted & ~active, counted & active
    back = jnp.pad(jnp.diagonal(weights, -1, axis1=-2, axis2=-1), ((0, 0), (0, 0), (1, 0)))
    gaps = [jnp.zeros(weights.shape[:2], weights.dtype)] * 2
    if scores is not None:
        scores = _wide(scores)
        between = (jnp.arange(tokens) < jnp.arange(tokens)[:, None]) & (jnp.arange(tokens) > 0)
        others = jnp.where(between, scores, 0).sum(-1) / jnp.maximum(between.sum(-1), 1)
        gap = scores[..., 0] - others
        gaps = [_mean(gap, rows & (jnp.arange(tokens) > 1)) for rows in (dormant, active)]
    return ExtremeTokens(
        _mean(weights[..., 0], dormant),
        _mean(weights[..., 0], active),
        _mean(back, active),
        _against_others(values),
        _against_others(stream),
        gaps[0],
        gaps[1],
    )


def _wide(x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(at_least_float32(x.dtype))


def _mean(rows: jax.Array, counted: jax.Array) -> jax.Array:
    """Of `(B, H, N)` over the rows that count, `(B, N)`."""
    counted = counted[:, None]
    return jnp.where(counted, rows, 0).sum(-1) / jnp.maximum(counted.sum(-1), 1)


def _against_others(x: jax.Array) -> jax.Array:
    """|x_0| over the mean of the other |x_n|: `(B, N, ...)` along the last axis."""
    squared = jnp.square(x).sum(-1)
    size = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)
    others = size[:, 1:].sum(1) / max(size.shape[1] - 1, 1)
    return size[:, 0] / jnp.where(others > 0, others, 1)
