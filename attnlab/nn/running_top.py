"""The largest values of each prefix of a sequence, by blocks: which tokens they are, and how queries know their own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RunningTop(NamedTuple):
    """Candidates of each of T blocks of b tokens: up to w of the tokens before it, and its own.

    Query i of a block keeps the candidates j with `ranks_j ≤ last_i` that stand in its segment and not behind it.

    Attributes:
      slots: of candidates, `(B, T, G, w + b)` int32, the block's own tokens last and in order; -1 for none.
      ranks: of candidates by value, `(B, T, G, w + b)` int32; beyond all `last` for none.
      last: of queries, `(B, T, G, b)` int32.
    """

    slots: jax.Array
    ranks: jax.Array
    last: jax.Array


def newest_top(values: jax.Array, count: int) -> jax.Array:
    """Indices `(…, count)` of the largest values `(…, M)`, of equal ones the later; -1 where values are -inf."""
    length = values.shape[-1]
    top, index = jax.lax.top_k(jax.lax.stop_gradient(values)[..., ::-1], count)
    return jnp.where(top > -jnp.inf, length - 1 - index, -1).astype(jnp.int32)


def running_top(
    values: jax.Array,
    slots: jax.Array,
    before: jax.Array,
    before_values: jax.Array,
    *,
    window: int,
    block: int,
    real: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> RunningTop:
    """Candidates for the w largest values among all tokens up to each one, in O(N·(w + b)).

    A token that enters the w largest drives one out: of the tokens before a block only the w largest in front of it can
    be kept inside. Of equal values the later ones are kept. No gradient flows through the choice.

    Args:
      values: of N tokens, `(B, N, G)`.
      slots: where they are stored, `(B, N)`, ascending; of a token that does not exist anything.
      before: slots of the w largest before the first token, `(B, G, w)`, -1 for none; or of all, where they are fewer.
      before_values: their values.
      window: w.
      block: b.
      real: `(B, N)` boolean, which tokens exist; all when None.
      segment_ids: of runs, `(B, N)`; only with nothing before. A prefix begins with its segment.
    """
    values, before_values = jax.lax.stop_gradient((values, before_values))
    (batch, count, groups), blocks = values.shape, -(-values.shape[1] // block)
    real = jnp.ones((batch, count), bool) if real is None else real
    ids = jnp.zeros((batch, count), jnp.int32) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    slots = jnp.asarray(slots, jnp.int32)

    def cut(x: jax.Array, value: int | bool) -> jax.Array:
        """`(B, N, …)` to `(T, B, b, …)`."""
        widths = [(0, 0), (0, blocks * block - count), *((0, 0),) * (x.ndim - 2)]
        x = jnp.pad(x, widths, constant_values=value)
        return jnp.moveaxis(x.reshape(batch, blocks, block, *x.shape[2:]), 1, 0)

    last_id = jnp.minimum((jnp.arange(blocks) + 1) * block, count) - 1
    given = cut(values, 0), cut(slots, 0), cut(real, False), cut(ids, 0), jnp.moveaxis(ids[:, last_id], 1, 0)

    def step(carry, inputs):
        held, held_values, held_ids = carry
        value, slot, there, of, final = inputs

        def spread(x: jax.Array) -> jax.Array:
            return jnp.broadcast_to(x[:, None], (batch, groups, block))

        at = jnp.concatenate([held, spread(jnp.where(there, slot, -1))], -1)
        value = jnp.concatenate([held_values, jnp.moveaxis(value, 1, 2)], -1)
        of_all = jnp.concatenate([held_ids, spread(of)], -1)
        order = jnp.lexsort((-at, jnp.where(at < 0, jnp.inf, -value)))
        at_sorted, value_sorted, id_sorted = (jnp.take_along_axis(x, order, -1) for x in (at, value, of_all))
        exists = at_sorted >= 0
        seen = exists[:, :, None] & (id_sorted[:, :, None] == of[:, None, :, None])
        # In front of the query: what was held is, and of the block's own tokens those up to it.
        own = order - held.shape[-1]
        seen &= own[:, :, None] <= jnp.arange(block)[:, None]
        last = (jnp.cumsum(seen, -1, dtype=jnp.int32) < window).sum(-1, dtype=jnp.int32)
        ranks = jnp.where(at < 0, jnp.iinfo(jnp.int32).max, jnp.argsort(order, -1).astype(jnp.int32))
        stays = exists & (id_sorted == final[:, None, None])
        first = jnp.argsort(~stays, axis=-1, stable=True)[..., : held.shape[-1]]
        new = tuple(jnp.take_along_axis(x, first, -1) for x in (at_sorted, value_sorted, id_sorted, stays))
        return (jnp.where(new[3], new[0], -1), *new[1:3]), (at, ranks, last)

    start = before, before_values, jnp.zeros(before.shape, jnp.int32)
    _, found = jax.lax.scan(step, start, given)
    return RunningTop(*(jnp.moveaxis(x, 0, 1) for x in found))
