"""Blocks of earlier tokens that are found again by their landmarks (Mohtashami and Jaggi, 2023, arXiv:2305.16300).

A text of any length is read in runs. Blocks of F tokens and a landmark that are complete go to a ring of Z, the oldest
making room; of these, every query sees the K whose landmarks it weighs most, together with the open block and the run:

    1. landmarks of the K newest blocks stand in the slots 1..K of F + 1 places, those of all older ones in slot 0;
       p = softmax(R q · R m_z / √D) over all blocks, and the K largest, of each query and head, or after the maximum
       over heads or over the run's tokens
    2. these K, the oldest first, stand in the slots 0..K-1, one further for those among the K newest
    3. the run stands from place min(blocks, K + 1)·(F + 1) on, behind the open block: positions never grow
    4. the grouped softmax runs over them all, where a block counts by its landmark's score s_z:
       y = merge((y_run, lse_run), (y_z, s_z), …),   y_z attention inside block z alone

Positions of blocks follow from the query: keys are kept rotated by their place in the block, and a query turns back by
the slot of the block that it looks at, (R(p - s (F + 1)) q)·(R(f) k). So for each of the K, blocks are gathered as they
are kept, and a token costs O(Z·D) for landmarks and O(K·F·D) for blocks. While there are fewer than K blocks, all are
seen at their own places. Memories have no gradient.
"""

import dataclasses
from typing import Any, Literal, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.nn.cache import check_sizes
from attnlab.nn.dense_mixer import HeadSizes
from attnlab.nn.landmarks import SoftmaxName, landmark_attention
from attnlab.nn.masking import masked_softmax
from attnlab.nn.rotary import Rotary
from attnlab.nn.softmax import attention_scores
from pallas_kernels.block_sparse_attention import block_sparse_attention, merge_attention
from pallas_kernels.dtypes import at_least_float32

