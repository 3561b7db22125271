"""Selective multi-head attention of the Union of Experts (2025, arXiv:2503.02495; code: YujiaoYang-work/UoE).

Each head is an expert, which attends among the tokens that were sent to it alone:

    p = softmax(x W_g + b_g),   m = the k largest of p, k = H / 2            heads of each token
    T_h = (tokens of head h in their order),   places 0, 1, … in T_h
    o_i = Σ_j softmax_j(q_i·k_j / √D) v_j   over j ∈ T_h, causally j ≤ i; q, k rotated by their places in T_h
    y_i = Σ_{h: i ∈ T_h} (o_hi W_o,h + b_o,h)

p only selects: no gradient ever reaches W_g and b_g. Routing is not learned, they are constants here. A quarter of the
scores of multi-head attention, or a little more, if lists are gathered.

The authors' code makes all lists as long as the longest of the batch, and completes them by tokens that were not sent
there, which do take part; which ones depends on later tokens and on the batch. Here every head has the tokens that were
sent to it, no others, so that the causal form decodes: exact, by all scores under a mask. With `capacity` each head
gathers at most that share of the tokens, those of the highest p, `fillers` completes its list as theirs does, and what
a head sees depends on later tokens: then it does not decode. `attend` takes lists that are given. Memory of earlier
segments, which the code has in part, is not part of this. The feed-forward is `attnlab.nn.union_of_experts`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, Pattern, UnsupportedArgument, View, record
from attnlab.nn.cache import KVCache
from attnlab.nn.dense_mixer import Core, DenseMixer, Heads, HeadSizes
from attnlab.nn.heads import ToHeads
from attnlab.nn.masking import both, existing_keys, full_mask, segment_pair
from attnlab.nn.places import places_among
from attnlab.nn.rotary import Rotary
from attnlab.nn.routing import take_tokens
from attnlab.nn.softmax import softmax_attention
from attnlab.nn.softmax_core import SoftmaxCore
from attnlab.nn.union_of_experts import PAPER, FixedRouter, FromExperts, check_capacity, expert_lists
from attnlab.points import Edits, visit
from attnlab.registry import Cost, Source, register
from pallas_kernels.integers import integers


def turned(x: jax.Array, places: jax.Array, rotary: Rotary | None) -> jax.Array:
    """Heads `(B, N, H, D)` rotated by places `(B, H, N)` of their own."""
    if rotary is None:
        return x
    turn = jax.vmap(lambda one, at: rotary(one[:, :, None], at)[:, :, 0], in_axes=(2, 1), out_axes=2)
    return turn(x, places)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectiveCache:
    """A cache of all tokens, and which heads take them.

    Attributes:
      tokens: keys and values.
      taken: `(B, max_length, H)` boolean.
      counts: `(B, H)` int32, tokens of each head so far.
    """

    tokens: KVCache
    taken: jax.Array
    counts: jax.Array

    @property
    def length(self) -> jax.Array:
        """`(B,)` int32, tokens stored."""
        return self.tokens.length


class SelectiveCore(SoftmaxCore):
    """Softmax among the tokens of each head, `(B, N, H)` boolean in `Heads.extra`.

    Args:
      num_heads: heads H.
      turn: rotary positions by places among a head's tokens, or theta for `Rotary(theta)`; none when None.
      dropout: rate on the weights.
      rngs: stream `dropout` if there is any.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        turn: Rotary | float | None,
        dropout: float = 0.0,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(num_heads, dropout=dropout, rngs=rngs)
        self.turn = Rotary.of(turn)
        self.permutation_equivariant &= turn is None

    def check(self, sizes: HeadSizes, layout: Layout) -> None:
        super().check(sizes, layout)
        if self.turn is not None:
            self.turn.check(sizes.key_size, 1)

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
            raise UnsupportedArgument("context: heads choose among the tokens of the sequence itself")
        taken = jnp.zeros((batch_size, max_length, self.num_heads), bool)
        counts = jnp.zeros((batch_size, self.num_heads), jnp.int32)
        return SelectiveCache(KVCache.create(batch_size, max_length, *sizes, dtype=dtype), taken, counts)

    def placed(
        self, heads: Heads, view: View, cache: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array, View, SelectiveCache | None]:
        q, k, v = heads[:3]
        taken = heads.extra[0]
        real = existing_keys(view.mask) if cache is None else view.mask
        taken = taken if real is None else taken & real[..., None]
        by_head = jnp.swapaxes(taken, 1, 2)
        if cache is None:
            ids = None if view.segment_ids is None else segment_pair(view.segment_ids)[0][:, None]
            at, keys, new = places_among(by_head, ids), by_head, None
            q, k, v, view, _ = super().placed(self._turned(q, k, v, at), view, None)
        else:
            at = cache.counts[..., None] + places_among(by_head)
            slots = cache.tokens.order(q.shape[1], view.mask)
            slots = slots if real is None else jnp.where(real, slots, cache.tokens.max_length)
            rows = jnp.arange(q.shape[0])[:, None]
            stored = cache.taken.at[rows, slots].set(taken, mode="drop")
            q, k, v, view, tokens = super().placed(self._turned(q, k, v, at), view, cache.tokens)
            keys = jnp.swapaxes(stored, 1, 2)
            new = SelectiveCache(tokens, stored, cache.counts + taken.sum(1, dtype=jnp.int32))
        chosen = by_head[..., :, None] & keys[..., None, :]
        mask = both(None if view.mask is None else full_mask(view.mask), chosen)
        return q, k, v, dataclasses.replace(view, mask=mask), new

    def _turned(self, q: jax.Array, k: jax.Array, v: jax.Array, at: jax.Array) -> Heads:
        return Heads(turned(q, at, self.turn), turned(k, at, self.turn), v)


