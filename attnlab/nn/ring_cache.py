"""Caches that hold less than all tokens: a ring of the newest behind the first ones, and means of blocks of keys."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnlab.nn.cache import check_sizes, slots_of


class Held(NamedTuple):
    """What queries may look at: the tokens of a cache, then new ones.

    Attributes:
      keys: `(B, M, G, D)`.
      values: `(B, M, G, E)`.
      order: `(B, M, G)` int32, place of each key in the order of all tokens; -1 where there is none.
      at: `(B, M, G)` int32, positions.
      visible: `(B, G, N, M)` boolean, what each new token sees when it comes after those before it, one by one.
    """

    keys: jax.Array
    values: jax.Array
    order: jax.Array
    at: jax.Array
    visible: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingCache:
    """Keys and values of the first tokens (sinks) and of the newest ones, as many as each head has room for.

    A head of size s with a sinks keeps the tokens 0..a-1, and the s - a newest of the others, each in the slot of the
    one that it replaces. Sizes and sinks are arrays, so that layers that differ in them can be scanned. As with
    `KVCache`, padding is never stored, and a slot is no position.

    Attributes:
      keys: `(B, S, G, D)`, S the largest size.
      values: `(B, S, G, E)`.
      at: `(B, S, G)` int32, positions of the stored tokens.
      sizes: `(G,)` int32, tokens that a head keeps.
      sinks: `(G,)` int32, how many of them are the first ones.
      length: `(B,)` int32, tokens seen so far.
      next_at: `(B,)` int32, the position after the last token's.
    """

    keys: jax.Array
    values: jax.Array
    at: jax.Array
    sizes: jax.Array
    sinks: jax.Array
    length: jax.Array
    next_at: jax.Array

    @classmethod
    def create(
        cls,
        batch_size: int,
        sizes: int | Sequence[int],
        num_heads: int,
        key_size: int,
        value_size: int,
        *,
        sinks: int | Sequence[int] = 0,
        dtype: Any = None,
    ) -> Self:
        """An empty cache for `num_heads` key heads; float32 when `dtype` is None.

        Args:
          batch_size: B.
          sizes: tokens that a head keeps, one number or one for each head.
          num_heads: G.
          key_size: D.
          value_size: E.
          sinks: how many of them are the first ones; more than the size count as the size.
          dtype: of keys and values.

        Raises:
          ValueError: if a size is below 1, or there are not as many as heads.
        """
        check_sizes(batch_size=batch_size, num_heads=num_heads, key_size=key_size, value_size=value_size)
        of = {}
        for name, given, least in (("sizes", sizes, 1), ("sinks", sinks, 0)):
            array = np.asarray(given, np.int32)
            if array.shape not in ((), (num_heads,)) or (array < least).any():
                raise ValueError(f"{name} must be a number, or {num_heads}, each at least {least}, got {given}")
            of[name] = np.broadcast_to(array, (num_heads,))
        dtype, slots = jnp.float32 if dtype is None else dtype, (batch_size, int(of["sizes"].max()), num_heads)
        return cls(
            jnp.zeros((*slots, key_size), dtype),
            jnp.zeros((*slots, value_size), dtype),
            jnp.zeros(slots, jnp.int32),
            jnp.array(of["sizes"]),
            jnp.array(np.minimum(of["sinks"], of["sizes"])),
            *(jnp.zeros((batch_size,), jnp.int32) for _ in range(2)),
        )

    def order(self) -> jax.Array:
        """Place `(B, S, G)` of each slot's token in the order of all tokens; -1 in a slot that holds none."""
        slot, ring = jnp.arange(self.keys.shape[1])[:, None], jnp.maximum(self.sizes - self.sinks, 1)
        # In the ring, the newest of the tokens that fall into the slot.
        rounds = jnp.maximum(self.length[:, None, None] - 1 - slot, 0) // ring
        token = jnp.where(slot < self.sinks, slot, slot + rounds * ring)
        return jnp.where((slot < self.sizes) & (slot < self.length[:, None, None]), token, -1)

    def look(
        self,
        keys: ArrayLike,
        values: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        at: ArrayLike | None = None,
    ) -> tuple[Held, Self]:
        """What N new tokens look at, and the cache with them.

        Several tokens at once see what they would see one by one: some of the cache's that later ones replace, and some
        of the new ones.

        Args:
          keys: `(B, N, G, D)`.
          values: `(B, N, G, E)`.
          mask: `(B, N)` boolean, False at padding, which is not stored, is not seen, and sees what stands before it.
          at: `(B|1, N)` positions; one after the other when None.

        Raises:
          ValueError: if shapes do not fit.
        """
        keys, values = jnp.asarray(keys), jnp.asarray(values)
        for name, new, old in (("keys", keys, self.keys), ("values", values, self.values)):
            if new.ndim != 4 or (new.shape[0], *new.shape[2:]) != (old.shape[0], *old.shape[2:]):
                raise ValueError(
                    f"{name} must be (B, N, {old.shape[2]}, {old.shape[3]}), B = {old.shape[0]}: {new.shape}"
                )
        shape = keys.shape[:2]
        if mask is not None and jnp.shape(mask) != shape:
            raise ValueError(f"mask must be (B, N) = {shape}, got {jnp.shape(mask)}")
        real = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask, bool)
        place = slots_of(real, self.length)
        at = slots_of(real, self.next_at) if at is None else jnp.broadcast_to(at, shape)

        heads = (*shape, keys.shape[2])
        order = jnp.broadcast_to(jnp.where(real, place, -1)[..., None], heads)
        order = jnp.concatenate([self.order(), order], 1)
        behind = place[:, :, None, None] - order[:, None]
        visible = (behind >= 0) & (order >= 0)[:, None]
        visible &= (order < self.sinks)[:, None] | (behind < self.sizes - self.sinks)
        held = Held(
            jnp.concatenate([self.keys, keys.astype(self.keys.dtype)], 1),
            jnp.concatenate([self.values, values.astype(self.values.dtype)], 1),
            order,
            jnp.concatenate([self.at, jnp.broadcast_to(at[..., None], heads)], 1),
            jnp.moveaxis(visible, -1, 1),
        )
        return held, self._with(keys, values, at, real, place)

    def _with(self, keys: jax.Array, values: jax.Array, at: jax.Array, real: jax.Array, place: jax.Array) -> Self:
        count, token, ring = real.sum(1, dtype=jnp.int32), place[..., None], self.sizes - self.sinks
        in_ring = token >= self.sinks
        # Of several that fall into one slot only the last is written.
        newest = token >= (self.length + count)[:, None, None] - ring
        written = real[..., None] & (~in_ring | newest)
        slot = jnp.where(in_ring, self.sinks + (token - self.sinks) % jnp.maximum(ring, 1), token)
        slot = jnp.where(written, slot, self.keys.shape[1])
        rows, heads = jnp.arange(keys.shape[0])[:, None, None], jnp.arange(keys.shape[2])

        def store(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[rows, slot, heads].set(new.astype(old.dtype), mode="drop")

        last = jnp.max(jnp.where(real, at, -1), axis=1).astype(jnp.int32)
        return dataclasses.replace(
            self,
            keys=store(self.keys, keys),
            values=store(self.values, values),
            at=store(self.at, jnp.broadcast_to(at[..., None], slot.shape)),
            length=self.length + count,
            next_at=jnp.maximum(self.next_at, last + 1),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMeans:
    """Means of the keys of each block of consecutive tokens, beside a `KVCache` that holds the keys themselves.

    Attributes:
      sums: `(B, T, G, D)` in float32, of T blocks.
      length: `(B,)` int32, tokens seen so far.
      block: tokens of a block.
    """

    sums: jax.Array
    length: jax.Array
    block: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(cls, batch_size: int, max_length: int, block: int, num_heads: int, key_size: int) -> Self:
        """Of no tokens, with room for `max_length`.

        Raises:
          ValueError: if a size is below 1.
        """
        check_sizes(batch_size=batch_size, max_length=max_length, block=block, num_heads=num_heads, key_size=key_size)
        sums = jnp.zeros((batch_size, -(-max_length // block), num_heads, key_size), jnp.float32)
        return cls(sums, jnp.zeros((batch_size,), jnp.int32), block)

    def append(self, keys: ArrayLike, mask: ArrayLike | None = None) -> Self:
        """With the keys `(B, N, G, D)` of N more tokens; those that `mask` `(B, N)` says are padding do not count."""
        keys = jnp.asarray(keys)
        real = jnp.ones(keys.shape[:2], bool) if mask is None else jnp.asarray(mask, bool)
        place = jnp.where(real, slots_of(real, self.length) // self.block, self.sums.shape[1])
        rows = jnp.arange(keys.shape[0])[:, None]
        sums = self.sums.at[rows, place].add(keys.astype(self.sums.dtype), mode="drop")
        return dataclasses.replace(self, sums=sums, length=self.length + real.sum(1, dtype=jnp.int32))

    def counts(self) -> jax.Array:
        """Tokens `(B, T)` int32 of each block so far."""
        starts = jnp.arange(self.sums.shape[1]) * self.block
        return jnp.clip(self.length[:, None] - starts, 0, self.block)

    def means(self) -> jax.Array:
        """`(B, T, G, D)` float32; zeros for a block without tokens."""
        return self.sums / jnp.maximum(self.counts(), 1).astype(self.sums.dtype)[..., None, None]
