"""Attention of queries to blocks of keys that each of them chose, at a cost that follows the pairs (query, block).

Queries that stand together may choose different blocks, and a tile of them would visit the union of their choices, up
to all blocks. So the pairs are sorted by their blocks, each with a copy of its query: a tile of pairs visits one block
or a few in a row, and P pairs in tiles of n visit at most P / n + S tiles of the S blocks, whatever was chosen. Each
pair gives a partial result with the log of its sum, and those of a query are joined:

    y_i = Σ_p exp(lse_p) y_p / Σ_p exp(lse_p)          over the pairs p of query i

MoBA's authors (arXiv:2502.13189) so gather queries for a call per block; this is one call of the op.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.nn.head_parallel import head_parallel
from pallas_kernels.array_masks import ArrayMask
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.dtypes import at_least_float32


def block_means(keys: ArrayLike, blocks: ArrayLike, num_blocks: int) -> tuple[jax.Array, jax.Array]:
    """Means of the keys of each block, without gradients.

    Args:
      keys: `(B, M, G, D)`.
      blocks: the block of each key, integers `(B|1, M)`; a negative one is none.
      num_blocks: S.

    Returns:
      Means `(B, S, G, D)` in float32 (or wider), zeros for a block without keys, and numbers of keys `(B, S)` int32.
    """
    keys = jax.lax.stop_gradient(jnp.asarray(keys))
    batch, tokens = keys.shape[:2]
    blocks = jnp.broadcast_to(jnp.asarray(blocks, jnp.int32), (batch, tokens))
    blocks = jnp.where(blocks < 0, num_blocks, blocks)
    rows, wide = jnp.arange(batch)[:, None], keys.astype(at_least_float32(keys.dtype))
    sums = jnp.zeros((batch, num_blocks, *keys.shape[2:]), wide.dtype).at[rows, blocks].add(wide, mode="drop")
    counts = jnp.zeros((batch, num_blocks), jnp.int32).at[rows, blocks].add(1, mode="drop")
    return sums / jnp.maximum(counts, 1).astype(sums.dtype)[..., None, None], counts


def block_scores(q: ArrayLike, means: jax.Array) -> jax.Array:
    """Products of queries `(B, N, H, D)` with means of blocks `(B, S, G, D)`: `(B, H, N, S)`, without gradients.

    In float32 (or wider) whatever the dtype of the queries: scores that are close must not be rounded together.
    """
    q = jax.lax.stop_gradient(jnp.asarray(q))
    batch, tokens, heads, size = q.shape
    wide, groups = at_least_float32(q.dtype), means.shape[2]
    q = q.astype(wide).reshape(batch, tokens, groups, heads // groups, size)
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bngrd,bsgd->bgrns", q, means.astype(wide), precision=highest)
    return scores.reshape(batch, heads, tokens, means.shape[1])


def largest(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest entries of the last axis and their places: `jax.lax.top_k`, which XLA does not cut over devices."""
    place = jnp.argsort(-scores, axis=-1, stable=True)[..., :count]
    return jnp.take_along_axis(scores, place, axis=-1), place


def attend_pairs(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    chosen: jax.Array,
    blocks: jax.Array,
    *,
    until: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """Softmax attention of each query over the keys of the blocks that it is paired with.

    Args:
      q: queries `(B, N, H, D)`.
      k: keys `(B, M, G, D)`.
      v: values `(B, M, G, E)`.
      rows: the query of each pair, `(B, H, P)` integers.
      chosen: its block, `(B, H, P)` integers from 0, once for a query; a block that no key has makes it no pair.
      blocks: the block of each key, `(B|1, M)` integers, best ascending; negative for none.
      until: index of the last key that a query may see, `(B|1, N)`; None for no such bound.
      **options: scale and implementation of `block_sparse_attention`.

    Returns:
      `(B, N, H, E)` in the dtype of `q`; zeros for a query that sees nothing.
    """
    batch, keys = k.shape[:2]
    # Tiles are judged by least and largest blocks: a key of none is between those of the blocks around it.
    marks = jnp.where(blocks < 0, 2 * jax.lax.cummax(blocks, axis=1) + 1, 2 * blocks)
    until = jnp.full((1, q.shape[1]), keys - 1, jnp.int32) if until is None else until
    rows, chosen, marks, until = (each.astype(jnp.int32) for each in (rows, chosen, marks, until))
    whole = jnp.broadcast_to(marks, (batch, keys)), jnp.broadcast_to(until, (batch, q.shape[1]))
    axes = ("BNHD", "BMGD", "BMGE", "BHP", "BHP", "BM", "BN")
    return head_parallel(functools.partial(_attend, options), axes, "BNHE", q, k, v, rows, chosen, *whole)


def _attend(
    options: dict[str, Any],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    chosen: jax.Array,
    marks: jax.Array,
    until: jax.Array,
) -> jax.Array:
    order = jnp.argsort(chosen, axis=-1, stable=True)
    rows, chosen = (jnp.take_along_axis(each, order, axis=-1) for each in (rows, chosen))
    bound = jnp.take_along_axis(jnp.broadcast_to(until[:, None], (*rows.shape[:2], until.shape[-1])), rows, axis=-1)
    copies = jnp.take_along_axis(q, jnp.swapaxes(rows, 1, 2)[..., None], axis=1)
    mask = ArrayMask(_in_block, (2 * chosen, bound), (marks[:, None],))
    y, lse = block_sparse_attention(copies, k, v, mask=mask, return_lse=True, **options)
    join = jax.vmap(jax.vmap(_joined, (None, 0, 1, 1), 1), (None, 0, 0, 0))
    return join(q.shape[1], rows, y, lse)


def _in_block(i: Any, j: Any, chosen: Any, until: Any, block: Any) -> Any:
    return (chosen == block) & (j <= until)


def _joined(count: int, rows: jax.Array, y: jax.Array, lse: jax.Array) -> jax.Array:
    """The results `(P, E)` and sums `(P,)` of pairs, as those of `count` queries, `(N, E)`."""
    top = jnp.full(count, -jnp.inf, lse.dtype).at[rows].max(jax.lax.stop_gradient(lse))
    share = jnp.exp(lse - jnp.where(top == -jnp.inf, 0, top)[rows])
    total = jnp.zeros(count, lse.dtype).at[rows].add(share)
    sums = jnp.zeros((count, y.shape[-1]), lse.dtype).at[rows].add(share[:, None] * y.astype(lse.dtype))
    return (sums / jnp.where(total == 0, 1, total)[:, None]).astype(y.dtype)


def paired_table(rows: jax.Array, chosen: jax.Array, num_rows: int, num_blocks: int) -> jax.Array:
    """The pairs `(B, H, P)` as booleans `(B, H, N, S)`, to look at."""
    table = jnp.zeros((*rows.shape[:2], num_rows, num_blocks), bool)
    batch, heads = jnp.arange(rows.shape[0])[:, None, None], jnp.arange(rows.shape[1])[:, None]
    return table.at[batch, heads, rows, chosen].set(True, mode="drop")


def keys_of(table: jax.Array, blocks: jax.Array) -> jax.Array:
    """Of chosen blocks `(B, H, N, S)` and the block of each key `(B|1, M)`, the chosen keys `(B, H, N, M)`."""
    count = table.shape[-1]
    inside = (blocks >= 0) & (blocks < count)
    at = jnp.where(inside, blocks, 0)[:, None, None]
    seen = jnp.take_along_axis(table, jnp.broadcast_to(at, (*table.shape[:3], at.shape[-1])), axis=-1)
    return seen & inside[:, None, None]
