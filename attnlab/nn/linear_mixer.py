"""A token mixer around the recurrences of `pallas_kernels`: everything but the projections.

Mechanisms of linear attention differ in how tokens become q, k, v, decays and strengths (`project`), and in what
follows the sum (`merge`). The call, masks, packed segments, decoding, cross-attention to a context that is projected
once, points and the recorded map are here, once. A projection with strengths runs on `delta_rule_attention`, all others
on `linear_attention`.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.contract import Given, TokenMixer, View, record
from attnlab.nn.grids import to_tokens
from attnlab.nn.masking import by_run, segment_orders, segment_pair
from attnlab.points import Edits, visit
from pallas_kernels.chunk_decay import scalar_decay
from pallas_kernels.delta_rule_attention import delta_rule_attention, delta_rule_attention_step
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.integers import integers
from pallas_kernels.linear_attention import NormalizedState, init_state, linear_attention, linear_attention_step


class LinearState(NamedTuple):
    """Decode state of a linear mixer, of constant size.

    Attributes:
      memory: state of the op, float32: `(B, H, D, E)`, and the sums of keys where the op normalises.
      length: `(B,)` int32, tokens seen so far.
      next_at: `(B,)` int32, the position after the last token's.
      carry: what the mixer's `project` carries along.
    """

    memory: Any
    length: jax.Array
    next_at: jax.Array
    carry: Any = ()


class ContextState(NamedTuple):
    """Decode state of linear cross-attention: the context, projected once.

    Attributes:
      memory: as in `LinearState`: of the whole context, or causal of the part that was seen.
      length: `(B,)` int32, queries seen so far.
      next_at: `(B,)` int32, the position after the last query's.
      coming: keys and values of the context that causal cross-attention has yet to add; None otherwise.
      carry: what `project` carries along from query to query.
    """

    memory: Any
    length: jax.Array
    next_at: jax.Array
    coming: Any = None
    carry: Any = ()


class Places(NamedTuple):
    """Where tokens are.

    Attributes:
      queries: positions `(1|B, N)`, from 0 at the start of the sequence, segment or decoding.
      keys: positions `(1|B, M)`.
      real: `(B, M)` boolean, which keys are no padding; None when all are.
      segment_ids: `(B, N)`, or a pair; None without packed segments.
      real_queries: `(B, N)` boolean, which queries are known to be no padding: `real` in self-attention.
      deterministic: False in training.
    """

    queries: jax.Array
    keys: jax.Array
    real: jax.Array | None = None
    segment_ids: Any = None
    real_queries: jax.Array | None = None
    deterministic: bool = True


class Recurrence(NamedTuple):
    """What the projections make of tokens.

    Attributes:
      q: queries `(B, N, H, D)`.
      k: keys `(B, M, G, D)`.
      v: values `(B, M, G, E)`.
      log_decay: `(H,)`, `(B, N, H)` per token, or `(B, N, H, D)` per token and channel, float32, at most 0; None for no
        decay. Causal only.
      beta: strengths `(B, N, H)` of the delta rule; None for plain sums.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None = None
    beta: jax.Array | None = None


