"""Attention diversification loss (ADL, Guo et al., ICCV 2023, arXiv:2303.11126): rows of attention made different.

Of each layer's attention A, with τ = threshold / M for M keys:

    Ā = mean of A over heads;   μ = mean of Ā over queries;   entries of both that are at most τ become zero
    s = mean over queries i of cos(μ, Ā_i);   loss = Σ_l s_l / (L + 1e-6)

Tokens that attend overly to few others have rows that are all alike; s near 1 says so. μ is that of the map before
entries become zero. Lengths below 1e-8 count as that.

Reference for names and defaults: guoyongcs/TAPADL, TAPADL_FAN/main.py.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.mixers.tap import PAPER
from attnlab.registry import Cost, Example, Kind, Source, register
from pallas_kernels.dtypes import at_least_float32

LEAST = 1e-8


def mean_similarity(attention: ArrayLike, *, threshold: float = 2.0) -> jax.Array:
    """s of each example, `(B,)` in float32 (or wider).

    Args:
      attention: weights `(B, H, N, M)`, each row summing to 1.
      threshold: entries up to this many times 1 / M count as zero.
    """
    attention = jnp.asarray(attention)
    rows = attention.astype(at_least_float32(attention.dtype)).mean(1)
    mean = rows.mean(1, keepdims=True)
    least = threshold / attention.shape[-1]
    rows, mean = (jnp.where(part > least, part, 0) for part in (rows, mean))
    # max inside the root: at zero the length itself has no gradient.
    lengths = [jnp.sqrt(jnp.maximum(jnp.square(part).sum(-1), LEAST**2)) for part in (rows, mean)]
    return ((rows * mean).sum(-1) / (lengths[0] * lengths[1])).mean(1)


def _example() -> Example:
    keys = jax.random.split(jax.random.key(0), 2)
    maps = [jax.nn.softmax(2 * jax.random.normal(key, (3, 2, 6, 6))) for key in keys]
    return Example(attention_diversification, (maps,), {"threshold": 1.0})


@register(
    "tap_adl.diversification",
    kind=Kind.OBJECTIVE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="guoyongcs/TAPADL",
    cost=Cost(time="O(H·N·M)", memory="O(N·M)"),
    summary="how alike the rows of attention are to their mean, over layers",
    small=_example,
)
def attention_diversification(attentions: Sequence[ArrayLike], *, threshold: float = 2.0) -> jax.Array:
    """The loss of each example, `(B,)` float32.

    Args:
      attentions: of each layer, `(B, H, N, M)`.
      threshold: entries up to this many times 1 / M count as zero.

    Raises:
      ValueError: without layers.
    """
    if not attentions:
        raise ValueError("attentions must be those of at least one layer, got none")
    similarities = [mean_similarity(attention, threshold=threshold) for attention in attentions]
    return (sum(similarities[1:], similarities[0]) / (len(similarities) + 1e-6)).astype(jnp.float32)
