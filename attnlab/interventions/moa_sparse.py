"""Mixture of sparse attention with elastic rules, MoA (Fu et al., 2024, arXiv:2406.14909), code at thu-nics/MoA.

Each head of a trained causal model sees a window whose span grows with the length N by a rule of its own, and a sink:

    S_h(N) = α_h + β_h N tokens
    prefill, in blocks of b tokens:  w_h = ⌊α_h / b⌋ + β_h ⌊N / b⌋, cut to an integer, at least 1;
                                     block r of queries sees blocks r - w_h + 1, …, r and block 0, causally
    decoding:  head h keeps α_h + β_h N tokens, N the prompt and what will be generated: at most N, at least a minimum,
               rounded up to whole pages; the first of them are the first tokens, the others the newest

`elastic_layout` and `elastic_mask` are prefill's masks as arrays, `cache_sizes` the sizes in decoding. `ElasticCore`
runs both: rules of indices for each head in prefill, a ring of each head's own length in decoding, of which a step
reads what that head keeps. `with_plan` puts a plan into a model; `attnlab.analysis.moa_sparse` finds one.

    model = with_plan(model, Plan(alphas=[[0.0, 512.0], …], betas=[[0.5, 0.0], …]))

The two phases see different tokens by design: a step's window ends at its own token, a block's at the block's end. Runs
of a prompt in several prefills see of earlier runs what the cache has kept until then.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, UnsupportedArgument, View, record
from attnlab.nn.cache import slots_of
from attnlab.nn.dense_mixer import Core, DenseMixer, Heads, HeadSizes, with_core
from attnlab.nn.masking import masked_softmax
from attnlab.nn.plain_core import check_causal, plain_softmax
from attnlab.nn.ring_cache import RingCache
from attnlab.nn.rotary import Rotary
from attnlab.nn.softmax import attention_scores
from attnlab.nn.softmax_core import ProductCore
from attnlab.points import Edits
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.array_masks import ArrayMask
from pallas_kernels.block_masks import BlockWindow
from pallas_kernels.block_sparse_attention import block_sparse_attention, merge_attention, paged_attention
from pallas_kernels.masks import Causal, Mask, PerHead, Prefix

ModelT = TypeVar("ModelT", bound=nnx.Module)

PAPER = Paper(
    "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
    "Fu et al.",
    2024,
    arxiv="2406.14909",
    number=63,
)


def elastic_band(alpha: ArrayLike, beta: ArrayLike, num_tokens: Any, block_size: int) -> Any:
    """w, blocks that a query block sees up to its own, at least 1; of NumPy where the arguments are.

    Args:
      alpha: α, tokens.
      beta: β.
      num_tokens: N.
      block_size: b.
    """
    lib = jnp if any(isinstance(x, jax.Array) for x in (alpha, beta, num_tokens)) else np
    span = lib.asarray(alpha) // block_size + lib.asarray(beta) * (num_tokens // block_size)
    return lib.maximum(lib.trunc(span).astype(np.int32), 1)


def elastic_layout(alpha: ArrayLike, beta: ArrayLike, num_tokens: int, *, block_size: int = 64) -> jax.Array:
    """Which blocks of keys each block of queries sees in prefill.

    Args:
      alpha: α of each head, (H,).
      beta: β of each head, (H,).
      num_tokens: N; what is beyond the last whole block is left out.
      block_size: b.

    Returns:
      (H, N // b, N // b) boolean.
    """
    blocks = jnp.arange(num_tokens // block_size)
    band = elastic_band(jnp.asarray(alpha), jnp.asarray(beta), num_tokens, block_size)[:, None, None]
    behind = blocks[:, None] - blocks
    return (behind >= 0) & ((behind < band) | (blocks == 0))


def elastic_mask(alpha: ArrayLike, beta: ArrayLike, num_tokens: int, *, block_size: int = 64) -> jax.Array:
    """Which keys each query sees in prefill, (H, N, N) boolean; arguments as `elastic_layout`, any N."""
    index = jnp.arange(num_tokens)
    band = elastic_band(jnp.asarray(alpha), jnp.asarray(beta), num_tokens, block_size)[:, None, None]
    near = index[:, None] // block_size - index // block_size < band
    return (index <= index[:, None]) & (near | (index < block_size))


def elastic_rule(alpha: float, beta: float, num_tokens: int, block_size: int) -> Mask:
    """One head's mask of prefill as a rule on indices."""
    band = int(elastic_band(alpha, beta, num_tokens, block_size))
    return Causal() & (BlockWindow(block_size, band - 1, 0) | Prefix(block_size))


class CacheSizes(NamedTuple):
    """Tokens that heads keep in decoding.

    Attributes:
      size: all of them, int32 in the shape of the rules.
      static: how many of those are the first tokens.
    """

    size: np.ndarray
    static: np.ndarray


def cache_sizes(
    alpha: ArrayLike,
    beta: ArrayLike,
    prompt_length: int,
    max_new_tokens: int,
    *,
    sink_size: int = 64,
    minimum_size: int = 128,
    page_size: int = 64,
) -> CacheSizes:
    """Sizes of caches.

    Args:
      alpha: α of each head, any shape.
      beta: β, the same shape.
      prompt_length: tokens of the prompt.
      max_new_tokens: tokens that will be generated at most.
      sink_size: first tokens that are kept.
      minimum_size: least size.
      page_size: sizes are rounded up to its multiples.
    """
    length = prompt_length + max_new_tokens
    # In their own precision: 600 · 0.7 is 420 in float32 and in float64, but not if one is made the other.
    span = np.trunc(np.asarray(alpha) + np.asarray(beta) * length)
    size = np.maximum(np.minimum(span, length), minimum_size).astype(np.int32)
    size = -(-size // page_size) * page_size
    return CacheSizes(size, np.minimum(size, sink_size))


class Plan(NamedTuple):
    """The rules of a model.

    Attributes:
      alphas: α of each layer and key head.
      betas: β of each layer and key head.
    """

    alphas: Sequence[Sequence[float]]
    betas: Sequence[Sequence[float]]


@functools.cache  # rules are compared by identity
def _in_prefill(block_size: int) -> Callable[..., Any]:
    """The rule of prefill on the places of tokens; `first` is where a query's window begins."""
    return lambda i, j, place, first, key: (key >= 0) & (key <= place) & ((key >= first) | (key < block_size))


def _kept(i: Any, j: Any, sinks: Any, oldest: Any, key: Any) -> Any:
    return (key >= 0) & ((key < sinks) | (key >= oldest))


def _example() -> Example:
    from attnlab.interventions.examples import small_language_model

    tokens, model = small_language_model()
    plan = Plan([[0.0, 2.0]] * 2, [[0.0, 0.5]] * 2)
    return Example(with_plan(model, plan, block_size=2), (tokens,), differentiable=())


@register(
    "moa_sparse",
    kind=Kind.INTERVENTION,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="thu-nics/MoA",
    cost=Cost("O(N·Σ_h S_h·(D+E)), a step O(Σ_h S_h·(D+E))", "O(N·H·(D+E))", state="max_h S_h·G·(D+E)"),
    kernel="block_sparse_attention",
    summary="each head sees a sink and a window of its own span, which grows with the length by its own rule",
    small=_example,
)
class ElasticCore(ProductCore):
    """That attention between the projections of a causal mixer of sequences; scores are not edited in it.

    Args:
      alphas: α of each key head, (G,) numbers of tokens; query heads of a group share their rule.
      betas: β of each key head, (G,).
      block_size: b, tokens of a block in prefill; the sink there is one block.
      sink_size: first tokens that are kept in decoding.
      minimum_size: least size of a head's cache.
      page_size: sizes are rounded up to its multiples, which a step reads together.
      rotary: rotary positions, or theta for `Rotary(theta)`; none when None.
      scale: of the scores; D^-1/2 when None.

    Raises:
      ValueError: for rules that are not as many, or sizes below 1.
    """

    points = frozenset()

    def __init__(
        self,
        alphas: Sequence[float],
        betas: Sequence[float],
        *,
        block_size: int = 64,
        sink_size: int = 64,
        minimum_size: int = 128,
        page_size: int = 64,
        rotary: Rotary | float | None = None,
        scale: float | None = None,
    ):
        super().__init__(rotary=rotary)
        if len(alphas) != len(betas) or not len(alphas):
            raise ValueError(f"alphas and betas must be as many, got {len(alphas)} and {len(betas)}")
        if min(block_size, minimum_size, page_size) < 1 or sink_size < 0:
            raise ValueError(
                f"block_size, minimum_size and page_size must be at least 1, sink_size 0, got {block_size}, "
                f"{minimum_size}, {page_size} and {sink_size}"
            )
        self.alphas, self.betas = tuple(map(float, alphas)), tuple(map(float, betas))
        self.block_size, self.sink_size, self.scale = block_size, sink_size, scale
        self.minimum_size, self.page_size = minimum_size, page_size
        self.permutation_equivariant = False

    def check(self, sizes: HeadSizes, layout: Layout) -> None:
        super().check(sizes, layout)
        if len(self.alphas) != sizes.num_kv_heads:
            raise ValueError(f"there are {len(self.alphas)} rules for {sizes.num_kv_heads} key heads")

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
            raise UnsupportedArgument("context: windows are of the sequence itself")
        size, static = cache_sizes(
            np.asarray(self.alphas),
            np.asarray(self.betas),
            0,
            max_length,
            sink_size=self.sink_size,
            minimum_size=self.minimum_size,
            page_size=self.page_size,
        )
        return RingCache.create(batch_size, size.tolist(), *sizes, sinks=static.tolist(), dtype=dtype)

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
        check_causal(self, view)
        q, k, v = heads[:3]
        if cache is None:
            q, k = self._rotate(q, view.q_at), self._rotate_keys(k, view.k_at)
            if owner is not None:
                record(owner, "attention", lambda: self._weights(q, k, view))
            return jnp.asarray(block_sparse_attention(q, k, v, mask=self._mask(q, view), scale=self.scale)), None
        real = jnp.ones(q.shape[:2], bool) if view.mask is None else view.mask
        at = slots_of(real, cache.next_at) if view.q_at is None else view.q_at
        q, k = self._rotate(q, at), self._rotate_keys(k, at)
        _, new = cache.look(k, v, real, at=at)
        if q.shape[1] == 1:
            return self._step(q, new).astype(v.dtype), new
        place = slots_of(real, cache.length)
        options: dict[str, Any] = {"scale": self.scale, "return_lse": True}
        run = self._by_place(place, real, new.length)
        # Of what the cache held before, the tokens that would be there when a query's turn comes.
        oldest = place[:, None] - (cache.sizes - cache.sinks)[:, None] + 1
        sinks = jnp.broadcast_to(cache.sinks[:, None], oldest.shape)
        held = ArrayMask(_kept, (sinks, oldest), (jnp.swapaxes(cache.order(), 1, 2),))
        stored = cache.keys.dtype
        parts = [
            block_sparse_attention(q, k, v, mask=run, **options),
            block_sparse_attention(q.astype(stored), cache.keys, cache.values, mask=held, **options),
        ]
        wide = jnp.result_type(parts[0][1])
        y, _ = merge_attention([(y.astype(wide), lse.astype(wide)) for y, lse in parts])
        return y.astype(v.dtype), new

    def attention(self, heads: Heads, view: View) -> jax.Array:
        check_causal(self, view)
        return self._weights(self._rotate(heads.q, view.q_at), self._rotate_keys(heads.k, view.k_at), view)

    def _mask(self, q: jax.Array, view: View) -> Mask:
        """The mask of prefill: a rule for each head, of indices where all tokens exist."""
        if view.mask is not None:
            place = slots_of(view.mask, jnp.zeros(view.mask.shape[0], jnp.int32))
            return self._by_place(place, view.mask, view.mask.sum(1, dtype=jnp.int32))
        rules = [elastic_rule(*ab, q.shape[1], self.block_size) for ab in zip(self.alphas, self.betas, strict=True)]
        repeats = q.shape[2] // len(rules)
        return PerHead(tuple(rule for rule in rules for _ in range(repeats)))

    def _by_place(self, place: jax.Array, real: jax.Array, total: jax.Array) -> ArrayMask:
        """The mask of prefill for tokens at `place` `(B, N)` in sequences of `total` `(B,)` tokens."""
        alphas, betas = np.asarray(self.alphas, np.float32), np.asarray(self.betas, np.float32)
        whole = (total // self.block_size).astype(jnp.float32)[:, None]
        span = jnp.asarray(alphas // np.float32(self.block_size)) + jnp.asarray(betas) * whole
        band = jnp.maximum(jnp.trunc(span).astype(jnp.int32), 1)[:, :, None]
        first = (place[:, None] // self.block_size - band + 1) * self.block_size
        keys = jnp.where(real, place, -1)[:, None]
        return ArrayMask(_in_prefill(self.block_size), (place[:, None], first), (keys,))

    def _step(self, q: jax.Array, cache: RingCache) -> jax.Array:
        """One query for each example, which sees all that each head keeps."""
        keys, values = cache.keys, cache.values
        batch, slots, groups = keys.shape[:3]
        pages = slots // self.page_size
        keys, values = (a.reshape(batch * pages, self.page_size, *a.shape[2:]) for a in (keys, values))
        table = jnp.arange(batch * pages, dtype=jnp.int32).reshape(batch, pages)
        lengths = jnp.repeat(jnp.minimum(cache.length[:, None], cache.sizes), q.shape[2] // groups, axis=1)
        options: dict[str, Any] = {"causal": False, "scale": self.scale}
        return jnp.asarray(paged_attention(q.astype(keys.dtype), keys, values, table, lengths, **options))

    def _weights(self, q: jax.Array, k: jax.Array, view: View) -> jax.Array:
        repeats = q.shape[2] // len(self.alphas)
        if view.mask is None:
            alpha, beta = (np.repeat(np.asarray(x, np.float32), repeats) for x in (self.alphas, self.betas))
            seen = elastic_mask(alpha, beta, q.shape[1], block_size=self.block_size)[None]
        else:
            mask = self._mask(q, view)
            assert isinstance(mask, ArrayMask)
            place, first = (x[..., :, None] for x in mask.queries)
            seen = jnp.repeat(mask.rule(None, None, place, first, mask.keys[0][..., None, :]), repeats, axis=1)
        return masked_softmax(attention_scores(q, k, scale=self.scale), seen)


def with_plan(model: ModelT, plan: Plan, **options: Any) -> ModelT:
    """The same weights under a plan, a rule for each head of each layer.

    Args:
      model: with dense mixers of plain softmax, whose rotary positions and scale are kept.
      plan: as many layers as the model has dense mixers.
      **options: block_size, sink_size, minimum_size and page_size of `ElasticCore`.

    Raises:
      ValueError: for another number of layers or heads, or layers that are no plain softmax.
    """
    mixers = sum(isinstance(part, DenseMixer) for _, part in nnx.iter_modules(model))
    if not len(plan.alphas) == len(plan.betas) == mixers:
        raise ValueError(f"plan has {len(plan.alphas)} layers, the model {mixers} dense mixers")

    for layer, rules in enumerate(zip(plan.alphas, plan.betas, strict=True)):

        def elastic(core: Core, rules: tuple[Sequence[float], Sequence[float]] = rules) -> ElasticCore:
            return ElasticCore(rules[0], rules[1], **(plain_softmax(core) | options))

        model = with_core(model, elastic, layers=[layer])
    return model
