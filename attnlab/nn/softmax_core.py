"""Cores of attention by products of queries and keys: rotary positions, caches, and the softmax in its fast form."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, View, record
from attnlab.nn.cache import ContextCache, KVCache
from attnlab.nn.dense_mixer import Core, Heads, HeadSizes
from attnlab.nn.masking import LabelRule, masked_softmax, segment_pair, visible_keys
from attnlab.nn.position_bias import alibi_bias, alibi_slopes
from attnlab.nn.rotary import Rotary
from attnlab.nn.softmax import attention_scores, softmax_attention, weighted_values
from attnlab.nn.softmax_kernel import on_kernel
from attnlab.points import Edits, acts, visit
from pallas_kernels import dispatch
from pallas_kernels.masks import And, Causal, Mask, Not, Or


class ProductCore(Core):
    """Base of cores that weigh values by some function of products of queries and keys.

    A subclass defines `weights`. Here are rotary positions, the cache of keys and values, the points `scores` and
    `attention`, and dropout of weights.

    Args:
      rotary: rotary positions along the axes of the layout, or theta for `Rotary(theta)`; none when None.
      rotate_keys: whether keys are rotated too.
      cache_rotated: whether the cache holds rotated keys; else they are rotated when read, at the positions that stand
        in it, which may have changed since.
      dropout: rate on the weights.
      rngs: stream `dropout` if there is any.

    Raises:
      ValueError: for a rotary that is neither.
    """

    points = frozenset({"scores", "attention"})

    def __init__(
        self,
        *,
        rotary: Rotary | float | None = None,
        rotate_keys: bool = True,
        cache_rotated: bool = True,
        dropout: float = 0.0,
        rngs: nnx.Rngs | None = None,
    ):
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.rotary = Rotary.of(rotary)
        self.rotate_keys, self.cache_rotated, self.dropout = rotate_keys, cache_rotated, dropout
        self.dropout_rngs = rngs["dropout"].fork() if dropout > 0 else nnx.data(None)
        self.looks_at_positions = self.rotary is not None
        self.permutation_equivariant = self.rotary is None

    def check(self, sizes: HeadSizes, layout: Layout) -> None:
        if self.rotary is not None:
            self.rotary.check(sizes.key_size, layout.axes)

    def weights(
        self, q: jax.Array, k: jax.Array, view: View, *, edits: Edits | None = None, owner: nnx.Module | None = None
    ) -> jax.Array:
        """Weights `(B, H, N, M)` in float32 of queries `(B, N, H, D)` on keys `(B, M, G, D)`, both rotated.

        It visits the point `scores` through `self.edited`.
        """
        raise NotImplementedError

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        view: View,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
        owner: nnx.Module | None = None,
    ) -> jax.Array:
        """`(B, N, H, E)` from rotated queries and keys and the values."""
        weights = self.weights(q, k, view, edits=edits, owner=owner)
        weights = self.edited(edits, owner, "attention", weights, q=q, k=k, v=v, view=view)
        return weighted_values(self.drop(weights, deterministic), v)

    def drop(self, weights: jax.Array, deterministic: bool) -> jax.Array:
        """Weights with some of them set to zero, in training."""
        if deterministic or self.dropout_rngs is None:
            return weights
        kept = jax.random.bernoulli(self.dropout_rngs(), 1 - self.dropout, weights.shape)
        return jnp.where(kept, weights / (1 - self.dropout), 0)

    def edited(
        self, edits: Edits | None, owner: nnx.Module | None, point: str, value: jax.Array, *, view: View, **about: Any
    ) -> jax.Array:
        """A point inside attention: edited, and recorded on the owner if there is one."""
        if acts(edits, point):
            about |= {"q_idx": view.q_idx, "k_idx": view.k_idx, "allowed": visible_keys(view)}
        return value if owner is None and edits is None else visit(owner or self, edits, point, value, **about)

    def init_cache(
        self,
        sizes: HeadSizes,
        batch_size: int,
        max_length: int,
        dtype: Any,
        *,
        context: Heads | None = None,
        context_mask: ArrayLike | None = None,
    ) -> KVCache | ContextCache:
        if context is None:
            return KVCache.create(batch_size, max_length, *sizes, dtype=dtype)
        k = self._rotate_keys(context.k, jnp.arange(max_length)[None])
        return ContextCache.create(k, context.v, context_mask, dtype=dtype)

    def __call__(
        self,
        heads: Heads,
        view: View,
        cache: KVCache | ContextCache | None = None,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
        owner: nnx.Module | None = None,
    ) -> tuple[jax.Array, Any]:
        q, k, v, view, cache = self.placed(heads, view, cache)
        return self.attend(q, k, v, view, edits=edits, deterministic=deterministic, owner=owner), cache

    def attention(self, heads: Heads, view: View) -> jax.Array:
        q, k, _, view, _ = self.placed(heads, view, None)
        return self.weights(q, k, view)

    def placed(
        self, heads: Heads, view: View, cache: KVCache | ContextCache | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, View, Any]:
        """Queries, keys and values as attended with, under the view of them all, and the new cache."""
        q, k, v = heads[:3]
        if cache is None:
            return self._rotate(q, view.q_at), self._rotate_keys(k, view.k_at), v, view, None
        tokens, real = q.shape[1], view.mask
        seen = jnp.cumsum(jnp.ones(q.shape[:2], bool) if real is None else real, axis=1, dtype=jnp.int32)
        q_idx = cache.length[:, None] + seen - 1
        q_at = cache.next_at[:, None] + seen - 1 if view.q_at is None else view.q_at
        q = self._rotate(q, q_at)
        if isinstance(cache, ContextCache):
            slots = jnp.arange(cache.keys.shape[1])[None]
            # Padding in front of a prompt would see no key in causal cross-attention: it has no order.
            view = View(rule=view.rule, q_at=q_at, k_at=slots, q_idx=q_idx, k_idx=slots, mask=cache.mask)
            last = jnp.max(jnp.broadcast_to(q_at, seen.shape), axis=1).astype(jnp.int32)
            cache = dataclasses.replace(
                cache, length=cache.length + seen[:, -1], next_at=jnp.maximum(cache.next_at, last + 1)
            )
            return q, cache.keys, cache.values, view, cache
        k = self._rotate_keys(k, q_at) if self.cache_rotated else k
        cache = cache.append(k, v, real, at=q_at, labels=view.q_labels)
        slots = jnp.arange(cache.max_length)[None]
        q_labels = -jnp.ones((1, tokens), jnp.int32) if view.q_labels is None else view.q_labels
        view = View(
            rule=view.rule,
            q_at=q_at,
            k_at=cache.at,
            q_idx=q_idx,
            k_idx=slots,
            q_labels=q_labels,
            k_labels=cache.labels,
            # Slots are in order, so the causal rule hides those that are still empty; another one need not.
            mask=None if view.rule == Causal() else slots < cache.length[:, None],
        )
        keys = cache.keys if self.cache_rotated else self._rotate_keys(cache.keys, cache.at)
        return q, keys, cache.values, view, cache

    def _rotate(self, x: jax.Array, at: ArrayLike) -> jax.Array:
        return x if self.rotary is None else self.rotary(x, at)

    def _rotate_keys(self, k: jax.Array, at: ArrayLike) -> jax.Array:
        return self._rotate(k, at) if self.rotate_keys else k


class SoftmaxCore(ProductCore):
    """Softmax of scaled products, in one fast call unless scores or weights are edited.

    Args:
      num_heads: query heads H, for ALiBi.
      alibi: whether scores fall with the distance; for sequences.
      bias: module whose call gives a bias broadcastable to `(B, H, N, M)`, or None.
      structural_mask: a rule on indices, such as `pallas_kernels.masks.SlidingWindow(127, 0)`.
      scale: of the scores; D^-1/2 when None.
      softcap: bound of the scores by tanh; none when None.
      block_size: queries per block, for memory linear in N and M; when None, all at once, but for long sequences on a
        CPU.
      kernel: `pallas_kernels.block_sparse_attention` where it takes the call, whose cost follows the blocks that rules
        and segments leave: "auto", or the name of an implementation; `attnlab.nn.softmax` when None.
      rngs: stream `dropout` if there is any.
      **options: those of `ProductCore`.

    Raises:
      ValueError: for options that exclude each other.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        alibi: bool = False,
        bias: nnx.Module | None = None,
        structural_mask: Mask | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        block_size: int | None = None,
        kernel: str | None = None,
        rngs: nnx.Rngs | None = None,
        **options: Any,
    ):
        super().__init__(**options, rngs=rngs)
        known = ("auto", *(entry.name for entry in dispatch.implementations("block_sparse_attention")))
        if kernel is not None and kernel not in known:
            raise ValueError(f"kernel must be None or one of {', '.join(known)}, got {kernel!r}")
        if kernel is not None and block_size is not None:
            raise ValueError("kernel does not go with block_size: it chooses its blocks itself")
        if block_size is not None and (alibi or self.dropout):
            raise ValueError("block_size does not go with alibi or attention_dropout: they are as large as the weights")
        self.num_heads, self.alibi, self.structural_mask = num_heads, alibi, structural_mask
        self.scale, self.softcap, self.block_size, self.kernel = scale, softcap, block_size, kernel
        self.bias = nnx.data(None) if bias is None else bias
        self.looks_at_positions |= alibi
        self.permutation_equivariant &= not alibi and structural_mask is None and bias is None

    def check(self, sizes: HeadSizes, layout: Layout) -> None:
        super().check(sizes, layout)
        if self.alibi and layout is not Layout.SEQUENCE:
            raise ValueError(f"alibi is a distance along a sequence, the layout is {layout}")

    def weights(
        self, q: jax.Array, k: jax.Array, view: View, *, edits: Edits | None = None, owner: nnx.Module | None = None
    ) -> jax.Array:
        scores = attention_scores(q, k, bias=self._bias(view), scale=self.scale, softcap=self.softcap)
        scores = self.edited(edits, owner, "scores", scores, view=view, q=q, k=k)
        return masked_softmax(scores, visible_keys(self._with_structure(view)))

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        view: View,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
        owner: nnx.Module | None = None,
    ) -> jax.Array:
        if acts(edits, "scores", "attention"):
            options = {"edits": edits, "deterministic": deterministic}
            # A bias has all rows, and so has what is recorded.
            if not edits.last_row_only or self.bias is not None or hasattr(owner, "__captures__"):
                return super().attend(q, k, v, view, **options, owner=owner)
            last = super().attend(q[:, -1:], k, v, _last_row(view), **options)
            return self.attend(q, k, v, view, deterministic=deterministic).at[:, -1:].set(last)
        score = {"bias": self._bias(view), "scale": self.scale, "softcap": self.softcap}
        if owner is not None:
            record(owner, "scores", lambda: attention_scores(q, k, **score))
            record(owner, "attention", lambda: self.weights(q, k, view))
        dropout = {}
        if not deterministic and self.dropout_rngs is not None:
            dropout = {"dropout_rate": self.dropout, "dropout_key": self.dropout_rngs()}
        whole = self._with_structure(view)
        if self.kernel is not None and not dropout and not self._at_labels(whole):
            y = on_kernel(q, k, v, whole, self.kernel, **score)
            if y is not None:
                return y
        return softmax_attention(q, k, v, **self._who(view), **score, block_size=self.block_size, **dropout)

    def _who(self, view: View) -> dict[str, Any]:
        """The view as arguments of the op, which takes rules on indices as they are."""
        view = self._with_structure(view)
        if self._at_labels(view):
            return {"mask": visible_keys(view)}
        return {
            "mask": view.mask,
            "segment_ids": view.segment_ids,
            "structural_mask": view.rule,
            "q_idx": view.q_idx,
            "k_idx": view.k_idx,
        }

    def _at_labels(self, view: View) -> bool:
        return view.rule is not None and _looks_at_labels(view.rule)

    def _with_structure(self, view: View) -> View:
        if self.structural_mask is None:
            return view
        rule = self.structural_mask if view.rule is None else view.rule & self.structural_mask
        return dataclasses.replace(view, rule=rule)

    def _bias(self, view: View) -> jax.Array | None:
        terms = [] if self.bias is None else [self.bias()]
        if self.alibi:
            terms.append(alibi_bias(alibi_slopes(self.num_heads), view.q_at, view.k_at))
        return sum(terms) if terms else None


def _last_row(view: View) -> View:
    """What a complete view says of the last query."""

    def last(rows: jax.Array | None) -> jax.Array | None:
        return None if rows is None else rows[:, -1:]

    pair = None if view.segment_ids is None else segment_pair(view.segment_ids)
    return dataclasses.replace(
        view,
        q_at=last(view.q_at),
        q_idx=last(view.q_idx),
        q_labels=last(view.q_labels),
        segment_ids=None if pair is None else (last(pair[0]), pair[1]),
        mask=view.mask if view.mask is None or view.mask.ndim == 2 else view.mask[:, :, -1:],
    )


def _looks_at_labels(rule: Mask) -> bool:
    match rule:
        case LabelRule():
            return True
        case And(first, second) | Or(first, second):
            return _looks_at_labels(first) or _looks_at_labels(second)
        case Not(part):
            return _looks_at_labels(part)
    return False
