"""What attention maps look like: how much goes to sinks, how spread out it is, and how far it looks.

Of each head, averaged over the rows n that count, with weights A and places p of the tokens:

    sink mass   Σ_{m∈S} A_nm                       S the first tokens (Gu et al., arXiv:2410.10781)
    entropy     -Σ_m A_nm log A_nm                 in nats
    distance    Σ_m A_nm |p_n - p_m| / Σ_m A_nm    in tokens of a sequence; on the grid of an image Euclidean, in
                                                   patches (Dosovitskiy et al., arXiv:2010.11929, appendix D.7)

A row that attends to nothing does not count. Tokens in front of a grid (class tokens, registers) have no place on it:
for the distance their rows do not count, and no weight on them. A sequence's places are 0..N-1, of keys too.

Over a model, layer by layer:

    found = measure(model, batches, each_layer(attention_maps))
    found["entropy"].mean                    # (L, H)
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.nn.positions import grid_positions
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32


class AttentionMaps(NamedTuple):
    """Averages over rows, each `(B, H)` in float32; 0 where no row counts.

    Attributes:
      sink_mass: weight on the sinks.
      entropy: of the rows, in nats.
      distance: from the query to the keys, in tokens or patches.
      rows: how many rows count, but for those in front of a grid.
    """

    sink_mass: jax.Array
    entropy: jax.Array
    distance: jax.Array
    rows: jax.Array


def _example() -> Example:
    weights = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 3, 7, 7)))
    return Example(attention_maps, (weights,), {"grid": (2, 3), "prefix": 1})


@register(
    "attention_maps",
    kind=Kind.ANALYSIS,
    paper=Paper("When Attention Sink Emerges in Language Models: An Empirical View", "Gu et al.", 2025, "2410.10781"),
    source=Source.PAPER_TEXT,
    cost=Cost("O(H·N·M)", "O(H·N·M)"),
    summary="attention on sinks, entropy of attention and its mean distance, for each head",
    small=_example,
)
def attention_maps(
    attention: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    sinks: int = 1,
    grid: tuple[int, ...] | None = None,
    prefix: int = 0,
) -> AttentionMaps:
    """Sink mass, entropy and distance of attention maps.

    Args:
      attention: weights `(B, H, N, M)`, at least 0, as recorded at the point `attention`.
      mask: `(B, N)` boolean, which rows count; all when None.
      sinks: how many of the first keys are sinks.
      grid: lengths of the axes on which the tokens stand, in row-major order; None for a sequence.
      prefix: tokens in front of the grid's.

    Raises:
      ValueError: for shapes that do not fit, or a prefix without a grid.
    """
    weights = jnp.asarray(attention)
    if weights.ndim != 4:
        raise ValueError(f"attention must be (B, H, N, M), got shape {weights.shape}")
    weights = weights.astype(at_least_float32(weights.dtype))
    batch, _, queries, keys = weights.shape
    if grid is None and prefix:
        raise ValueError(f"prefix {prefix} is of tokens in front of a grid; there is none")
    if grid is not None and (queries, keys) != (prefix + math.prod(grid),) * 2:
        raise ValueError(f"prefix {prefix} and grid {grid} are {prefix + math.prod(grid)} tokens, got {weights.shape}")
    if not 0 <= sinks <= keys:
        raise ValueError(f"sinks must be from 0 to the {keys} keys, got {sinks}")
    total = weights.sum(-1)
    counts = total > 0
    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.shape != (batch, queries) or mask.dtype != jnp.bool_:
            raise ValueError(f"mask must be boolean {(batch, queries)}, got {mask.dtype} {mask.shape}")
        counts &= mask[:, None]
    positive = weights > 0
    entropy = -jnp.where(positive, weights * jnp.log(jnp.where(positive, weights, 1)), 0).sum(-1)

    placed = weights[:, :, prefix:, prefix:]
    if grid is None:
        apart = jnp.abs(jnp.arange(queries)[:, None] - jnp.arange(keys)).astype(weights.dtype)
    else:
        at = jnp.asarray(grid_positions(grid)).reshape(-1, len(grid))
        apart = jnp.linalg.norm((at[:, None] - at[None]).astype(weights.dtype), axis=-1)
    on_grid = placed.sum(-1)
    distance = (placed * apart).sum(-1) / jnp.where(on_grid > 0, on_grid, 1)
    return AttentionMaps(
        _average(weights[..., :sinks].sum(-1), counts),
        _average(entropy, counts),
        _average(distance, counts[:, :, prefix:] & (on_grid > 0)),
        counts[:, :, prefix:].sum(-1).astype(weights.dtype),
    )


def _average(values: jax.Array, counts: jax.Array) -> jax.Array:
    return jnp.where(counts, values, 0).sum(-1) / jnp.maximum(counts.sum(-1), 1)
