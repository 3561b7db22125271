"""A token mixer around `pallas_kernels.linear_attention`: everything but the projections.

Mechanisms of linear attention differ in how tokens become q, k and v, in the decay, and in what follows the sum. A
subclass says these (`project`, `merge`, `log_decay`, `normalize`); the call, masks, packed segments, decoding and the
recorded map are here, once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.contract import TokenMixer, record
from attnlab.nn.masking import segment_pair, segment_positions
from pallas_kernels.linear_attention import init_state, linear_attention, linear_attention_step


class LinearState(NamedTuple):
    """Decode state of a linear mixer, of constant size.

    Attributes:
      memory: state of `linear_attention`, float32: `(B, H, D, E)`, and the sums of keys where the op normalises.
      position: `(B,)` int32, tokens seen so far.
    """

    memory: Any
    position: jax.Array


class Places(NamedTuple):
    """Positions of queries `(1|B, N)` and keys `(1|B, M)`: from 0 at the start of the sequence, segment or decoding."""

    queries: jax.Array
    keys: jax.Array


class LinearMixer(TokenMixer):
    """Base of linear attention mixers.

    A subclass defines `project` and `merge`, sets `features`, `num_heads`, `key_size` D, `value_size` E, `causal`,
    `cross` (whether it was built for a context) and `dtype`, and may override `log_decay`, `normalize` (whether the op
    divides by q·Σk) and `scale` (of q·k).
    """

    accepts = frozenset({"key_mask", "segment_ids"})
    normalize: bool = False
    scale: float | None = None
    cross: bool = False
    num_heads: int
    key_size: int
    value_size: int
    dtype: Any = None

    def project(self, x: jax.Array, context: jax.Array, at: Places) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries `(B, N, H, D)` of `x`, keys `(B, M, G, D)` and values `(B, M, G, E)` of `context`."""
        raise NotImplementedError

    def merge(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """From the op's result `(B, N, H, E)` and the tokens `x` `(B, N, C)` to the mixer's `(B, N, C)`."""
        raise NotImplementedError

    def log_decay(self) -> jax.Array | None:
        """`(H,)` in float32, at most 0, used when causal; None for no decay."""
        return None

    def __call__(
        self,
        x: ArrayLike,
        context: ArrayLike | None = None,
        *,
        mask: ArrayLike | None = None,
        segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
        positions: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        self.check_call(x, context=context, mask=mask, segment_ids=segment_ids, positions=positions)
        x = jnp.asarray(x, self.dtype)
        source = x if context is None else jnp.asarray(context, x.dtype)
        q, k, v = self.project(x, source, self._places(x, context, segment_ids, positions))
        if mask is not None:
            k, v = _zero_where_not(mask, k), _zero_where_not(mask, v)
        decay = self.log_decay() if self.causal else None
        options = {
            "log_decay": decay,
            "causal": self.causal,
            "segment_ids": segment_ids,
            "normalize": self.normalize,
            "scale": self.scale,
        }
        y = linear_attention(q, k, v, **options)
        record(self, "attention", lambda: linear_attention_map(q, k, **options))
        return self.merge(y, x)

    def _places(self, x: jax.Array, context: ArrayLike | None, segment_ids: Any, positions: ArrayLike | None) -> Places:
        if segment_ids is None:
            queries = jnp.arange(x.shape[1])[None]
            keys = queries if context is None else jnp.arange(jnp.shape(context)[1])[None]
        else:
            queries, keys = (segment_positions(ids) for ids in segment_pair(segment_ids))
        if positions is not None:
            queries = jnp.asarray(positions)
            keys = queries if context is None else keys
        return Places(queries, keys)

    def _decodes(self) -> bool:
        return self.causal and not self.cross

    def init_state(self, batch_size: int, max_length: int | None = None, *, dtype: Any = None) -> LinearState:
        """An empty memory; its size does not depend on `max_length`, and it is float32 whatever `dtype`."""
        if not self._decodes():
            return super().init_state(batch_size, max_length, dtype=dtype)
        memory = init_state(batch_size, self.num_heads, self.key_size, self.value_size, normalize=self.normalize)
        return LinearState(memory, jnp.zeros((batch_size,), jnp.int32))

    def prefill(
        self, x: ArrayLike, state: LinearState, *, mask: ArrayLike | None = None
    ) -> tuple[jax.Array, LinearState]:
        """Advances the memory by `(B, N, C)`; where `mask` is False nothing is added and nothing decays."""
        if not self._decodes():
            return super().prefill(x, state, mask=mask)
        self.check_call(x)
        x = jnp.asarray(x, self.dtype)
        real = jnp.ones(x.shape[:2], bool) if mask is None else jnp.asarray(mask)
        seen = jnp.cumsum(real, axis=1, dtype=jnp.int32)
        at = state.position[:, None] + jnp.maximum(seen - 1, 0)
        q, k, v = self.project(x, x, Places(at, at))
        decay = self.log_decay()
        if mask is not None:
            k, v = _zero_where_not(real, k), _zero_where_not(real, v)
            decay = None if decay is None else jnp.where(real[:, :, None], decay, 0)
        y, memory = linear_attention(
            q,
            k,
            v,
            log_decay=decay,
            normalize=self.normalize,
            scale=self.scale,
            initial_state=state.memory,
            return_state=True,
        )
        return self.merge(y, x), LinearState(memory, state.position + seen[:, -1])

    def step(self, x_t: ArrayLike, state: LinearState) -> tuple[jax.Array, LinearState]:
        """Advances the memory by one token `(B, C)`."""
        if not self._decodes():
            return super().step(x_t, state)
        x = jnp.asarray(x_t, self.dtype)[:, None]
        self.check_call(x)
        at = state.position[:, None]
        q, k, v = (array[:, 0] for array in self.project(x, x, Places(at, at)))
        y, memory = linear_attention_step(
            q, k, v, state.memory, log_decay=self.log_decay(), normalize=self.normalize, scale=self.scale
        )
        return self.merge(y[:, None], x)[:, 0], LinearState(memory, state.position + 1)


def linear_attention_map(
    q: jax.Array,
    k: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    causal: bool = True,
    normalize: bool = False,
    scale: float | None = None,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
) -> jax.Array:
    """The weights `(B, H, N, M)` in float32 that `linear_attention` gives the values, written out; quadratic.

    `log_decay` is `(H,)` or None; the other arguments are those of `linear_attention`.
    """
    heads, groups = q.shape[2], k.shape[2]
    q, k = q.astype(jnp.float32), jnp.repeat(k.astype(jnp.float32), heads // groups, axis=2)
    weights = jnp.einsum("bnhd,bmhd->bhnm", q, k)
    weights = weights if scale is None else weights * scale
    distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])
    if log_decay is not None:
        weights = weights * jnp.exp(log_decay[:, None, None] * jnp.maximum(distance, 0))
    if causal:
        weights = jnp.where(distance >= 0, weights, 0)
    if segment_ids is not None:
        of_q, of_k = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        same = jnp.asarray(of_q)[:, None, :, None] == jnp.asarray(of_k)[:, None, None, :]
        weights = jnp.where(same, weights, 0)
    if normalize:
        total = weights.sum(-1, keepdims=True)
        weights = jnp.where(total == 0, 0, weights / jnp.where(total == 0, 1, total))
    return weights


def _zero_where_not(mask: ArrayLike, x: jax.Array) -> jax.Array:
    return jnp.where(jnp.asarray(mask)[:, :, None, None], x, 0)