@register(
    "uoe_smha",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="YujiaoYang-work/UoE",
    cost=Cost(
        time="O(N·M·H·D), with a capacity c O(c²·N²·H·D)", memory="O(N·M·H), O(c²·N²·H)", state="M·H·(2·D + 1) + H"
    ),
    summary="each head attends among the tokens that a router, which is not learned, sent to it",
)
class SelectiveHeadAttention(DenseMixer):
    """Sequences to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      head_dim: D; C / H when None.
      active_heads: k, heads of each token; half of H when None.
      causal: whether query i sees keys j ≤ i only.
      rotary: rotary positions by places among a head's tokens, or theta for `Rotary(theta)`; none when None.
      capacity: at most this share of the tokens for a head, gathered; all that are sent to it when None.
      fillers: whether lists of the capacity that are not full are completed by other tokens.
      attention_dropout: rate on the weights.
      use_bias: whether the maps have biases, the last one for each head.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for sizes that do not fit.
    """

    patterns = frozenset({Pattern.SELF, Pattern.CAUSAL_SELF})
    layouts = frozenset({Layout.SEQUENCE})
    context_features = None

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        active_heads: int | None = None,
        causal: bool = True,
        rotary: Rotary | float | None = 10000.0,
        capacity: float | None = None,
        fillers: bool = False,
        attention_dropout: float = 0.0,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.sizes = HeadSizes.of(features, num_heads, None, head_dim)
        check_capacity(capacity, fillers)
        self.features, self.num_heads, self.causal, self.dtype = features, num_heads, causal, dtype
        self.capacity, self.fillers = capacity, fillers
        size, active = self.sizes.key_size, max(num_heads // 2, 1) if active_heads is None else active_heads
        self.router = FixedRouter(features, num_heads, active, param_dtype=param_dtype, rngs=rngs)
        common: dict[str, Any] = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query, self.key, self.value = (ToHeads(features, num_heads, size, **common) for _ in range(3))
        self.out = FromExperts(num_heads, size, features, **common)
        self.set_core(SelectiveCore(num_heads, turn=rotary, dropout=attention_dropout, rngs=rngs))

    def set_core(self, core: Core) -> None:
        if not isinstance(core, SelectiveCore):
            raise ValueError(f"core must be a SelectiveCore, which attends by head, got {type(core).__name__}")
        super().set_core(core)
        if self.capacity is not None:
            self.accepts, self.points = frozenset({"key_mask", "segment_ids"}), frozenset({"qkv", "heads"})

    def attend(
        self, x: ArrayLike, token_ids: ArrayLike, *, deterministic: bool = True, edits: Edits | None = None
    ) -> jax.Array:
        """The mixer with lists of tokens that are given, all of which take part.

        Args:
          x: tokens `(B, N, C)`.
          token_ids: `(B, H, L)` integers below N, ascending, none twice in a list.
          deterministic, edits: as in the call.

        Returns:
          `(B, N, C)`.

        Raises:
          ValueError: for shapes that do not fit.
        """
        self.check_call(x)
        x, token_ids = jnp.asarray(x, self.dtype), integers("token_ids", token_ids)
        if token_ids.ndim != 3 or token_ids.shape[:2] != (x.shape[0], self.num_heads):
            raise ValueError(
                f"token_ids must be (B, H, L) = ({x.shape[0]}, {self.num_heads}, L), got {token_ids.shape}"
            )
        given = Given(deterministic=deterministic, edits=edits)
        return self._listed(x, token_ids, jnp.ones(token_ids.shape, bool), given)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        if self.capacity is None:
            return super().mix(x, given)
        routing = self.router(x)
        record(self, "gate", lambda: jnp.where(routing.chosen, routing.probabilities, 0))
        lists = expert_lists(routing, self.capacity, real=given.mask)
        part = lists.chosen
        if self.fillers:
            real = jnp.ones(x.shape[:2], bool) if given.mask is None else given.mask
            part = _take(real, lists.places)
        return self._listed(x, lists.places, part, given)

    def project(self, x: jax.Array, source: jax.Array, given: Given) -> Heads:
        routing = self.router(x)
        record(self, "gate", lambda: jnp.where(routing.chosen, routing.probabilities, 0))
        return Heads(self.query(x), self.key(x), self.value(x), (routing.chosen,))

    def merge(self, y: jax.Array, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        return self.out(y, self.router(x).chosen)

    def check_decodes(self, cross: bool) -> None:
        super().check_decodes(cross)
        if self.capacity is not None:
            raise UnsupportedArgument(
                f"{type(self).__name__} does not decode with capacity={self.capacity}: which tokens a head leaves out "
                "depends on later ones"
            )

    def _listed(self, x: jax.Array, places: jax.Array, part: jax.Array, given: Given) -> jax.Array:
        """Attention among lists `(B, H, L)` of tokens, of which some take `part`."""
        core, tokens = self.core, x.shape[1]
        assert isinstance(core, SelectiveCore)
        heads = visit(self, given.edits, "qkv", Heads(self.query(x), self.key(x), self.value(x)))
        q, k, v = (jnp.swapaxes(take_tokens(jnp.swapaxes(one, 1, 2), places), 1, 2) for one in heads[:3])
        ids = None if given.segment_ids is None else _take(given.segment_ids, places)
        at = places_among(part, ids)
        visible = part[..., :, None] & part[..., None, :]
        if ids is not None:
            visible &= ids[..., :, None] == ids[..., None, :]
        if self.causal:
            visible &= jnp.tri(places.shape[-1], dtype=bool)
        dropout: dict[str, Any] = {}
        if not given.deterministic and core.dropout_rngs is not None:
            dropout = {"dropout_rate": core.dropout, "dropout_key": core.dropout_rngs()}
        q, k = turned(q, at, core.turn), turned(k, at, core.turn)
        y = jnp.swapaxes(jnp.asarray(softmax_attention(q, k, v, mask=visible, **dropout)), 1, 2)
        rows, columns = jnp.arange(x.shape[0])[:, None, None], jnp.arange(self.num_heads)[:, None]
        back = jnp.zeros((*y.shape[:2], tokens, y.shape[-1]), y.dtype).at[rows, columns, places].set(y)
        taken = jnp.zeros((*y.shape[:2], tokens), bool).at[rows, columns, places].set(part)
        y = visit(self, given.edits, "heads", jnp.swapaxes(back, 1, 2))
        return self.out(y, jnp.swapaxes(taken, 1, 2))


def _take(each: jax.Array, places: jax.Array) -> jax.Array:
    """Of something for each token `(B, N)` that of the tokens in lists `(B, H, L)`."""
    return jnp.take_along_axis(each[:, None], places, axis=-1)
