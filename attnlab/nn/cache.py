"""Caches of keys and values for decoding with dense attention."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def check_sizes(**sizes: int) -> None:
    """Raises `ValueError` if a size is below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def slots_of(real: jax.Array, length: jax.Array) -> jax.Array:
    """Places `(B, N)` that new tokens have in the order of all tokens; padding has that of the token before it.

    Args:
      real: `(B, N)` boolean, False at padding.
      length: `(B,)` int32, tokens so far.
    """
    return length[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, compact: those of example b fill the first `length[b]` slots.

    Padding is never stored, so that slots are in the order of the tokens, whatever the prompts' lengths. A slot is no
    position: where its token is stands in `at`. The cache is a pytree of fixed shapes: it goes through `jit` (donate it
    to update in place), `scan` and checkpoints.

    Attributes:
      keys: `(B, max_length, G, D)`.
      values: `(B, max_length, G, E)`; E = 0 where values are made of the keys, as those of a shared latent are.
      at: `(B, max_length)` int32, positions of the stored tokens.
      labels: `(B, max_length)` int32, see `attnlab.contract.View`; -1 for none.
      length: `(B,)` int32, tokens stored.
      next_at: `(B,)` int32, the position after the last token's.
    """

    keys: jax.Array
    values: jax.Array
    at: jax.Array
    labels: jax.Array
    length: jax.Array
    next_at: jax.Array

    @classmethod
    def create(
        cls, batch_size: int, max_length: int, num_heads: int, key_size: int, value_size: int, *, dtype: Any = None
    ) -> Self:
        """An empty cache for `num_heads` key heads; float32 when `dtype` is None.

        Raises:
          ValueError: if a size is below 1, `value_size` below 0.
        """
        sizes = {"batch_size": batch_size, "max_length": max_length, "num_heads": num_heads, "key_size": key_size}
        check_sizes(**sizes)
        if value_size < 0:
            raise ValueError(f"value_size must be at least 0, got {value_size}")
        dtype = jnp.float32 if dtype is None else dtype
        keys = jnp.zeros((batch_size, max_length, num_heads, key_size), dtype)
        values = jnp.zeros((batch_size, max_length, num_heads, value_size), dtype)
        slots, none = (batch_size, max_length), (batch_size,)
        # Each an array of its own, so that all can be donated.
        at, labels = jnp.zeros(slots, jnp.int32), jnp.full(slots, -1, jnp.int32)
        return cls(keys, values, at, labels, jnp.zeros(none, jnp.int32), jnp.zeros(none, jnp.int32))

    @property
    def max_length(self) -> int:
        """Slots of the cache."""
        return self.keys.shape[1]

    def order(self, num_tokens: int, mask: ArrayLike | None = None) -> jax.Array:
        """Slots `(B, N)` that the next N tokens will have: their places in the order of all tokens.

        Args:
          num_tokens: N.
          mask: `(B, N)` boolean, False at padding, which gets the slot of the token before it (-1 at the start).

        Raises:
          ValueError: if the mask has another shape.
        """
        return slots_of(self._real(num_tokens, mask), self.length)

    def positions(self, num_tokens: int, mask: ArrayLike | None = None) -> jax.Array:
        """Positions `(B, N)` of the next N tokens if none are given: one after the other; arguments as `order`."""
        return slots_of(self._real(num_tokens, mask), self.next_at)

    def append(
        self,
        keys: ArrayLike,
        values: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        at: ArrayLike | None = None,
        labels: ArrayLike | None = None,
    ) -> Self:
        """The cache with N more tokens, N ≥ 1.

        Args:
          keys: `(B, N, G, D)`, cast to the dtype of the cache.
          values: `(B, N, G, E)`.
          mask: `(B, N)` boolean, False at padding, which is not stored.
          at: `(B|1, N)` positions; those of `positions` when None.
          labels: `(B|1, N)`; -1 when None.

        Raises:
          ValueError: if shapes do not fit, or the tokens exceed `max_length`. Lengths that are traced (under `jit`)
            cannot be seen: there, tokens beyond the last slot are not stored.
        """
        keys, values = jnp.asarray(keys), jnp.asarray(values)
        for name, new, old in (("keys", keys, self.keys), ("values", values, self.values)):
            if new.ndim != 4 or (new.shape[0], *new.shape[2:]) != (old.shape[0], *old.shape[2:]):
                raise ValueError(
                    f"{name} must be (B, N, {old.shape[2]}, {old.shape[3]}), B = {old.shape[0]}: {new.shape}"
                )
        tokens = keys.shape[1]
        self._check_room(tokens, mask)
        real = self._real(tokens, mask)
        at = self.positions(tokens, mask) if at is None else jnp.broadcast_to(at, real.shape)
        labels = jnp.broadcast_to(-1 if labels is None else labels, real.shape)
        # Out of range on purpose: mode="drop" leaves padding out.
        slots = jnp.where(real, self.order(tokens, mask), self.max_length)
        rows = jnp.arange(keys.shape[0])[:, None]

        def store(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[rows, slots].set(new.astype(old.dtype), mode="drop")

        last = jnp.max(jnp.where(real, at, -1), axis=1).astype(jnp.int32)
        return type(self)(
            store(self.keys, keys),
            store(self.values, values),
            store(self.at, at),
            store(self.labels, labels),
            self.length + real.sum(1, dtype=jnp.int32),
            jnp.maximum(self.next_at, last + 1),
        )

    def _real(self, tokens: int, mask: ArrayLike | None) -> jax.Array:
        shape = (self.keys.shape[0], tokens)
        if mask is None:
            return jnp.ones(shape, bool)
        if jnp.shape(mask) != shape:
            raise ValueError(f"mask must be (B, N) = {shape}, got {jnp.shape(mask)}")
        return jnp.asarray(mask, bool)

    def _check_room(self, tokens: int, mask: ArrayLike | None) -> None:
        traced = jax.core.Tracer
        # A padded prompt may be wider than what it leaves in the cache.
        known = mask is None or not isinstance(mask, traced)
        more = tokens if mask is None else np.asarray(mask, bool).sum(1) if known else 0
        stored = 0 if isinstance(self.length, traced) else np.asarray(self.length)
        if (most := int(np.max(stored + more))) > self.max_length:
            raise ValueError(
                f"{most} tokens do not fit a cache of max_length {self.max_length}: give more to init_state"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContextCache:
    """Keys and values of a context, projected once, for decoding with cross-attention.

    Attributes:
      keys: `(B, M, G, D)`, with their positions worked in.
      values: `(B, M, G, E)`.
      mask: `(B, M)` boolean, which tokens of the context exist.
      length: `(B,)` int32, queries seen so far.
      next_at: `(B,)` int32, the position after the last query's.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array
    length: jax.Array
    next_at: jax.Array

    @classmethod
    def create(cls, keys: ArrayLike, values: ArrayLike, mask: ArrayLike | None = None, *, dtype: Any = None) -> Self:
        """Of a context's keys `(B, M, G, D)` and values, before the first query; float32 when `dtype` is None.

        Raises:
          ValueError: if `mask` is not boolean `(B, M)`.
        """
        dtype = jnp.float32 if dtype is None else dtype
        keys, values = jnp.asarray(keys, dtype), jnp.asarray(values, dtype)
        shape = keys.shape[:2]
        mask = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask)
        if mask.shape != shape or mask.dtype != jnp.bool_:
            raise ValueError(f"context_mask must be boolean {shape}, got {mask.dtype} {mask.shape}")
        length, next_at = (jnp.zeros((shape[0],), jnp.int32) for _ in range(2))
        return cls(keys, values, mask, length, next_at)
