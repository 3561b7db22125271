"""Long short-attention, LS-attention (2025, arXiv:2505.15548): most heads see a window, a few see all tokens.

Of H heads the first Hs are short, the others long:

    short:  y_i = Σ_j softmax_j(q_i·k_j / √D) v_j    over the last w tokens, i among them (non-causally |i - j| < w)
    long:   the same over all j ≤ i (non-causally over all j)
    y = concat_h([short | long]) W_o

Parameters are those of multi-head attention. The paper's argument: what is near is dense and of nearly full rank, which
a head over all tokens can only express by large scores; left to windows, the scores of the long heads stay small. The
measure is the largest |score| of a head, which the recorded point `scores` shows.

Time O(N·w·D) per short head and O(N²·D) per long one: causal sequences without masks and packed segments take the
windows by `pallas_kernels.neighborhood_attention`, others all scores under a mask. A decode cache is a ring of w tokens
for the short heads, all tokens for the long ones.

From the abstract alone, neither text nor code being at hand: one w for all short heads, how many are long (a quarter,
at least one), the order of the heads, and that a window counts the token itself are our reading; the non-causal form is
our extension.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, Pattern, UnsupportedArgument, View, record
from attnlab.nn.cache import KVCache
from attnlab.nn.dense_mixer import Core, Heads, HeadSizes
from attnlab.nn.masking import masked_softmax, visible_keys
from attnlab.nn.projected_mixer import ProjectedMixer
from attnlab.nn.ring_cache import RingCache
from attnlab.nn.rotary import Rotary
from attnlab.nn.softmax import attention_scores, softmax_attention
from attnlab.nn.softmax_core import SoftmaxCore
from attnlab.points import Edits
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.masks import Causal, SlidingWindow
from pallas_kernels.neighborhood_attention import neighborhood_attention


def long_short_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    short_heads: int,
    window: int,
    causal: bool = True,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Attention of short and long heads.

    Args:
      q: queries `(B, N, H, D)`.
      k: keys `(B, N, G, D)`, H a multiple of G.
      v: values `(B, N, G, E)`.
      short_heads: Hs, below H, a multiple of H / G.
      window: w.
      causal: whether query i sees keys j ≤ i only.
      mask: boolean, True where attention is allowed: `(B, N)` keys, or broadcastable to `(B, H, N, N)`.

    Returns:
      `(B, N, H, E)` in the dtype of `q`.

    Raises:
      ValueError: for heads that do not fit, or a window of no token.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    order = jnp.arange(q.shape[1])[None]
    view = View(
        Causal() if causal else None, q_idx=order, k_idx=order, mask=None if mask is None else jnp.asarray(mask)
    )
    core = LongShortCore(q.shape[2], short_heads, window=window, causal=causal)
    core.check(HeadSizes(k.shape[2], k.shape[3], v.shape[3]), Layout.SEQUENCE)
    return core(Heads(q, k, v), view)[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LongShortCache:
    """The decode state.

    Attributes:
      short: the newest tokens of the short heads; None if there are none.
      long: all tokens of the long heads.
    """

    short: RingCache | None
    long: KVCache

    @property
    def length(self) -> jax.Array:
        """`(B,)` int32, tokens stored."""
        return self.long.length


class LongShortCore(SoftmaxCore):
    """Softmax over a window in the first heads, over all tokens in the others.

    Args:
      num_heads: query heads H.
      short_heads: Hs.
      window: w, of tokens.
      causal: whether windows end at the token.
      rotary, dropout, rngs: as in `ProductCore`.

    Raises:
      ValueError: for a window of no token, or no long head.
    """

    points = frozenset()  # two caches hold different keys: when decoding there is no one array of scores

    def __init__(
        self,
        num_heads: int,
        short_heads: int,
        *,
        window: int,
        causal: bool,
        rotary: Rotary | float | None = None,
        dropout: float = 0.0,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(num_heads, rotary=rotary, dropout=dropout, rngs=rngs)
        if window < 1 or not 0 <= short_heads < num_heads:
            raise ValueError(
                f"window must be at least 1, short_heads below num_heads, got {window}, {short_heads} of {num_heads}"
            )
        self.short_heads, self.window, self.causal = short_heads, window, causal
        self.permutation_equivariant &= not short_heads

    def check(self, sizes: HeadSizes, layout: Layout) -> None:
        super().check(sizes, layout)
        shared = self.num_heads // sizes.num_kv_heads
        if self.short_heads % shared:
            raise ValueError(
                f"short and long heads must be multiples of the {shared} that share a key head, got "
                f"{self.short_heads} and {self.num_heads - self.short_heads}"
            )

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
        short, short_cache = self.short_heads * sizes.num_kv_heads // self.num_heads, None
        if short:
            room = min(self.window, max_length)
            short_cache = RingCache.create(batch_size, room, short, *sizes[1:], dtype=dtype)
        long = KVCache.create(batch_size, max_length, sizes.num_kv_heads - short, *sizes[1:], dtype=dtype)
        return LongShortCache(short_cache, long)

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
        draw = None if deterministic else self.dropout_rngs

        def attend(part: Heads, **seen: Any) -> jax.Array:
            if draw is not None:
                seen |= {"dropout_rate": self.dropout, "dropout_key": draw()}
            return jnp.asarray(softmax_attention(part.q, part.k, part.v, **seen))

        if cache is not None:
            short, long, cache = self._held(heads, view, cache)
            y = [attend(part, mask=visible) for part, visible in (short, long) if part.q.shape[2]]
            return jnp.concatenate(y, axis=2), cache
        q, k, v, view, _ = self.placed(heads, view, None)
        if owner is not None:
            record(owner, "scores", lambda: attention_scores(q, k))
            record(owner, "attention", lambda: self.weights(q, k, view))
        near, far = self._split(Heads(q, k, v))
        y = [attend(far, **self._who(self._part_of(view, short=False)))]
        if self.short_heads:
            in_order = view.segment_ids is None and (view.mask is None or view.mask.ndim == 2)
            if self.causal and in_order and draw is None:
                size = min(self.window, q.shape[1])
                windows = neighborhood_attention(near.q, near.k, near.v, size, is_causal=True, key_mask=view.mask)
                y.insert(0, jnp.asarray(windows))
            else:
                y.insert(0, attend(near, **self._who(self._part_of(view, short=True))))
        return jnp.concatenate(y, axis=2), None

    def weights(
        self, q: jax.Array, k: jax.Array, view: View, *, edits: Edits | None = None, owner: nnx.Module | None = None
    ) -> jax.Array:
        parts = zip(self._split(Heads(q, k, k)), (True, False), strict=True)
        maps = [
            masked_softmax(attention_scores(part.q, part.k), visible_keys(self._part_of(view, short=short)))
            for part, short in parts
            if part.q.shape[2]
        ]
        return jnp.concatenate(maps, axis=1)

    def _held(
        self, heads: Heads, view: View, cache: LongShortCache
    ) -> tuple[tuple[Heads, jax.Array | None], tuple[Heads, jax.Array | None], LongShortCache]:
        """What short and long heads attend to, with masks, and the new cache."""
        short, long = self._split(heads)
        at = cache.long.positions(heads.q.shape[1], view.mask) if view.q_at is None else view.q_at
        q, k, v, seen, stored = self.placed(long, view, cache.long)
        whole = Heads(q, k, v), visible_keys(seen)
        if cache.short is None:
            return (short, None), whole, LongShortCache(None, stored)
        held, ring = cache.short.look(self._rotate_keys(short.k, at), short.v, view.mask, at=at)
        visible = jnp.repeat(held.visible, short.q.shape[2] // short.k.shape[2], axis=1)
        return (Heads(self._rotate(short.q, at), held.keys, held.values), visible), whole, LongShortCache(ring, stored)

    def _split(self, heads: Heads) -> tuple[Heads, Heads]:
        """The short heads and the long ones."""
        groups = self.short_heads * heads.k.shape[2] // self.num_heads
        cuts = self.short_heads, groups, groups
        (q, long_q), (k, long_k), (v, long_v) = (
            jnp.split(part, [cut], axis=2) for part, cut in zip(heads[:3], cuts, strict=True)
        )
        return Heads(q, k, v), Heads(long_q, long_k, long_v)

    def _part_of(self, view: View, *, short: bool) -> View:
        """The view of the short, or of the long, heads."""
        mask, rule = view.mask, view.rule
        if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
            mask = mask[:, : self.short_heads] if short else mask[:, self.short_heads :]
        if short:
            window = SlidingWindow(self.window - 1, 0 if self.causal else self.window - 1)
            rule = window if rule is None else rule & window
        return dataclasses.replace(view, mask=mask, rule=rule)


@register(
    "ls_attention",
    paper=Paper(
        "Short-Range Dependency Effects on Transformer Instability and a Decomposed Attention Solution",
        "Hajra",
        2025,
        arxiv="2505.15548",
        number=69,
    ),
    source=Source.ABSTRACT_ONLY,
    cost=Cost(time="O(N·w·Hs·D + N²·(H-Hs)·D)", memory="O(N·w·Hs + N²·(H-Hs))", state="w·Hs·(D+E) + M·(H-Hs)·(D+E)"),
    kernel="neighborhood_attention",
    summary="softmax attention whose heads see a window of the last tokens, but for a few that see all",
    small={"window": 4},
)
class LongShortAttention(ProjectedMixer):
    """Sequences to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: query heads H.
      num_kv_heads: key and value heads G, a divisor of H; H when None. H / G divides the number of long heads.
      long_heads: how many heads see all tokens, the last ones, 1..H; a quarter when None, at least H / G.
      window: w, tokens that a short head sees, the token itself among them.
      causal: whether query i sees keys j ≤ i only.
      rotary: rotary positions, or theta for `Rotary(theta)`.
      attention_dropout: rate on the weights; in training the short heads then take all scores under a mask.
      rngs: streams `params`, and `dropout` if there is any.
      **projections: sizes and biases of the projections: see `ProjectedMixer`.

    Raises:
      ValueError: for sizes that do not fit.
      UnsupportedArgument: for another layout than a sequence, or a context.
    """

    patterns = frozenset({Pattern.SELF, Pattern.CAUSAL_SELF})
    layouts = frozenset({Layout.SEQUENCE})
    collectives = frozenset({"all-to-all", "collective-permute"})  # short and long heads part

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        long_heads: int | None = None,
        window: int = 128,
        causal: bool = True,
        rotary: Rotary | float | None = None,
        attention_dropout: float = 0.0,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        super().__init__(
            features, num_heads=num_heads, num_kv_heads=num_kv_heads, causal=causal, **projections, rngs=rngs
        )
        if self.layout is not Layout.SEQUENCE or self.context_features is not None:
            raise UnsupportedArgument(f"{type(self).__name__} has windows along a sequence, and no context")
        if long_heads is None:
            shared = num_heads // self.sizes.num_kv_heads
            long_heads = -(-max(num_heads // 4, 1) // shared) * shared
        core: dict[str, Any] = {"rotary": rotary, "dropout": attention_dropout, "rngs": rngs}
        self.set_core(LongShortCore(num_heads, num_heads - long_heads, window=window, causal=causal, **core))

    def set_core(self, core: Core) -> None:
        super().set_core(core)
        if self.causal and isinstance(core, LongShortCore):
            # Spans seen both ways would not be in the ring of a short head.
            self.accepts = self.accepts - {"rule"}
