"""Dynamic mask attention, DMA (Shi et al., 2025, arXiv:2508.02124; code: transformers' Doge, SmallDoges/flash-dmattn).

Every key says by its value how important it is; a query sees the w most important of the keys that it may see:

    q = rope(rms(x W_q)),  k = rope(rms(x W_k)),  v = x W_v            H query heads, G key heads
    δ_jg = exp(A_g softplus(concat(v_j) W_δ)_g)                        variant "exp", as transformers has it
    δ_jg = A_g softplus(concat(v_j) W_δ)_g                             variant "linear", as the authors' kernels have it
    K_i = the w keys of largest δ_j among those that i may see         all of them if there are w at most
    y_i = Σ_j softmax_j(q_i·k_j / √D + δ_j) v_j  over j ∈ K_i

No gradient passes the choice, but δ of the keys that are kept has one: it is the bias, also where nothing is dropped.
Of equal δ (as all are before training, A = 0) the later keys are kept: a sliding window. A row without keys gives
zeros. The exponent is bounded by 80, which float32 still holds. The two variants are different functions.

The choice is that of each query among its keys, as in transformers; the authors' kernels rank all keys at once and mask
then. Without causality one choice serves all queries: w keys are gathered, O(N·w). With it, queries of a block of b
keep keys among the w largest before the block and the block's own, since whoever comes in drives one out: w + b keys
are gathered for each block, b = w, and `block_sparse_attention` masks by rank, O(N·w). Masks of pairs, rules, and edits
of scores take the dense form, O(N·M), and packed segments without causality are not gathered.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Given, Layout, Pattern, View, record
from attnlab.nn.cache import KVCache
from attnlab.nn.dense_mixer import Core, Heads, HeadSizes
from attnlab.nn.dynamic_mask import (
    MaskType,
    before_slot,
    biased_attention,
    causal_attention,
    check_options,
    kept_keys,
    noncausal_attention,
    packed_attention,
    positive,
)
from attnlab.nn.heads import FromHeads
from attnlab.nn.masking import masked_softmax, segment_pair, visible_keys
from attnlab.nn.norms import RMSNorm
from attnlab.nn.projected_mixer import ProjectedMixer
from attnlab.nn.rotary import Rotary
from attnlab.nn.softmax import attention_scores, weighted_values
from attnlab.nn.softmax_core import ProductCore
from attnlab.points import Edits, acts
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.array_masks import ArrayMask
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.masks import Causal, Mask

Variant = Literal["exp", "linear"]
LARGEST = 80.0
"""Exponent of δ: e^80 is a float32, and so are its sums."""
_PAPER = Paper("Trainable Dynamic Mask Sparse Attention", "Shi et al.", 2025, arxiv="2508.02124", number=50)
_REPOSITORY = "SmallDoges/flash-dmattn"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DynamicMaskCache:
    """Keys and values of the tokens so far, and how important they are.

    Attributes:
      tokens: keys and values.
      importance: δ `(B, max_length, G)`, at least float32.
    """

    tokens: KVCache
    importance: jax.Array

    @property
    def length(self) -> jax.Array:
        """`(B,)` int32, tokens stored."""
        return self.tokens.length


class DynamicMaskCore(ProductCore):
    """Between the projections: rotary positions, the cache, the choice of keys and the softmax; δ is in `Heads.extra`.

    Args:
      window: w.
      mask_type: "topk" or "relu".
      causal: whether queries see keys up to their own alone.
      scale: of q·k; D^-1/2 when None.
      kernel: name of an implementation of `block_sparse_attention`; the best one when None.
      **options: those of `ProductCore`.

    Raises:
      ValueError: for options out of range.
    """

    def __init__(
        self,
        *,
        window: int = 2048,
        mask_type: MaskType = "topk",
        causal: bool = True,
        scale: float | None = None,
        kernel: str | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        check_options(window, mask_type)
        self.window, self.mask_type, self.causal, self.scale, self.kernel = (
            int(window),
            mask_type,
            causal,
            scale,
            kernel,
        )

    def init_cache(
        self, sizes: HeadSizes, batch_size: int, max_length: int, dtype: Any, **context: Any
    ) -> DynamicMaskCache:
        tokens = KVCache.create(batch_size, max_length, *sizes, dtype=dtype)
        shape = batch_size, max_length, sizes.num_kv_heads
        return DynamicMaskCache(tokens, jnp.zeros(shape, at_least_float32(tokens.keys.dtype)))

    def __call__(
        self,
        heads: Heads,
        view: View,
        cache: DynamicMaskCache | None = None,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
        owner: nnx.Module | None = None,
    ) -> tuple[jax.Array, DynamicMaskCache | None]:
        real, importance = view.mask, heads.extra[0]
        usual = view.rule == (Causal() if self.causal else None)
        if cache is None:
            q, k, v, view, _ = self.placed(heads, view, None)
            usual, new, length, slots = usual and (real is None or real.ndim == 2), None, None, None
        else:
            length, slots = cache.length, cache.tokens.order(heads.q.shape[1], real)
            where = slots if real is None else jnp.where(real, slots, cache.tokens.max_length)
            each = jnp.arange(heads.q.shape[0])[:, None]
            stored = cache.importance.at[each, where].set(importance.astype(cache.importance.dtype), mode="drop")
            q, k, v, view, tokens = self.placed(heads, view, cache.tokens)
            new, importance = DynamicMaskCache(tokens, stored), stored
            k, v = k.astype(q.dtype), v.astype(q.dtype)
        dropped = not deterministic and self.dropout_rngs is not None
        if acts(edits, "scores", "attention") or dropped or not usual:
            weights = self._weights(q, k, importance, view, edits=edits, owner=owner)
            weights = self.edited(edits, owner, "attention", weights, q=q, k=k, v=v, view=view)
            return weighted_values(self.drop(weights, deterministic), v), new
        if owner is not None:
            record(owner, "scores", lambda: self._scores(q, k, importance))
            record(owner, "attention", lambda: self._weights(q, k, importance, view))
        given: dict[str, Any] = {"scale": self.scale, "implementation": self.kernel}
        ids = None if view.segment_ids is None else segment_pair(view.segment_ids)[0]
        if self.mask_type == "relu":
            return self._positive(q, k, v, importance, slots, real if cache is None else None, ids, given), new
        if self.causal:
            slots = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2]) if slots is None else slots
            given |= {"length": length, "real": real, "ids": ids}
            return causal_attention(q, k, v, importance, slots, self.window, **given), new
        if ids is not None:
            return packed_attention(q, k, v, importance, self.window, real, ids, **given), new
        return noncausal_attention(q, k, v, importance, self.window, real, **given), new

    def attention(self, heads: Heads, view: View) -> jax.Array:
        q, k, _, view, _ = self.placed(heads, view, None)
        return self._weights(q, k, heads.extra[0], view)

    def _positive(self, q, k, v, importance, slots, real, ids, given) -> jax.Array:
        """Of mask type "relu"."""
        kept = jnp.moveaxis(jax.lax.stop_gradient(importance), 1, 2)
        kept = kept if real is None else jnp.where(real[:, None], kept, 0)
        mask: Mask = ArrayMask(positive, keys=(kept,))
        if self.causal:
            mask = mask & (Causal() if slots is None else ArrayMask(before_slot, (slots[:, None],)))
        return biased_attention(q, k, v, importance, mask, segment_ids=ids, **given)

    def _scores(self, q: jax.Array, k: jax.Array, importance: jax.Array) -> jax.Array:
        bias = jnp.moveaxis(importance, 1, 2)[:, :, None]
        return attention_scores(q, k, bias=jnp.repeat(bias, q.shape[2] // k.shape[2], axis=1), scale=self.scale)

    def _weights(
        self,
        q: jax.Array,
        k: jax.Array,
        importance: jax.Array,
        view: View,
        *,
        edits: Edits | None = None,
        owner: nnx.Module | None = None,
    ) -> jax.Array:
        """`(B, H, N, M)`, all at once."""
        scores = self.edited(edits, owner, "scores", self._scores(q, k, importance), view=view, q=q, k=k)
        allowed = visible_keys(view)
        bias = jnp.repeat(jnp.moveaxis(importance, 1, 2)[:, :, None], q.shape[2] // k.shape[2], axis=1)
        return masked_softmax(scores, kept_keys(bias, allowed, self.window, mask_type=self.mask_type))


@register(
    "dynamic_mask_attention",
    paper=_PAPER,
    source=Source.AUTHORS_CODE,
    repository="huggingface/transformers",
    cost=Cost(time="O(N·w·H·(D+E) + N·w·G)", memory="O(N·H·(D+E) + w²·G)", state="M·G·(D+E+1)"),
    kernel="block_sparse_attention",
    summary="keys say by their values how important they are; each query sees the w most important ones",
    small={"window": 4},
)
class DynamicMaskAttention(ProjectedMixer):
    """Self-attention of sequences `(B, N, C)`. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: query heads H.
      window: keys w that a query keeps.
      variant: δ, "exp" or "linear".
      mask_type: "topk" keeps the w largest δ, "relu" those that are positive.
      causal: whether query i sees keys j ≤ i only.
      rotary: rotary positions, or theta for `Rotary(theta)`; none when None.
      scale: of q·k; D^-1/2 when None.
      norm_eps: of the norms of queries and keys.
      attention_dropout: rate on the weights.
      kernel: name of an implementation of `block_sparse_attention`; the best one when None.
      use_bias: whether all maps have biases.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **projections: sizes of the projections and dropout of the result: see `ProjectedMixer`.

    Raises:
      ValueError: for options out of range, or sizes that do not fit.
    """

    patterns = frozenset({Pattern.SELF, Pattern.CAUSAL_SELF})
    layouts = frozenset({Layout.SEQUENCE})
    collectives = frozenset({"all-gather"})  # of how important keys are, which comes from the values of all heads
    core: DynamicMaskCore

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        window: int = 2048,
        variant: Variant = "exp",
        mask_type: MaskType = "topk",
        causal: bool = True,
        rotary: Rotary | float | None = None,
        scale: float | None = None,
        norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        kernel: str | None = None,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        if variant not in get_args(Variant):
            raise ValueError(f"variant must be one of {', '.join(get_args(Variant))}, got {variant!r}")
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        biases = {"qkv_bias": use_bias, "out_bias": use_bias}
        super().__init__(features, num_heads=num_heads, causal=causal, **biases, **projections, **common)
        groups, head_dim, value_dim = self.sizes
        norm: dict[str, Any] = {"eps": norm_eps, "param_dtype": param_dtype, "rngs": rngs}
        self.query_norm, self.key_norm = RMSNorm(head_dim, **norm), RMSNorm(head_dim, **norm)
        self.variant = variant
        self.sharpness = nnx.Param(jnp.zeros((groups,), param_dtype))
        self.importance = FromHeads(groups, value_dim, groups, use_bias=use_bias, **common)
        core: dict[str, Any] = {"window": window, "mask_type": mask_type, "causal": causal, "scale": scale}
        core |= {"rotary": rotary, "dropout": attention_dropout, "kernel": kernel}
        self.set_core(DynamicMaskCore(**core, rngs=rngs))

    def project(self, x: jax.Array, source: jax.Array, given: Given) -> Heads:
        heads = super().project(x, source, given)
        wide = at_least_float32(heads.v.dtype)
        steepness = jax.nn.softplus(self.importance(heads.v).astype(wide)) * self.sharpness[...].astype(wide)
        importance = jnp.exp(jnp.minimum(steepness, LARGEST)) if self.variant == "exp" else steepness
        return heads._replace(extra=(importance,))

    def set_core(self, core: Core) -> None:
        if not isinstance(core, DynamicMaskCore):
            raise ValueError(f"core must be a DynamicMaskCore, which reads how important keys are, got {core}")
        super().set_core(core)