class LinearMixer(TokenMixer):
    """Base of linear attention mixers.

    A subclass defines `project` and `merge`, sets `features`, `num_heads`, `key_size` D, `value_size` E, `causal`,
    `context_features` (channels of the context; None for self-attention), `layout` and `dtype`, and may override
    `normalize` (whether the op divides by q·Σk) and `scale` (of q·k). Images and videos, if the mechanism takes them,
    are a sequence in row-major order. A mixer that carries more than sums from token to token (a running maximum, the
    last tokens of a convolution) overrides `carry`.
    """

    accepts = frozenset({"key_mask", "segment_ids"})
    points = frozenset({"qkv", "heads"})
    normalize: bool = False
    scale: float | None = None
    features: int
    num_heads: int
    key_size: int
    value_size: int

    def carry(self, batch_size: int) -> Any:
        """What `project` is handed before the first token: a tree of arrays whose shapes do not change; empty here."""
        return ()

    def project(self, x: jax.Array, source: jax.Array, at: Places, carry: Any) -> tuple[Recurrence, Any]:
        """The recurrence of the tokens `x` `(B, N, C)` on `source` `(B, M, C')`, and what is carried on."""
        raise NotImplementedError

    def merge(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """From the op's result `(B, N, H, E)` and the tokens `x` `(B, N, C)` to the mixer's `(B, N, C)`.

        The result has the dtype of the tokens, or float32 where that is float16, and so may what is returned.
        """
        raise NotImplementedError

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        tokens = to_tokens(x)
        source = tokens if given.context is None else given.context
        at = self._places(tokens, source, given)
        parts, _ = self.project(tokens, source, at, self.carry(x.shape[0]))
        parts = self._without_padding(visit(self, given.edits, "qkv", parts), given.mask)
        record(self, "attention", lambda: self._map(parts, given.segment_ids))
        y = visit(self, given.edits, "heads", self._recur(parts, given.segment_ids))
        return self.merge(y, tokens).astype(x.dtype).reshape(x.shape)

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        context: ArrayLike | None = None,
        context_mask: ArrayLike | None = None,
        dtype: Any = None,
    ) -> LinearState | ContextState:
        """An empty memory, or that of the context; its size does not depend on `max_length`, and it is float32.

        For a `dtype` of float64, that of the tokens to come, it is float64.
        """
        self.check_decodes(context is not None)
        # Each an array of its own, so that all can be donated.
        length, next_at = jnp.zeros((batch_size,), jnp.int32), jnp.zeros((batch_size,), jnp.int32)
        wide = at_least_float32(jnp.float32 if dtype is None else dtype)
        sizes = (batch_size, self.num_heads, self.key_size, self.value_size)
        empty = init_state(*sizes, normalize=self.normalize, dtype=wide)
        carry = self._first_carry(batch_size, wide)
        if context is None:
            if context_mask is not None:
                raise ValueError("context_mask is given without a context")
            return LinearState(empty, length, next_at, carry)
        source = jnp.asarray(context, self.dtype)
        x = jnp.zeros((batch_size, source.shape[1], self.features), source.dtype)
        exists = None if context_mask is None else jnp.asarray(context_mask)
        if exists is not None and (exists.shape != source.shape[:2] or exists.dtype != jnp.bool_):
            raise ValueError(f"context_mask must be boolean {source.shape[:2]}, got {exists.dtype} {exists.shape}")
        parts, _ = self.project(x, source, self._places(x, source, Given(mask=exists)), self.carry(batch_size))
        parts = self._without_padding(parts, exists)
        if self.causal:
            return ContextState(empty, length, next_at, parts._replace(q=cast(jax.Array, None)), carry)
        _, memory = linear_attention(
            *parts[:3], causal=False, normalize=self.normalize, scale=self.scale, return_state=True
        )
        return ContextState(memory, length, next_at, carry=carry)

    def prefill(
        self,
        x: ArrayLike,
        state: LinearState | ContextState,
        *,
        mask: ArrayLike | View | None = None,
        positions: ArrayLike | None = None,
        edits: Edits | None = None,
    ) -> tuple[jax.Array, LinearState | ContextState]:
        """Advances the memory by `(B, N, C)`; where `mask` is False nothing is added and nothing decays."""
        self.check_decodes(isinstance(state, ContextState))
        self.check_call(x, mask=mask, positions=positions, decoding=True)
        x = jnp.asarray(x, self.dtype)
        if isinstance(mask, View):
            positions = mask.q_at if positions is None else positions
            mask = mask.mask
        if mask is not None and jnp.shape(mask) != x.shape[:2]:
            raise ValueError(f"mask must be (B, N) = {x.shape[:2]}, got {jnp.shape(mask)}")
        seen = jnp.cumsum(jnp.ones(x.shape[:2], bool) if mask is None else mask, axis=1, dtype=jnp.int32)
        at = (
            state.next_at[:, None] + jnp.maximum(seen - 1, 0) if positions is None else integers("positions", positions)
        )
        if isinstance(state, ContextState):
            return self._read(x, state, at, seen, mask, edits)
        real = None if mask is None else jnp.asarray(mask)
        parts, carry = self.project(x, x, Places(at, at, real, real_queries=real), state.carry)
        parts = self._without_padding(visit(self, edits, "qkv", parts), mask)
        record(self, "attention", lambda: self._map(parts, None))
        y, memory = self._recur(parts, None, initial_state=state.memory, return_state=True)
        y = visit(self, edits, "heads", y)
        return self.merge(y, x).astype(x.dtype), LinearState(memory, *_advanced(state, at, seen, mask), carry)

    def step(
        self,
        x_t: ArrayLike,
        state: LinearState | ContextState,
        *,
        positions: ArrayLike | None = None,
        edits: Edits | None = None,
    ) -> tuple[jax.Array, LinearState | ContextState]:
        """Advances the memory by one token `(B, C)`."""
        x = jnp.asarray(x_t, self.dtype)[:, None]
        if isinstance(state, ContextState):
            positions = None if positions is None else integers("positions", positions)[:, None]
            y, state = self.prefill(x, state, positions=positions, edits=edits)
            return y[:, 0], state
        self.check_decodes(False)
        self.check_call(x, positions=positions, decoding=True)
        at = (state.next_at if positions is None else integers("positions", positions))[:, None]
        parts, carry = self.project(x, x, Places(at, at), state.carry)
        parts = visit(self, edits, "qkv", parts)
        y, memory = self._recur_step(parts, state.memory)
        y = visit(self, edits, "heads", y[:, None])
        return self.merge(y, x).astype(x.dtype)[:, 0], LinearState(
            memory, *_advanced(state, at, jnp.ones_like(at), None), carry
        )

    def _read(
        self, x: jax.Array, state: ContextState, at: jax.Array, seen: jax.Array, mask: Any, edits: Edits | None
    ) -> tuple[jax.Array, ContextState]:
        """Queries of a context: of all its keys, or when causal of as many as there were queries."""
        none = jnp.zeros((*x.shape[:2], self._source_features), x.dtype)
        real = None if mask is None else jnp.asarray(mask)
        parts, carry = self.project(x, none, Places(at, at, real, real_queries=real), state.carry)
        counts = _advanced(state, at, seen, mask)
        if self.causal:
            index = state.length[:, None] + seen - 1
            taken = jax.tree.map(lambda a: _take_tokens(a, index), state.coming)
            parts = taken._replace(q=parts.q)
            inside = index < state.coming.k.shape[1]
            parts = self._without_padding(parts, inside if mask is None else inside & mask)
            y, memory = self._recur(parts, None, initial_state=state.memory, return_state=True)
            state = ContextState(memory, *counts, state.coming, carry)
        else:
            y = _read_memory(_with_room(parts).q, state.memory, self.scale)
            state = ContextState(state.memory, *counts, carry=carry)
        return self.merge(visit(self, edits, "heads", y), x).astype(x.dtype), state

    def _first_carry(self, batch_size: int, dtype: Any) -> Any:
        """What `project` is handed before the first token, in float64 where it would become so."""
        carry = self.carry(batch_size)
        if dtype != jnp.float64:
            return carry
        return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, carry)

    def _recur(self, parts: Recurrence, segment_ids: Any, **state: Any) -> Any:
        parts = _with_room(parts)
        if parts.beta is not None:
            return delta_rule_attention(
                parts.q,
                parts.k,
                parts.v,
                parts.beta,
                log_decay=parts.log_decay,
                scale=self.scale,
                segment_ids=segment_ids,
                **state,
            )
        return linear_attention(
            parts.q,
            parts.k,
            parts.v,
            log_decay=parts.log_decay if self.causal else None,
            causal=self.causal,
            segment_ids=segment_ids,
            normalize=self.normalize,
            scale=self.scale,
            **state,
        )

    def _recur_step(self, parts: Recurrence, memory: Any) -> tuple[jax.Array, Any]:
        parts = _with_room(parts)
        q, k, v = (array[:, 0] for array in parts[:3])
        decay = parts.log_decay
        decay = decay if decay is None or decay.ndim == 1 else decay[:, 0]
        if parts.beta is not None:
            return delta_rule_attention_step(q, k, v, parts.beta[:, 0], memory, log_decay=decay, scale=self.scale)
        return linear_attention_step(q, k, v, memory, log_decay=decay, normalize=self.normalize, scale=self.scale)

    def _map(self, parts: Recurrence, segment_ids: Any) -> jax.Array:
        if parts.beta is not None:  # the rule is linear in the values: those of a single 1 give its weights
            q, k = parts.q.astype(jnp.float32), parts.k.astype(jnp.float32)
            ones = jnp.broadcast_to(jnp.eye(k.shape[1])[None, :, None], (*k.shape[:3], k.shape[1]))
            return jnp.moveaxis(self._recur(parts._replace(q=q, k=k, v=ones), segment_ids), 1, 2)
        return linear_attention_map(
            parts.q,
            parts.k,
            log_decay=parts.log_decay if self.causal else None,
            causal=self.causal,
            normalize=self.normalize,
            scale=self.scale,
            segment_ids=segment_ids,
        )

    def _without_padding(self, parts: Recurrence, mask: ArrayLike | None) -> Recurrence:
        """Where the mask `(B, M)` is False nothing is added and nothing decays."""
        if mask is None:
            return parts
        real = jnp.asarray(mask)
        k, v = (jnp.where(real[:, :, None, None], array, 0) for array in (parts.k, parts.v))
        decay, beta = parts.log_decay, parts.beta
        if decay is not None and self.causal:
            decay = jnp.where(real.reshape(*real.shape, *(1,) * max(decay.ndim - 2, 1)), decay, 0)
        if beta is not None:
            beta = jnp.where(real[:, :, None], beta, 0)
        return parts._replace(k=k, v=v, log_decay=decay, beta=beta)

    def _places(self, x: jax.Array, source: jax.Array, given: Given) -> Places:
        real = None if given.mask is None else jnp.asarray(given.mask)
        if given.segment_ids is not None:
            queries, keys = segment_orders(given.segment_ids)
        else:
            keys = jnp.arange(source.shape[1])[None]
            queries = keys if given.context is None else jnp.arange(x.shape[1])[None]
        if given.positions is not None:
            queries = given.positions
            keys = queries if given.context is None else keys
        real_queries = real if given.context is None else None
        return Places(queries, keys, real, given.segment_ids, real_queries, given.deterministic)

    @property
    def _source_features(self) -> int:
        return self.features if self.context_features is None else self.context_features


