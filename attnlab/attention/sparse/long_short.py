"""Long-short attention, Transformer-LS (Zhu et al., NeurIPS 2021, arXiv:2107.02192), as the benchmark CAB (Zhang et
al., ICML 2023, arXiv:2210.07661) has it.

One softmax over a window of tokens and over r summaries of the whole sequence, which each head projects dynamically:

    K = LN_l(x W_k),  V = LN_l(x W_v)                        one norm for both, over the channels of all heads
    P = softmax_j(x W_p)                                     (N, r) for each head
    K̄ = LN_s(Pᵀ K),   V̄ = LN_s(Pᵀ V)
    y_i = softmax(q_i [K̄; K_w]ᵀ D^-1/2) [V̄; V_w] + conv(V)

The window of the queries g w, …, (g+1) w - 1 is their own block and max(⌊w/2⌋, 1) tokens on either side. The
convolution, with one kernel for each head, is optional and starts at zero. Tokens that do not exist read nothing, and
are read by none. With summaries in front of the tokens, it is `block_sparse_attention` under a structural mask. Cost
O(N·(r + 2w)·D) per head.

Code: Shark-NLP/CAB (`AttentionLS`), after NVIDIA/transformer-ls. Its causal form is another mechanism, not here.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, record
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.head_conv import HeadConv
from attnlab.nn.heads import ToHeads
from attnlab.nn.key_masked_mixer import KeyMaskedMixer
from attnlab.nn.masking import masked_softmax
from attnlab.nn.norms import LayerNorm
from attnlab.nn.softmax import attention_weights
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.masks import EMPTY, FULL, PARTIAL, Concatenated, Full, Index, Interval, Mask, quotient


@dataclasses.dataclass(frozen=True)
class BlockHalo(Mask):
    """Keys in the query's own block of `size` tokens, and `halo` tokens on either side of it."""

    size: int
    halo: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.halo < 0:
            raise ValueError(f"BlockHalo needs a size of at least 1 and a halo of at least 0, got {self}")

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        start = quotient(q_idx, self.size) * self.size
        return (k_idx >= start - self.halo) & (k_idx < start + self.size + self.halo)

    @property
    def period(self) -> int | None:
        return self.size

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        first, last = (x // self.size * self.size for x in (q.lo, q.hi))
        empty = (k.hi < first - self.halo) | (k.lo >= last + self.size + self.halo)
        full = (k.lo >= last - self.halo) & (k.hi < first + self.size + self.halo)
        return np.where(empty, EMPTY, np.where(full, FULL, PARTIAL)).astype(np.int8)


def long_short_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    far_k: ArrayLike,
    far_v: ArrayLike,
    *,
    window: int,
    real: ArrayLike | None = None,
) -> jax.Array:
    """Attention to summaries and to the window around each block of queries.

    Args:
      q: `(B, N, H, D)`.
      k: `(B, N, H, D)`.
      v: `(B, N, H, E)`.
      far_k: summaries `(B, r, H, D)`.
      far_v: `(B, r, H, E)`.
      window: w, tokens of a block.
      real: `(B, N)` boolean, tokens that exist; all when None. The others get zeros.

    Returns:
      `(B, N, H, E)` in the dtype of `q`.
    """
    q, far_k = jnp.asarray(q), jnp.asarray(far_k)
    keys, values = (jnp.concatenate(pair, axis=1) for pair in ((far_k, jnp.asarray(k)), (far_v, jnp.asarray(v))))
    segments = None
    if real is not None:
        exist = jnp.asarray(real)
        far = jnp.zeros(far_k.shape[:2], jnp.int32)
        segments = jnp.where(exist, 0, 1), jnp.concatenate([far, jnp.where(exist, 0, 2)], axis=1)
    mask = _mask(q.shape[1], far_k.shape[1], window)
    return block_sparse_attention(q, keys, values, mask=mask, segment_ids=segments)


def _mask(num_tokens: int, num_summaries: int, window: int) -> Mask:
    return Concatenated((Full(), BlockHalo(window, max(window // 2, 1))), (num_summaries, num_tokens))


@register(
    "cab.long_short",
    paper=Paper(
        "Long-Short Transformer: Efficient Transformers for Language and Vision",
        "Zhu et al.",
        2021,
        arxiv="2107.02192",
    ),
    source=Source.AUTHORS_CODE,
    repository="Shark-NLP/CAB",
    cost=Cost(time="O(N·H·(r+w)·(D+E))", memory="O(N·H·(r+D+E))"),
    kernel="block_sparse_attention",
    summary="one softmax over a window of tokens and over a few projected summaries of all of them",
    small={"num_landmarks": 3, "window": 4, "conv_size": 3},
)
class LongShortAttention(KeyMaskedMixer):
    """Tokens (B, N, C) to (B, N, C). See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      num_landmarks: summaries r.
      window: w, tokens of a block.
      conv_size: taps of the convolution of values, odd; none when None.
      norm_eps: of both norms.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_landmarks: int = 16,
        window: int = 15,
        conv_size: int | None = None,
        norm_eps: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if num_landmarks < 1 or window < 1:
            raise ValueError(f"num_landmarks and window must be at least 1, got {num_landmarks} and {window}")
        super().__init__(features, num_heads=num_heads, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.num_landmarks, self.window = num_landmarks, window
        self.summary = ToHeads(features, num_heads, num_landmarks, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        norm = {"eps": norm_eps, "param_dtype": param_dtype, "rngs": rngs}
        self.norm = LayerNorm((num_heads, self.key_size), **norm)
        self.summary_norm = LayerNorm((num_heads, self.key_size), **norm)
        self.conv = nnx.data(None)
        if conv_size is not None:
            self.conv = HeadConv(num_heads, conv_size, param_dtype=param_dtype, rngs=rngs)

    def project(self, x: jax.Array, source: jax.Array) -> Heads:
        return Heads(self.query(x), self.norm(self.key(source)), self.norm(self.value(source)), (self.summary(source),))

    def attend(self, heads: Heads, given: Given) -> jax.Array:
        (q, k, v), logits, real = heads[:3], heads.extra[0], given.mask
        wide = at_least_float32(logits.dtype)
        share = masked_softmax(logits, None if real is None else real[:, :, None, None], axis=1)  # (B, N, H, r)
        far_k, far_v = (
            self.summary_norm(jnp.einsum("bnhr,bnhd->brhd", share, x.astype(wide))).astype(x.dtype) for x in (k, v)
        )
        record(self, "attention", lambda: self._map(q, k, far_k, share, real))
        y = long_short_attention(q, k, v, far_k, far_v, window=self.window, real=real)
        if self.conv is None:
            return y
        return y + self.conv(v if real is None else jnp.where(real[:, :, None, None], v, 0))

    def _map(self, q: jax.Array, k: jax.Array, far_k: jax.Array, share: jax.Array, real: jax.Array | None) -> jax.Array:
        """Weights on tokens: those in the window, and what their share in the summaries gives them."""
        tokens, summaries = q.shape[1], far_k.shape[1]
        seen = None
        if real is not None:
            seen = jnp.concatenate([jnp.ones(far_k.shape[:2], bool), real], axis=1)
        rule = _mask(tokens, summaries, self.window)
        weights = attention_weights(q, jnp.concatenate([far_k, k], axis=1), mask=seen, structural_mask=rule)
        far = jnp.einsum("bhnr,bmhr->bhnm", weights[..., :summaries], share.astype(weights.dtype))
        return (weights[..., summaries:] + far).astype(jnp.float32)