Selection = Literal["per_token_and_head", "max_over_heads", "max_over_tokens"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LandmarkMemory:
    """Complete blocks of a layer, and its open one.

    Attributes:
      keys: of tokens, `(B, Z, F, G, D)`, rotated by their places in the block.
      values: `(B, Z, F, G, E)`.
      landmarks: keys of the landmarks, `(B, Z, G, D)`, rotated likewise.
      open_keys: of the block that is not complete, `(B, o, G, D)`, o at most F, not rotated.
      open_values: `(B, o, G, E)`.
      blocks: () int32, complete blocks so far; number n is in slot n mod Z.
    """

    keys: jax.Array
    values: jax.Array
    landmarks: jax.Array
    open_keys: jax.Array
    open_values: jax.Array
    blocks: jax.Array

    @classmethod
    def create(cls, batch_size: int, blocks: int, frequency: int, sizes: HeadSizes, *, dtype: Any = None) -> Self:
        """An empty memory for `blocks` blocks of `frequency` tokens; float32 when `dtype` is None.

        Raises:
          ValueError: if a size is below 1.
        """
        check_sizes(batch_size=batch_size, blocks=blocks, frequency=frequency)
        groups, key_size, value_size = sizes
        dtype = jnp.float32 if dtype is None else dtype
        kept, none = (batch_size, blocks, frequency, groups), (batch_size, 0, groups)
        return cls(
            jnp.zeros((*kept, key_size), dtype),
            jnp.zeros((*kept, value_size), dtype),
            jnp.zeros((batch_size, blocks, groups, key_size), dtype),
            jnp.zeros((*none, key_size), dtype),
            jnp.zeros((*none, value_size), dtype),
            jnp.zeros((), jnp.int32),
        )

    @property
    def block_length(self) -> int:
        """F + 1, tokens of a block with its landmark."""
        return self.keys.shape[2] + 1

    @property
    def length(self) -> jax.Array:
        """`(B,)` int32, tokens seen, landmarks among them."""
        return jnp.full(self.keys.shape[:1], self.blocks * self.block_length + self.open_keys.shape[1], jnp.int32)

    def is_landmark(self, tokens: int) -> np.ndarray:
        """Which of the next tokens are landmarks, `(tokens,)` boolean."""
        return (self.open_keys.shape[1] + np.arange(tokens)) % self.block_length == self.block_length - 1

    def numbers(self) -> jax.Array:
        """The number of the block in each slot, `(Z,)` int32; -1 where there is none."""
        slots = jnp.arange(self.keys.shape[1], dtype=jnp.int32)
        rounds = jnp.maximum(self.blocks - 1 - slots, 0) // slots.size
        return jnp.where(slots < self.blocks, slots + rounds * slots.size, -1)

    def extended(self, k: jax.Array, v: jax.Array, rotary: Rotary | None) -> Self:
        """With the keys and values of a run `(B, N, G, ·)`, keys as projected."""
        k, v = (jax.lax.stop_gradient(a) for a in (k, v))
        k = jnp.concatenate([self.open_keys.astype(k.dtype), k], 1)
        v = jnp.concatenate([self.open_values.astype(v.dtype), v], 1)
        length, slots = self.block_length, self.keys.shape[1]
        whole = k.shape[1] // length
        open_parts = (a[:, whole * length :] for a in (k, v))
        kept = min(whole, slots)
        first = (whole - kept) * length
        turned = _turned(k[:, first : whole * length], jnp.arange(kept * length)[None] % length, rotary)
        blocks = (a.reshape(a.shape[0], kept, length, *a.shape[2:]) for a in (turned, v[:, first : whole * length]))
        new_keys, new_values = blocks
        where = (self.blocks + whole - kept + jnp.arange(kept)) % slots

        def store(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[:, where].set(new.astype(old.dtype))

        return type(self)(
            store(self.keys, new_keys[:, :, :-1]),
            store(self.values, new_values[:, :, :-1]),
            store(self.landmarks, new_keys[:, :, -1]),
            *(a.astype(self.keys.dtype) for a in open_parts),
            self.blocks + whole,
        )


def check_retrieval(topk: int, selection: str) -> None:
    """Raises `ValueError` for options out of range."""
    if topk < 0:
        raise ValueError(f"topk must be at least 0, got {topk}")
    if selection not in get_args(Selection):
        raise ValueError(f"selection must be one of {', '.join(get_args(Selection))}, got {selection!r}")


def _turned(x: jax.Array, at: jax.Array, rotary: Rotary | None) -> jax.Array:
    return x if rotary is None else rotary(x, at)


def _turned_by_head(x: jax.Array, at: jax.Array, rotary: Rotary | None) -> jax.Array:
    """Heads `(B, N, H, D)` at places `(B, H, N)` of their own."""
    if rotary is None:
        return x
    flat = jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], 1, x.shape[3])
    turned = rotary(flat, at.reshape(-1, x.shape[1]))
    return jnp.swapaxes(turned.reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3]), 1, 2)


def chosen_blocks(
    q: jax.Array, memory: LandmarkMemory, topk: int, selection: Selection, rotary: Rotary | None, scale: float | None
) -> jax.Array:
    """Numbers of the blocks that queries retrieve, the oldest first.

    Args:
      q: rotated queries `(B, N, H, D)`.
      memory: of the blocks.
      topk: K.
      selection: by whom blocks are chosen.
      rotary: rotary positions, or None.
      scale: of the scores.

    Returns:
      `(B, H, N, min(K, Z))` int32; -1, at the end, for none.
    """
    numbers, slots = memory.numbers(), memory.keys.shape[1]
    age = memory.blocks - 1 - numbers
    place = jnp.where(age < topk, topk - age, 0) * memory.block_length
    keys = _turned(memory.landmarks.astype(q.dtype), place[None], rotary)
    weights = masked_softmax(attention_scores(q, keys, scale=scale), (numbers >= 0)[None, None, None])
    if selection == "max_over_heads":
        weights = jnp.broadcast_to(weights.max(1, keepdims=True), weights.shape)
    if selection == "max_over_tokens":
        weights = jnp.broadcast_to(weights.max(2, keepdims=True), weights.shape)
    weights = jnp.where(numbers >= 0, weights, -1)
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(weights), min(topk, slots))
    chosen = numbers[chosen]
    last = jnp.iinfo(jnp.int32).max
    chosen = jnp.sort(jnp.where(chosen < 0, last, chosen), axis=-1)
    return jnp.where(chosen == last, -1, chosen)


