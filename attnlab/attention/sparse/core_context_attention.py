"""Core context aware attention, CCA (Chen et al., 2024, arXiv:2412.12465; code: chenyaofo/CCA-Attention).

What is far is seen through one core token for each group of g tokens, what is near as it is:

    a_t = softmax_t(k_t·q_e / √D) over the g tokens t of group c, e the last one of them
    k°_c = Σ_t a_t k_t,   v°_c = Σ_t a_t v_t                                  "mean" and "max" pool without queries
    f_i = max(⌊(i - w + 1) / g⌋, 0)                                           the groups in front of query i's window
    y_i = softmax over the cores c < f_i and the tokens g f_i ≤ j ≤ i, with scale D^-1/2

so that cores and tokens tile the past exactly once, the tokens w at least and w + g - 1 at most; a sequence shorter
than w + g is plain causal attention. There are no parameters beside those of the attention that it takes the place of,
and g and w may be changed at any time. Rotary positions come before the pooling, as in the authors' code (the paper
pools hidden states); a core then has its query's heads, H of them, and without a query ("mean", "max") the keys' G.

Attention is two calls of `block_sparse_attention`, to cores and to tokens, joined by their sums of exponentials:
O(N²/g) pairs with cores and O(N·(w + g)) with tokens. Decoding keeps the cores of all whole groups, made when a group's
last token arrives, and the last w + g - 1 tokens. The authors' Triton kernel has another window, (i mod g) + w, where g
does not divide w, and their decoder pools the wrong tokens in its first two layers; here both are as in their mask.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, Pattern, UnsupportedArgument, View, record
from attnlab.nn.cache import check_sizes
from attnlab.nn.core_context import (
    NOWHERE,
    Cores,
    Parts,
    PoolingName,
    attend,
    by_places,
    check_options,
    core_context_attention,
    core_context_weights,
    pool_groups,
)
from attnlab.nn.dense_mixer import Core, Heads, HeadSizes
from attnlab.nn.masking import segment_pair
from attnlab.nn.places import back, front, places_among, rows
from attnlab.nn.projected_mixer import ProjectedMixer
from attnlab.nn.ring_cache import RingCache
from attnlab.nn.rotary import Rotary
from attnlab.points import Edits
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.masks import Causal


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CoreContextCache:
    """The core tokens of all whole groups so far, and the last tokens as they are.

    Attributes:
      keys: of cores, `(B, S, H|G, D)`; group c is in slot c.
      values: of cores, `(B, S, H|G, E)`.
      recent: the last w + g - 1 tokens.
      max_length: tokens for whose groups there is room.
    """

    keys: jax.Array
    values: jax.Array
    recent: RingCache
    max_length: int = dataclasses.field(metadata={"static": True})

    @property
    def length(self) -> jax.Array:
        """`(B,)` int32, tokens seen."""
        return self.recent.length

    def check_room(self, tokens: int, real: ArrayLike | None) -> None:
        """Raises `ValueError` if more tokens do not fit; lengths that are traced cannot be seen."""
        if isinstance(self.length, jax.core.Tracer) or isinstance(real, jax.core.Tracer):
            return
        more = tokens if real is None else np.asarray(real).sum(1)
        if (most := int(np.max(np.asarray(self.length) + more))) > self.max_length:
            raise ValueError(
                f"{most} tokens do not fit a cache of max_length {self.max_length}: give more to init_state"
            )


class CoreContextCore(Core):
    """Between the projections: rotary positions, pooling, the two calls, and the cache.

    Args:
      num_heads: query heads H.
      group_size: g.
      window: w.
      pooling: "cca", "mean" or "max".
      rotary: rotary positions, or theta for `Rotary(theta)`; none when None.
      scale: of all scores; D^-1/2 when None.
      kernel: name of an implementation of `block_sparse_attention`; the best one when None.

    Raises:
      ValueError: for options out of range.
    """

    permutation_equivariant = False

    def __init__(
        self,
        num_heads: int,
        *,
        group_size: int = 16,
        window: int = 1024,
        pooling: PoolingName = "cca",
        rotary: Rotary | float | None = None,
        scale: float | None = None,
        kernel: str | None = None,
    ):
        check_options(group_size, window, pooling)
        self.num_heads, self.group_size, self.window = num_heads, int(group_size), int(window)
        self.pooling, self.scale, self.kernel = pooling, scale, kernel
        self.rotary = Rotary.of(rotary)
        self.looks_at_positions = self.rotary is not None

    def check(self, sizes: HeadSizes, layout: Layout) -> None:
        if self.rotary is not None:
            self.rotary.check(sizes.key_size, 1)

    def init_cache(
        self, sizes: HeadSizes, batch_size: int, max_length: int, dtype: Any, **context: Any
    ) -> CoreContextCache:
        check_sizes(batch_size=batch_size, max_length=max_length)
        recent = min(self.window + self.group_size - 1, max_length)
        ring = RingCache.create(batch_size, recent, *sizes, dtype=dtype)
        heads = self.num_heads if self.pooling == "cca" else sizes.num_kv_heads
        slots = batch_size, max(max_length // self.group_size, 1), heads
        keys, values = (jnp.zeros((*slots, size), ring.keys.dtype) for size in sizes[1:])
        return CoreContextCache(keys, values, ring, max_length)

    def __call__(
        self,
        heads: Heads,
        view: View,
        cache: CoreContextCache | None = None,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
        owner: nnx.Module | None = None,
    ) -> tuple[jax.Array, CoreContextCache | None]:
        if view.rule not in (None, Causal()):
            raise UnsupportedArgument(f"{type(self).__name__} does not take rule (got {view.rule}): groups are causal")
        if cache is not None:
            return self._decoded(heads, view, cache)
        q, k, options = self._placed(heads, view)
        if owner is not None and self.pooling != "max":
            record(owner, "attention", lambda: core_context_weights(q, k, **options))
        return core_context_attention(q, k, heads.v, **options, implementation=self.kernel), None

    def attention(self, heads: Heads, view: View) -> jax.Array:
        q, k, options = self._placed(heads, view)
        return core_context_weights(q, k, **options)

    def _placed(self, heads: Heads, view: View) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        ids = None if view.segment_ids is None else segment_pair(view.segment_ids)[0]
        options = {"group_size": self.group_size, "window": self.window, "pooling": self.pooling, "scale": self.scale}
        return (
            self._rotate(heads.q, view.q_at),
            self._rotate(heads.k, view.q_at),
            options | {"mask": view.mask, "segment_ids": ids},
        )

    def _rotate(self, x: jax.Array, at: ArrayLike) -> jax.Array:
        return x if self.rotary is None else self.rotary(x, at)

    def _decoded(self, heads: Heads, view: View, cache: CoreContextCache) -> tuple[jax.Array, CoreContextCache]:
        """New tokens behind those of a cache."""
        q, k, v = heads[:3]
        real, recent, size = view.mask, cache.recent, self.group_size
        cache.check_room(q.shape[1], real)
        order, there = None, jnp.ones(q.shape[:2], bool) if real is None else jnp.asarray(real)
        at = recent.next_at[:, None] + places_among(there) if view.q_at is None else view.q_at
        at = jnp.broadcast_to(at, there.shape)
        q, k = self._rotate(q, at), self._rotate(k, at)
        if real is not None:
            order = front(there)
            q, k, v, at, there = (rows(a, order) for a in (q, k, v, at, there))
        place = recent.length[:, None] + places_among(there)

        # A group may have begun in the cache.
        slots = (recent.length[:, None] - (size - 1) + jnp.arange(size - 1)) % recent.keys.shape[1]
        run_k, run_v = (
            jnp.concatenate([rows(old, slots).astype(new.dtype), new], 1)
            for old, new in ((recent.keys, k), (recent.values, v))
        )
        ends = there & (place % size == size - 1)
        last = front(ends, -(-q.shape[1] // size))
        members = last[..., None] + jnp.arange(size)
        parts = rows(q, last), rows(run_k, members), rows(run_v, members)
        made = pool_groups(*parts, pooling=self.pooling, scale=self.scale)
        count = cache.keys.shape[1]
        slot = jnp.where(rows(ends, last), rows(place, last) // size, count)
        each = jnp.arange(q.shape[0])[:, None]
        keys, values = (
            old.at[each, slot].set(new.astype(old.dtype), mode="drop")
            for old, new in ((cache.keys, made.keys), (cache.values, made.values))
        )
        whole = (recent.length + there.sum(1, dtype=jnp.int32)) // size
        numbers = jnp.where(jnp.arange(count) < whole[:, None], jnp.arange(count, dtype=jnp.int32), NOWHERE)
        places = jnp.concatenate([recent.order()[:, :, 0], jnp.where(there, place, -1)], 1)
        masks = by_places(place, numbers, places, size, self.window)
        tokens = (
            jnp.concatenate([old.astype(new.dtype), new], 1) for old, new in ((recent.keys, k), (recent.values, v))
        )
        seen = Parts(Cores(keys, values, None), masks[0], *tokens, masks[1])
        y = attend(q, seen, self.scale, self.kernel)
        y = y if order is None else back(y, order, jnp.asarray(real))
        return y, dataclasses.replace(cache, keys=keys, values=values, recent=_appended(recent, k, v, there, at))


@jax.jit
def _appended(ring: RingCache, k: jax.Array, v: jax.Array, real: jax.Array, at: jax.Array) -> RingCache:
    return ring.look(k, v, real, at=at)[1]  # compiled: who sees whom, as large as N·M, is not made


@register(
    "core_context_attention",
    paper=Paper(
        "Core Context Aware Transformers for Long Context Language Modeling",
        "Chen et al.",
        2024,
        arxiv="2412.12465",
        number=70,
    ),
    source=Source.AUTHORS_CODE,
    repository="chenyaofo/CCA-Attention",
    cost=Cost(time="O(N·(N/g + w + g)·H·(D+E))", memory="O(N·H·(D+E))", state="M/g·H·(D+E) + (w + g)·G·(D+E)"),
    kernel="block_sparse_attention",
    summary="one core token for each group of far tokens, pooled by its last query, and near tokens as they are",
    small={"group_size": 2, "window": 3},
)
class CoreContextAttention(ProjectedMixer):
    """Causal self-attention of sequences `(B, N, C)`. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: query heads H.
      group_size: tokens g of a group.
      window: tokens w that are seen as they are, at least.
      pooling: how a group becomes a core token: "cca", "mean" or "max".
      causal: True; there is no other form.
      rotary: rotary positions, or theta for `Rotary(theta)`.
      scale: of all scores; D^-1/2 when None.
      kernel: name of an implementation of `block_sparse_attention`; the best one when None.
      qkv_bias: whether the maps to queries, keys and values have a bias.
      out_bias: whether the last map has one.
      rngs: streams `params`, and `dropout` if there is any.
      **projections: sizes of the projections and dropout of the result: see `ProjectedMixer`.

    Raises:
      ValueError: for options out of range, or sizes that do not fit.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF})
    layouts = frozenset({Layout.SEQUENCE})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        group_size: int = 16,
        window: int = 1024,
        pooling: PoolingName = "cca",
        causal: bool = True,
        rotary: Rotary | float | None = None,
        scale: float | None = None,
        kernel: str | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        if not causal:
            raise UnsupportedArgument(f"{type(self).__name__} must be causal: windows lie in front of queries")
        biases = {"qkv_bias": qkv_bias, "out_bias": out_bias}
        super().__init__(features, num_heads=num_heads, causal=True, **biases, **projections, rngs=rngs)
        core = {"group_size": group_size, "window": window, "pooling": pooling, "rotary": rotary, "scale": scale}
        self.set_core(CoreContextCore(num_heads, **core, kernel=kernel))

    def set_core(self, core: Core) -> None:
        if not isinstance(core, CoreContextCore):
            raise ValueError(f"core must be a CoreContextCore, got {type(core).__name__}")
        super().set_core(core)
        self.accepts = self.accepts - {"mask", "rule"}
