"""Mixture of block attention, MoBA (Lu et al., 2025, arXiv:2502.13189), code at MoonshotAI/MoBA.

A causal sequence is cut into chunks of c tokens. Each query of each head attends to its own chunk, causally, and to the
K - 1 earlier chunks whose mean key it matches best:

    k̄_s = mean of k over chunk s,   g_is = q_i·k̄_s                          not scaled, in float32
    S_i = the K - 1 largest g_is among the chunks that end before i's own
    y_i = softmax(q_i k_tᵀ / √D) v_t     over t ≤ i in i's own chunk, and over all t of the chunks in S_i

The choice has no gradient. Rotary positions come before it. Chunks are counted from the start of each packed segment,
among the tokens that exist. Work is O(N·K·c·D) beside the scores of chunks, whatever is chosen: one call of the op, on
pairs of a query and a chunk that are sorted by chunk (`attnlab.nn.chosen_blocks`).

Decoding keeps the sums of the keys of each chunk beside the keys, and visits K chunks a step. The authors' wrapper
decodes with full attention; here a step is what training computed.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, Pattern, UnsupportedArgument, View, record
from attnlab.nn.cache import KVCache
from attnlab.nn.chosen_blocks import attend_pairs, block_means, block_scores, largest
from attnlab.nn.dense_mixer import Core, Heads, HeadSizes
from attnlab.nn.masking import masked_softmax, segment_pair, segment_positions
from attnlab.nn.plain_core import check_causal
from attnlab.nn.projected_mixer import ProjectedMixer
from attnlab.nn.ring_cache import BlockMeans
from attnlab.nn.rotary import Rotary
from attnlab.nn.softmax import attention_scores
from attnlab.nn.softmax_core import ProductCore
from attnlab.points import Edits
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.block_sparse_attention import Blocks, paged_attention


class Chunks(NamedTuple):
    """Where N queries and M keys stand among chunks.

    Attributes:
      q_own: number of each query's own chunk among all, `(B|1, N)`; -1 for none.
      k_own: likewise of keys, `(B|1, M)`; -1 for a key that does not exist.
      until: index of the last key that a query may see, `(B|1, N)`.
      whole: number of each key's chunk among the S whole ones, `(B|1, M)`; -1 for none.
      numbers: number of each whole chunk among all, `(B|1, S)`.
      first: a query may choose the whole chunks first..last-1, `(B|1, N)`.
      last: see `first`.
    """

    q_own: jax.Array
    k_own: jax.Array
    until: jax.Array
    whole: jax.Array
    numbers: jax.Array
    first: jax.Array
    last: jax.Array


def chunks_of(
    num_tokens: int, size: int, segment_ids: ArrayLike | None = None, mask: ArrayLike | None = None
) -> Chunks:
    """Chunks of `size` tokens of a sequence that attends to itself; S = N // size.

    Args:
      num_tokens: N.
      size: c.
      segment_ids: `(B, N)`: each run of equal ids has chunks of its own.
      mask: `(B, N)` boolean, which tokens exist; the others are not counted.
    """
    index = jnp.arange(num_tokens, dtype=jnp.int32)[None]
    if segment_ids is None and mask is None:
        own = index // size
        numbers = jnp.arange(num_tokens // size, dtype=jnp.int32)[None]
        whole = jnp.where(own < num_tokens // size, own, -1)
        return Chunks(own, own, index, whole, numbers, jnp.zeros_like(own), own)
    given: Any = mask if segment_ids is None else segment_ids
    shape = jnp.shape(given)
    real = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask)
    ids = jnp.zeros(shape, jnp.int32) if segment_ids is None else segment_pair(segment_ids)[0]
    start = index - segment_positions(ids)

    def counted(flags: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """How many up to each token, before it, and before its segment."""
        upto = jnp.cumsum(flags, axis=1, dtype=jnp.int32)
        before = upto - flags.astype(jnp.int32)
        return upto, before, jnp.take_along_axis(before, start, axis=1)

    seen, _, earlier = counted(real)
    place = seen - earlier - 1  # of padding that of the token before it, -1 at the start
    number = counted(real & (place % size == 0))[0] - 1
    completes = real & (place % size == size - 1)
    _, done, first = counted(completes)
    rows, at = jnp.arange(shape[0])[:, None], jnp.maximum(number, 0)
    complete = jnp.zeros(shape, bool).at[rows, at].max(completes)[rows, at]
    numbers = jnp.zeros((shape[0], num_tokens // size), jnp.int32)
    # Beyond the last, so that it is dropped, what completes nothing.
    numbers = numbers.at[rows, jnp.where(completes, done, num_tokens)].set(number, mode="drop")
    return Chunks(
        jnp.where(place >= 0, number, -1),
        jnp.where(real, number, -1),
        index,
        jnp.where(real & complete, done, -1),
        numbers,
        first,
        first + jnp.maximum(place, 0) // size,
    )


def cached_chunks(place: jax.Array, slots: int, size: int) -> Chunks:
    """Chunks of a cache in whose slots tokens stand in order, for queries at `place` `(B, N)`; S = slots / size."""
    own, keys = place // size, jnp.arange(slots, dtype=jnp.int32)[None] // size
    return Chunks(own, keys, place, keys, keys[:, ::size], jnp.zeros_like(own), own)


def choose_chunks(q: jax.Array, means: jax.Array, at: Chunks, topk: int) -> jax.Array:
    """Chunks of each query, those that it chose and its own, `(B, H, N, K')` int32; one that no key has for none."""
    none = jnp.iinfo(jnp.int32).max // 4
    shape = (q.shape[0], q.shape[2], q.shape[1])
    own = jnp.broadcast_to(jnp.where(at.q_own < 0, none, at.q_own)[:, None], shape)[..., None]
    count = min(topk - 1, means.shape[1])
    if count == 0:
        return own
    index = jnp.arange(means.shape[1])
    allowed = (index >= at.first[..., None]) & (index < at.last[..., None])
    score, place = largest(jnp.where(allowed[:, None], block_scores(q, means), -jnp.inf), count)
    numbers = jnp.broadcast_to(at.numbers[:, None, None], (*place.shape[:3], at.numbers.shape[-1]))
    chosen = jnp.where(score > -jnp.inf, jnp.take_along_axis(numbers, place, axis=-1), none)
    return jnp.concatenate([chosen, own], axis=-1)


def moba_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    chunk_size: int,
    topk: int,
    segment_ids: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention to each query's own chunk and to those that it chooses.

    Args:
      q: queries, (B, N, H, D), rotated.
      k: keys, (B, N, G, D), rotated, G a divisor of H.
      v: values, (B, N, G, E).
      chunk_size: c, tokens of a chunk.
      topk: K, chunks of a query, its own included.
      segment_ids: integers (B, N), packed sequences: runs of equal ids.
      mask: boolean (B, N), which tokens exist.
      scale: of the token scores; D^-1/2 when None.
      implementation: of `block_sparse_attention`.

    Returns:
      (B, N, H, E) in the dtype of `q`.

    Raises:
      ValueError: for a size below 1.
    """
    _check(chunk_size, topk)
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    at = chunks_of(q.shape[1], chunk_size, segment_ids, mask)
    chosen = choose_chunks(q, block_means(k, at.whole, q.shape[1] // chunk_size)[0], at, topk)
    return _attend(q, k, v, chosen, at, scale=scale, implementation=implementation)


def _check(chunk_size: int, topk: int) -> None:
    if chunk_size < 1 or topk < 1:
        raise ValueError(f"chunk_size and topk must be at least 1, got {chunk_size} and {topk}")


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, chosen: jax.Array, at: Chunks, **options: Any) -> jax.Array:
    rows = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32)[:, None], chosen.shape)
    rows, pairs = (each.reshape(*chosen.shape[:2], -1) for each in (rows, chosen))
    return attend_pairs(q, k, v, rows, pairs, at.k_own, until=at.until, **options)