def attend_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    memory: LandmarkMemory,
    *,
    topk: int,
    selection: Selection = "per_token_and_head",
    rotary: Rotary | None = None,
    softmax: SoftmaxName = "grouped",
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, LandmarkMemory]:
    """A run of tokens behind a memory.

    Args:
      q: queries `(B, N, H, D)` as projected, without positions.
      k: keys `(B, N, G, D)` likewise; which of the tokens are landmarks follows from the memory.
      v: values `(B, N, G, E)`.
      memory: of the tokens before.
      topk: blocks K that each query retrieves; none with 0.
      selection: each query and head for itself, or all heads together, or all tokens of the run, by the largest weight
        of any of them.
      rotary: rotary positions, or None.
      softmax: must be "grouped" where blocks are retrieved.
      scale: of the scores; D^-1/2 when None.
      implementation: of `block_sparse_attention`; the best one when None.

    Returns:
      `(B, N, H, E)` in the dtype of q, and the memory with the run.

    Raises:
      ValueError: for options out of range.
    """
    check_retrieval(topk, selection)
    if topk and softmax != "grouped":
        raise ValueError(f"softmax must be 'grouped' where blocks are retrieved, got {softmax!r}")
    (batch, count, heads, size), length = q.shape, memory.block_length
    slots, frequency, groups = memory.keys.shape[1:4]
    opened = memory.open_keys.shape[1]
    topk = min(topk, slots)
    start = jnp.minimum(memory.blocks, topk + 1) * length
    at = start + opened + jnp.arange(count)[None]
    turned = _turned(q, at, rotary)
    local_k, local_v = (
        jnp.concatenate([jax.lax.stop_gradient(old).astype(q.dtype), new], 1)
        for old, new in ((memory.open_keys, k), (memory.open_values, v))
    )
    local_k = _turned(local_k, start + jnp.arange(opened + count)[None], rotary)
    given: dict[str, Any] = {"scale": scale, "return_lse": True, "implementation": implementation}
    y, lse = landmark_attention(turned, local_k, local_v, length, index=opened, softmax=softmax, **given)
    parts = [(y.astype(lse.dtype), lse)]
    if topk:
        old = jax.lax.stop_gradient(memory)
        chosen = chosen_blocks(turned, old, topk, selection, rotary, scale)
        own = old.blocks < topk  # all blocks are seen then, where they stand
        group = jnp.arange(heads)[:, None] // (heads // groups)
        each = jnp.arange(batch)[:, None, None]
        for rank in range(topk):
            number = chosen[..., rank]
            shift = rank + ((old.blocks - 1 - number < topk) & ~own).astype(jnp.int32)
            back = _turned_by_head(q, at[:, None] - shift * length, rotary)
            slot = jnp.maximum(number, 0) % slots
            keys, values = (  # (B, H, N, F, ·)
                a[each, slot, :, group].astype(q.dtype) for a in (old.keys, old.values)
            )
            flat_k, flat_v = (
                jnp.moveaxis(a, 1, 3).reshape(batch * count, frequency, heads, -1) for a in (keys, values)
            )
            inside = block_sparse_attention(
                back.reshape(batch * count, 1, heads, size), flat_k, flat_v, scale=scale, implementation=implementation
            )
            closing = old.landmarks[each, slot, group].astype(q.dtype)
            gate = jnp.einsum("bnhd,bhnd->bnh", back, closing, preferred_element_type=at_least_float32(q.dtype))
            gate = gate * (size**-0.5 if scale is None else scale)
            gate = jnp.where(jnp.swapaxes(number, 1, 2) >= 0, gate, -jnp.inf)
            parts.append((jnp.asarray(inside).reshape(batch, count, heads, -1).astype(lse.dtype), gate))
    return merge_attention(parts)[0].astype(q.dtype), memory.extended(k, v, rotary)
