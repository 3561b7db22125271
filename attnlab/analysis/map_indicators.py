"""How concentrated attention maps are, how much heads differ, and how much of them stays near (arXiv:2510.11602).

Of the map A (N x M) of each head, over the rows n that count, of which there are R:

    concentration   √(Σ_nm A_nm²), the Frobenius norm; at most √R
    peak            mean over n of max_m A_nm
    local focus     mean over n ≥ d of A_n,n-d, for d = 0, 1, ..., offsets - 1
    diversity       mean over the pairs (n, m) that are allowed of the standard deviation over heads (of the population)

Sink mass and entropy are among `attention_maps`. `largest_score` is the greatest score before the softmax.

After the text of "Deconstructing Attention", whose code is not public. That the local focus is a mean over rows which
have a token d places before them, and the population's deviation, are our reading.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32


class MapIndicators(NamedTuple):
    """Indicators of a layer's maps, float32.

    Attributes:
      concentration: `(B, H)`.
      peak: `(B, H)`.
      local_focus: `(B, H, offsets)`.
      diversity: `(B,)`.
    """

    concentration: jax.Array
    peak: jax.Array
    local_focus: jax.Array
    diversity: jax.Array


def _example() -> Example:
    weights = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 3, 6, 6)))
    return Example(map_indicators, (weights,), {"mask": jnp.arange(6) < jnp.asarray([[6], [4]])}, batched=(0, "mask"))


@register(
    "deconstructed_attention.indicators",
    kind=Kind.ANALYSIS,
    paper=Paper(
        "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
        "Xue et al.",
        2025,
        "2510.11602",
        number=156,
    ),
    source=Source.PAPER_TEXT,
    cost=Cost("O(H·N·M)", "O(H·N·M)"),
    summary="concentration, peak and local focus of each head's map, and how much the heads differ",
    small=_example,
)
def map_indicators(
    attention: ArrayLike, *, mask: ArrayLike | None = None, offsets: int = 4, causal: bool = True
) -> MapIndicators:
    """Indicators of attention maps.

    Args:
      attention: weights `(B, H, N, M)`, at least 0, as recorded at the point `attention`.
      mask: `(B, N)` boolean, which rows count; all when None.
      offsets: number of distances d of the local focus, from 0.
      causal: whether only keys m ≤ n are allowed, which the diversity averages over.

    Raises:
      ValueError: for shapes that do not fit.
    """
    weights = jnp.asarray(attention)
    if weights.ndim != 4:
        raise ValueError(f"attention must be (B, H, N, M), got shape {weights.shape}")
    if offsets < 1:
        raise ValueError(f"offsets must be at least 1, got {offsets}")
    weights = weights.astype(at_least_float32(weights.dtype))
    batch, _, queries, keys = weights.shape
    counts = jnp.ones((batch, queries), bool)
    if mask is not None:
        counts = jnp.asarray(mask)
        if counts.shape != (batch, queries) or counts.dtype != jnp.bool_:
            raise ValueError(f"mask must be boolean {(batch, queries)}, got {counts.dtype} {counts.shape}")
    rows = counts[:, None]
    used = jnp.where(rows[..., None], weights, 0)
    energy = jnp.square(used).sum((-2, -1))
    near = []
    for offset in range(offsets):
        diagonal = jnp.diagonal(used, -offset, axis1=-2, axis2=-1)
        behind = counts[:, offset : offset + diagonal.shape[-1]]
        near.append(diagonal.sum(-1) / jnp.maximum(behind.sum(-1), 1)[:, None])
    allowed = rows[..., None] & (jnp.tri(queries, keys, dtype=bool) if causal else jnp.ones((queries, keys), bool))
    variance = jnp.var(weights, axis=1, keepdims=True)
    spread = jnp.where(allowed & (variance > 0), _root(variance), 0)
    return MapIndicators(
        _root(energy),
        used.max(-1).sum(-1) / jnp.maximum(rows.sum(-1), 1),
        jnp.stack(near, -1),
        spread.sum((1, 2, 3)) / jnp.maximum(allowed.sum((1, 2, 3)), 1),
    )


def largest_score(scores: ArrayLike, allowed: ArrayLike | None = None) -> jax.Array:
    """The greatest score of each head, `(B, H)` in float32; -inf where nothing is allowed.

    Args:
      scores: `(B, H, N, M)` as recorded at the point `scores`, in front of masks.
      allowed: boolean, broadcastable to them, which pairs count; all when None.
    """
    scores = jnp.asarray(scores)
    scores = scores.astype(at_least_float32(scores.dtype))
    scores = scores if allowed is None else jnp.where(allowed, scores, -jnp.inf)
    return scores.max((-2, -1))


def _root(x: jax.Array) -> jax.Array:
    """Square root with the slope 0 at 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)