def visible_tokens(chosen: jax.Array, at: Chunks) -> jax.Array:
    """Which keys each query attends to, `(B, H, N, M)`, to look at."""
    keys = jnp.arange(at.k_own.shape[-1])
    in_chosen = (chosen[..., None] == at.k_own[:, None, None, None]).any(-2)
    return in_chosen & (keys <= at.until[:, :, None])[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkCache:
    """A cache of all tokens, and what chunks are chosen by.

    Attributes:
      tokens: keys and values; its slots are whole chunks.
      means: of the keys of each chunk.
    """

    tokens: KVCache
    means: BlockMeans

    @property
    def length(self) -> jax.Array:
        """`(B,)` int32, tokens stored."""
        return self.tokens.length


class ChosenChunkCore(ProductCore):
    """The attention above, between the projections of any causal mixer of sequences; scores are not edited in it.

    Args:
      chunk_size: c, tokens of a chunk.
      topk: K, chunks of a query, its own included.
      rotary: rotary positions, or theta for `Rotary(theta)`; none when None.
      scale: of the token scores; D^-1/2 when None.

    Raises:
      ValueError: for a size below 1.
    """

    points = frozenset()

    def __init__(self, *, chunk_size: int, topk: int, rotary: Rotary | float | None = None, scale: float | None = None):
        super().__init__(rotary=rotary)
        _check(chunk_size, topk)
        self.chunk_size, self.topk, self.scale = int(chunk_size), int(topk), scale
        self.permutation_equivariant = False

    def init_cache(
        self,
        sizes: HeadSizes,
        batch_size: int,
        max_length: int,
        dtype: Any,
        *,
        context: Heads | None = None,
        context_mask: ArrayLike | None = None,
    ) -> Any:
        if context is not None:
            raise UnsupportedArgument("context: chunks are chosen among the tokens of the sequence itself")
        slots = -(-max_length // self.chunk_size) * self.chunk_size
        means = BlockMeans.create(batch_size, slots, self.chunk_size, sizes.num_kv_heads, sizes.key_size)
        return ChunkCache(KVCache.create(batch_size, slots, *sizes, dtype=dtype), means)

    def __call__(
        self,
        heads: Heads,
        view: View,
        cache: Any = None,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
        owner: nnx.Module | None = None,
    ) -> tuple[jax.Array, Any]:
        q, k, v, chosen, at, new = self._placed(heads, view, cache)
        if owner is not None:
            record(owner, "attention", lambda: self._weights(q, k, chosen, at))
        if new is not None:
            q = q.astype(k.dtype)  # of the two that is small
        if new is not None and q.shape[1] == 1:
            y = self._step(q, k, v, chosen, new.length)
        else:
            y = _attend(q, k, v, chosen, at, scale=self.scale)
        return y.astype(heads.v.dtype), new

    def attention(self, heads: Heads, view: View) -> jax.Array:
        q, k, _, chosen, at, _ = self._placed(heads, view, None)
        return self._weights(q, k, chosen, at)

    def _placed(self, heads: Heads, view: View, cache: Any) -> tuple[Any, ...]:
        """Queries, keys and values as attended with, chunks of queries, where all stand, and the new cache."""
        check_causal(self, view, segments=True)
        q, k, v, placed, tokens = self.placed(heads, view, None if cache is None else cache.tokens)
        if cache is None:
            at = chunks_of(q.shape[1], self.chunk_size, view.segment_ids, view.mask)
            means, new = block_means(k, at.whole, q.shape[1] // self.chunk_size)[0], None
        else:
            at = cached_chunks(placed.q_idx, k.shape[1], self.chunk_size)
            sums = cache.means.append(self._rotate_keys(heads.k, placed.q_at), view.mask)
            means, new = sums.means(), ChunkCache(tokens, sums)
        return q, k, v, choose_chunks(q, means, at, self.topk), at, new

    def _step(self, q: jax.Array, k: jax.Array, v: jax.Array, chosen: jax.Array, length: jax.Array) -> jax.Array:
        """One query for each example, of which K chunks of the cache are read."""
        batch, pages = k.shape[0], k.shape[1] // self.chunk_size
        blocks = Blocks.from_indices(chosen, 1, self.chunk_size, valid=chosen < pages)
        keys, values = (a.reshape(batch * pages, self.chunk_size, *a.shape[2:]) for a in (k, v))
        table = jnp.arange(batch * pages, dtype=jnp.int32).reshape(batch, pages)
        return jnp.asarray(paged_attention(q, keys, values, table, length, blocks=blocks, scale=self.scale))

    def _weights(self, q: jax.Array, k: jax.Array, chosen: jax.Array, at: Chunks) -> jax.Array:
        return masked_softmax(attention_scores(q, k, scale=self.scale), visible_tokens(chosen, at))


@register(
    "vmoba.moba",
    paper=Paper("MoBA: Mixture of Block Attention for Long-Context LLMs", "Lu et al.", 2025, arxiv="2502.13189"),
    source=Source.AUTHORS_CODE,
    repository="MoonshotAI/MoBA",
    cost=Cost(
        time="O(N·(K·c + N/c)·H·(D+E)), a step O((K·c + N/c)·H·(D+E))",
        memory="O(N·(K·(D+E) + N/c)·H)",
        state="M·G·(D+E) + M/c·G·D",
    ),
    kernel="block_sparse_attention",
    summary="each query attends to its own chunk and to the earlier chunks whose mean key it matches best",
    small={"chunk_size": 3, "topk": 2},
)
class MixtureOfBlockAttention(ProjectedMixer):
    """Causal sequences to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      chunk_size: c, tokens of a chunk.
      topk: K, chunks of a query, its own included.
      causal: True; there is no other form.
      rotary: rotary positions, or theta for `Rotary(theta)`; none when None.
      scale: of the token scores; D^-1/2 when None.
      rngs: stream `params`, and `dropout` if there is any.
      **projections: sizes and biases of the projections: see `ProjectedMixer`.

    Raises:
      ValueError: for sizes that do not fit, or a pattern or layout that there is not.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF})
    layouts = frozenset({Layout.SEQUENCE})

    def __init__(
        self,
        features: int,
        *,
        chunk_size: int = 512,
        topk: int = 3,
        causal: bool = True,
        rotary: Rotary | float | None = None,
        scale: float | None = None,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        super().__init__(features, causal=causal, **projections, rngs=rngs)
        if not causal or self.layout is not Layout.SEQUENCE or self.context_features is not None:
            raise UnsupportedArgument("MixtureOfBlockAttention is causal self-attention of sequences")
        self.set_core(ChosenChunkCore(chunk_size=chunk_size, topk=topk, rotary=rotary, scale=scale))

    def set_core(self, core: Core) -> None:
        super().set_core(core)
        if isinstance(core, ChosenChunkCore):
            self.accepts -= {"mask", "rule"}