def _with_room(parts: Recurrence) -> Recurrence:
    """Sums of many values in float32 where the tokens' own range ends at 65504: what follows may be a norm of them."""
    if parts.q.dtype != jnp.float16:
        return parts
    q, k, v = (array.astype(jnp.float32) for array in parts[:3])
    return parts._replace(q=q, k=k, v=v)


def _advanced(
    state: LinearState | ContextState, at: jax.Array, seen: jax.Array, mask: Any
) -> tuple[jax.Array, jax.Array]:
    """`length` and `next_at` of a state after tokens at positions `at`, of which `seen` counts those that are real."""
    at = jnp.broadcast_to(at, seen.shape)
    last = jnp.max(at if mask is None else jnp.where(mask, at, -1), axis=1).astype(jnp.int32)
    return state.length + seen[:, -1], jnp.maximum(state.next_at, last + 1)


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

    Arguments are those of `linear_attention`.
    """
    heads, groups = q.shape[2], k.shape[2]
    q, k = q.astype(jnp.float32), jnp.repeat(k.astype(jnp.float32), heads // groups, axis=2)
    weights = jnp.einsum("bnhd,bmhd->bhnm", q, k) if log_decay is None else _decayed(q, k, log_decay)
    weights = weights if scale is None else weights * scale
    if causal:
        weights = jnp.where(jnp.tri(q.shape[1], k.shape[1], dtype=bool), weights, 0)
    if segment_ids is not None:
        of_q, of_k = segment_pair(by_run(segment_ids) if causal else segment_ids)
        same = of_q[:, None, :, None] == of_k[:, None, None, :]
        weights = jnp.where(same, weights, 0)
    if normalize:
        total = weights.sum(-1, keepdims=True)
        weights = jnp.where(total == 0, 0, weights / jnp.where(total == 0, 1, total))
    return weights


def _decayed(q: jax.Array, k: jax.Array, log_decay: jax.Array) -> jax.Array:
    """Σ_d q_id k_jd exp(G_id - G_jd) for j ≤ i, G the running sum of decays; (B, H, N, M)."""
    decay = log_decay if log_decay.ndim > 1 else jnp.broadcast_to(log_decay, (1, q.shape[1], q.shape[2]))
    shrink = scalar_decay(jnp.moveaxis(decay.astype(jnp.float32), 1, -1)).between  # (B|1, H[, D], N, M)
    if log_decay.ndim == 4:
        return jnp.einsum("bnhd,bmhd,bhdnm->bhnm", q, k, shrink)
    return jnp.einsum("bnhd,bmhd->bhnm", q, k) * shrink


def _read_memory(q: jax.Array, memory: Any, scale: float | None) -> jax.Array:
    """`(B, N, H, E)`: what queries read of a state that does not change."""
    kv, z = memory if isinstance(memory, NormalizedState) else (memory, None)
    wide = q.astype(kv.dtype)
    y = jnp.einsum("bnhd,bhde->bnhe", wide, kv)
    if z is not None:
        total = jnp.einsum("bnhd,bhd->bnh", wide, z)[..., None]
        y = jnp.where(total == 0, 0, y / jnp.where(total == 0, 1, total + jnp.sign(total) * 1e-12))
    elif scale is not None:
        y = y * scale
    return y.astype(q.dtype)


def _take_tokens(array: jax.Array, index: jax.Array) -> jax.Array:
    """Tokens `(B, N)` of `(B, M, …)`; decays per head, `(H,)`, are the same for all."""
    if array.ndim == 1:
        return array
    index = jnp.clip(index, 0, array.shape[1] - 1)
    return jnp.take_along_axis(array, index.reshape(*index.shape, *(1,) * (array.ndim - 2)), axis=1)
