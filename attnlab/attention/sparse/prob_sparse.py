"""ProbSparse attention of Informer (Zhou et al., AAAI 2021, arXiv:2012.07436), as the benchmark CAB (Zhang et al., ICML
2023, arXiv:2210.07661) has it.

Few queries are worth attention: those whose scores are far from uniform, which shows in a few random keys. Per head,
with U = min(c ⌈ln N⌉, N) keys s drawn for each query, uniformly and with replacement:

    M_i = max_s q_i·k_s - Σ_s q_i·k_s / N
    y_i = softmax(q_i Kᵀ D^-1/2) V                for the U queries of the largest M
    y_i = mean_j v_j                              for the others

The sum is over the drawn keys and divided by the number of all, as in the code. No gradient goes through the choice.
CAB draws keys anew at every call; here a mixer has its own, the same in every call, and other ones in each training
call only with `redraw`. Its code ignores padding; here masks are refused. `mix_heads` is Informer's switch that lays
heads and tokens of the result out in the other order before the last map. Cost O(N ln N·(D+E)) per head.

Code: Shark-NLP/CAB, after zhouhaoyi/Informer2020.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Constant, Given, record
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.key_masked_mixer import KeyMaskedMixer
from attnlab.nn.softmax import attention_weights, softmax_attention
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32


def chosen_count(num_tokens: int, factor: int) -> int:
    """U = min(c ⌈ln N⌉, N), of queries and of keys; at least 1."""
    return max(1, min(factor * math.ceil(math.log(num_tokens)), num_tokens))


def choose_queries(q: ArrayLike, k: ArrayLike, samples: ArrayLike, count: int) -> jax.Array:
    """The queries that are farthest from uniform attention.

    Args:
      q: `(B, N, H, D)`.
      k: `(B, M, H, D)`.
      samples: indices of keys `(N, U)`, for each query.
      count: queries that are chosen.

    Returns:
      Indices `(B, H, count)`.
    """
    q, k = (jax.lax.stop_gradient(jnp.asarray(x)) for x in (q, k))
    q, k = (x.astype(at_least_float32(x.dtype)) for x in (q, k))
    # Rounding would change which queries are chosen.
    scores = jnp.einsum("bnhd,bnuhd->bhnu", q, k[:, jnp.asarray(samples)], precision=jax.lax.Precision.HIGHEST)
    # A sort leaves heads on their devices, where a top-k would gather them.
    return jnp.argsort(scores.sum(-1) / k.shape[1] - scores.max(-1), axis=-1)[..., :count]


def prob_sparse_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, chosen: ArrayLike, *, scale: float | None = None
) -> jax.Array:
    """Attention of the chosen queries; the others get the mean of the values.

    Args:
      q: `(B, N, H, D)`.
      k: `(B, M, H, D)`.
      v: `(B, M, H, E)`.
      chosen: indices of queries `(B, H, U)`.
      scale: of the scores; D^-1/2 when None.

    Returns:
      `(B, N, H, E)` in the dtype of `v`.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    # Gathers of each head's own rows would move heads between devices; these products cost what the scores do.
    pick = jax.nn.one_hot(chosen, q.shape[1], dtype=q.dtype)  # (B, H, U, N)
    y = softmax_attention(jnp.einsum("bhun,bnhd->buhd", pick, q, precision="highest"), k, v, scale=scale)
    mean = v.astype(at_least_float32(v.dtype)).mean(1, keepdims=True).astype(v.dtype)
    others = 1 - pick.sum(2).swapaxes(1, 2)[..., None]
    return jnp.einsum("bhun,buhe->bnhe", pick.astype(v.dtype), y, precision="highest") + others.astype(v.dtype) * mean


@register(
    "cab.prob_sparse",
    paper=Paper(
        "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
        "Zhou et al.",
        2021,
        arxiv="2012.07436",
    ),
    source=Source.AUTHORS_CODE,
    repository="Shark-NLP/CAB",
    cost=Cost(time="O(N·ln(N)·H·(D+E))", memory="O(N·ln(N)·H·D)"),
    summary="attention of the few queries that are farthest from uniform; the others get the mean value",
    small={"factor": 2},
)
class ProbSparseAttention(KeyMaskedMixer):
    """Tokens (B, N, C) to (B, N, C). See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      factor: c.
      scale: of the scores; D^-1/2 when None.
      mix_heads: whether the result is laid out head by head in front of the last map.
      redraw: whether training draws other keys at each call.
      head_dim: D; C / H when None.
      value_dim: E; D when None.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` with `redraw`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    accepts = frozenset()

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        factor: int = 5,
        scale: float | None = None,
        mix_heads: bool = False,
        redraw: bool = False,
        head_dim: int | None = None,
        value_dim: int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(features, num_heads=num_heads, head_dim=head_dim, value_dim=value_dim, **common)
        self.factor, self.scale, self.mix_heads = factor, scale, mix_heads
        self.seed = Constant(jax.random.key_data(rngs.params()))
        self.draws = rngs["dropout"].fork() if redraw else nnx.data(None)

    def samples(self, num_tokens: int, *, deterministic: bool = True) -> jax.Array:
        """Keys `(N, U)` that are drawn for each query."""
        key = jax.random.wrap_key_data(self.seed[...])
        if self.draws is not None and not deterministic:
            key = self.draws()
        return jax.random.randint(key, (num_tokens, chosen_count(num_tokens, self.factor)), 0, num_tokens, jnp.int32)

    def attend(self, heads: Heads, given: Given) -> jax.Array:
        return self.attend_by(heads, self.samples(heads.q.shape[1], deterministic=given.deterministic))

    def attend_by(self, heads: Heads, samples: jax.Array) -> jax.Array:
        """`(B, N, H, E)` of heads, by keys `(N, U)` that are drawn."""
        q, k, v = heads[:3]
        chosen = choose_queries(q, k, samples, chosen_count(q.shape[1], self.factor))
        record(self, "attention", lambda: self._map(q, k, chosen))
        y = prob_sparse_attention(q, k, v, chosen, scale=self.scale)
        return y.swapaxes(1, 2).reshape(y.shape) if self.mix_heads else y

    def _map(self, q: jax.Array, k: jax.Array, chosen: jax.Array) -> jax.Array:
        weights = attention_weights(q, k, scale=self.scale)
        row = (chosen[..., None] == jnp.arange(q.shape[1])).any(2)  # (B, H, N)
        return jnp.where(row[..., None], weights, 1 / k.shape[1]).astype(jnp.float32)
