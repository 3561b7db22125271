"""Cache of keys and values for decoding with softmax attention."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, compact: those of example b fill the first `length[b]` slots.

    Padding is never stored, so that a slot is the position of its token, whatever the prompts' lengths. The cache is a
    pytree of fixed shapes: it goes through `jit` (donate it to update in place), `scan` and checkpoints.

    Attributes:
      keys: `(B, max_length, G, D)`.
      values: `(B, max_length, G, E)`.
      length: `(B,)` int32, tokens stored.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array

    @classmethod
    def create(
        cls, batch_size: int, max_length: int, num_heads: int, key_size: int, value_size: int, *, dtype: Any = None
    ) -> Self:
        """An empty cache for `num_heads` key heads; float32 when `dtype` is None.

        Raises:
          ValueError: if a size is below 1.
        """
        sizes = {"batch_size": batch_size, "max_length": max_length, "num_heads": num_heads}
        for name, size in (sizes | {"key_size": key_size, "value_size": value_size}).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        dtype = jnp.float32 if dtype is None else dtype
        keys = jnp.zeros((batch_size, max_length, num_heads, key_size), dtype)
        values = jnp.zeros((batch_size, max_length, num_heads, value_size), dtype)
        return cls(keys, values, jnp.zeros((batch_size,), jnp.int32))

    @property
    def max_length(self) -> int:
        """Slots of the cache."""
        return self.keys.shape[1]

    def positions(self, num_tokens: int, mask: ArrayLike | None = None) -> jax.Array:
        """Positions `(B, N)` that the next N tokens will have.

        Args:
          num_tokens: N.
          mask: `(B, N)` boolean, False at padding, which gets the position of the token before it (-1 at the start).

        Raises:
          ValueError: if the mask has another shape.
        """
        real = self._real(num_tokens, mask)
        return self.length[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1

    def append(self, keys: ArrayLike, values: ArrayLike, mask: ArrayLike | None = None) -> Self:
        """The cache with N more tokens, N ≥ 1.

        Args:
          keys: `(B, N, G, D)`, cast to the dtype of the cache.
          values: `(B, N, G, E)`.
          mask: `(B, N)` boolean, False at padding, which is not stored.

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
        # Out of range on purpose: mode="drop" leaves padding out.
        slots = jnp.where(real, self.positions(tokens, mask), self.max_length)
        rows = jnp.arange(keys.shape[0])[:, None]
        return type(self)(
            self.keys.at[rows, slots].set(keys.astype(self.keys.dtype), mode="drop"),
            self.values.at[rows, slots].set(values.astype(self.values.dtype), mode="drop"),
            self.length + real.sum(1, dtype=jnp.int32),
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
