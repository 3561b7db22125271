"""Sparsifiner: softmax attention on the few pairs that a cheap low-rank guess points at (CVPR 2023, arXiv:2303.13755).

For N tokens, a class token in front, of H heads of size D; P_n, P_b `(N, n)` and maps to c < D channels are learned,
the same for all heads of a layer (code: lim142857/Sparsifiner):

    a = softmax_n(W_q' q (P_n^T W_k' k)^T / √H)          coefficients of every patch's row; the number of heads, not D
    approximation = a B      B = P_b^T signed, in training of the approximation; else |P_b|^T, small entries set to 0,
                             and a without all but its largest
    connectivity = the ⌈rate · N⌉ largest of each row, or those above a threshold; all of the class token's row
    y = softmax over connectivity of (q k^T / √D) v W_o

The connectivity has no gradient: the approximation learns by a loss against full attention (`reconstruct`, in which the
output is that of full attention), see `attnlab.objectives.token_distillation`. Patches may be pruned: dead ones have
zeros for queries, keys and values, and are in nobody's connectivity but the class token's. Scores of all pairs are
computed and most of them masked: with some 200 tokens that is faster than to gather.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import record
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.linear import Linear, trunc_normal
from attnlab.nn.masking import masked_softmax
from attnlab.nn.routing import top_k_mask
from attnlab.nn.softmax import attention_scores, weighted_values
from attnlab.points import Edits, visit
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper(
    "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
    "Wei et al.",
    2023,
    arxiv="2303.13755",
    number=29,
)
SOURCE = {"paper": PAPER, "source": Source.AUTHORS_CODE, "repository": "lim142857/Sparsifiner"}
COST = Cost(time="O(N²·H·D), of which the mask needs N·n·H·c + N²·H·n", memory="O(N²·H)")


class Prediction(NamedTuple):
    """What a predictor makes of queries and keys.

    Attributes:
      approximation: of the attention of all rows but the class token's, `(B, H, N - 1, N)`.
      connectivity: which pairs attend, `(B, H, N, N)` boolean.
    """

    approximation: jax.Array
    connectivity: jax.Array


class SparseAttention(NamedTuple):
    """What the attention of one layer makes of its tokens.

    Attributes:
      tokens: `(B, N, C)`.
      approximation: see `Prediction`.
      connectivity: see `Prediction`.
      weights: by which values were mixed, `(B, H, N, N)`.
      full: the softmax over all pairs, `(B, H, N, N)`.
      alive: `(B, N - 1)` boolean, patches that are left; None where none was ever pruned.
    """

    tokens: jax.Array
    approximation: jax.Array
    connectivity: jax.Array
    weights: jax.Array
    full: jax.Array
    alive: jax.Array | None


class MaskPredictor(nnx.Module):
    """The low-rank guess at the attention map; see the module docstring for the equations.

    Args:
      head_dim: D of queries and keys.
      num_heads: H.
      num_tokens: N, the class token among them.
      keep_rate: share of all tokens that a row attends to.
      reduce_n_factor: n is N over it, rounded down.
      reduce_c_factor: c is D over it, rounded down.
      share_inout_proj: whether P_b is P_n.
      basis_threshold: entries of |P_b| up to it count as 0.
      top_coefficients: how many coefficients a row keeps; when None those above `coefficient_threshold`.
      coefficient_threshold: coefficients up to it count as 0, if it is positive.
      score_threshold: a row attends to what is above it, in place of a share of all.
      prune_rows: whether dead patches attend to nothing.
      scale: in place of 1 / √H.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for factors that leave nothing, a rate out of (0, 1], or more coefficients than there are.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        num_heads: int,
        num_tokens: int,
        keep_rate: float = 0.25,
        reduce_n_factor: float = 8,
        reduce_c_factor: int = 2,
        share_inout_proj: bool = False,
        basis_threshold: float = 0.02,
        top_coefficients: int | None = 8,
        coefficient_threshold: float = 0.0,
        score_threshold: float | None = None,
        prune_rows: bool = False,
        scale: float | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        rows, channels = int(num_tokens // reduce_n_factor), head_dim // reduce_c_factor
        if rows < 1 or channels < 1:
            raise ValueError(
                f"reduce_n_factor and reduce_c_factor must leave some of {num_tokens} tokens and {head_dim} channels, "
                f"got {reduce_n_factor} and {reduce_c_factor}"
            )
        if not 0 < keep_rate <= 1:
            raise ValueError(f"keep_rate must be in (0, 1], got {keep_rate}")
        if top_coefficients is not None and not 1 <= top_coefficients <= rows:
            raise ValueError(f"top_coefficients must be in 1..{rows}, got {top_coefficients}")
        if score_threshold is not None and score_threshold <= 0:
            raise ValueError(f"score_threshold must be positive, got {score_threshold}")
        self.num_tokens, self.budget = num_tokens, math.ceil(keep_rate * num_tokens)
        self.scale = num_heads**-0.5 if scale is None else scale
        self.basis_threshold, self.score_threshold = basis_threshold, score_threshold
        self.top_coefficients, self.coefficient_threshold = top_coefficients, coefficient_threshold
        self.prune_rows = prune_rows
        options = {"axes": (None, None), "kernel_init": trunc_normal, "param_dtype": param_dtype, "rngs": rngs}
        self.query, self.key = Linear(head_dim, channels, **options), Linear(head_dim, channels, **options)
        table = {"logical_axes": (None, None), "weight_decay": True}
        self.down = nnx.Param(trunc_normal(rngs.params(), (num_tokens, rows), param_dtype), **table)
        self.up = nnx.data(None)
        if not share_inout_proj:
            self.up = nnx.Param(trunc_normal(rngs.params(), (num_tokens, rows), param_dtype), **table)

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        alive: jax.Array | None = None,
        *,
        budget: ArrayLike | None = None,
        signed: bool = False,
    ) -> Prediction:
        """Guesses.

        Args:
          q: queries `(B, N, H, D)` in float32 (or wider).
          k: keys, alike.
          alive: `(B, N - 1)` boolean, which patches are left; all when None.
          budget: `(B,)` or a number, most columns of a row where patches were pruned; as many as are left in the
            example when None. Never more than the rate gives.
          signed: whether the approximation is in training.

        Raises:
          ValueError: for another number of tokens than the predictor was built for.
        """
        if q.shape[1] != self.num_tokens:
            raise ValueError(f"tokens must be the {self.num_tokens} that the layer was built for, got {q.shape[1]}")
        q, k = self.query(q), self.key(k)
        if alive is not None:
            q, k = (with_zeros(x, alive) for x in (q, k))
        down, up = (table[...].astype(q.dtype) for table in (self.down, self.down if self.up is None else self.up))
        highest = jax.lax.Precision.HIGHEST  # which pairs are chosen should not hang on rounding
        keys = jnp.einsum("bmhc,mn->bhnc", k, down, precision=highest)
        scores = jnp.einsum("bmhc,bhnc->bhmn", q[:, 1:], keys, precision=highest) * self.scale
        coefficients = jax.nn.softmax(scores)
        if not signed:
            up = _above(jnp.abs(up), self.basis_threshold)
            if self.top_coefficients is not None:
                coefficients = jnp.where(top_k_mask(coefficients, self.top_coefficients), coefficients, 0)
            elif self.coefficient_threshold > 0:
                coefficients = _above(coefficients, self.coefficient_threshold)
        approximation = jnp.einsum("bhmn,jn->bhmj", coefficients, up, precision=highest)
        return Prediction(approximation, self._connectivity(approximation, alive, budget))

    def _connectivity(self, approximation: jax.Array, alive: jax.Array | None, budget: ArrayLike | None) -> jax.Array:
        scores = jax.lax.stop_gradient(approximation)
        if alive is not None:
            columns = jnp.pad(alive, ((0, 0), (1, 0)), constant_values=True)
            scores = jnp.where(columns[:, None, None], scores, -jnp.inf)
        if self.score_threshold is not None:
            chosen = scores > self.score_threshold
        else:
            index = jax.lax.top_k(scores, self.budget)[1]
            within = jnp.ones(index.shape, bool)
            if alive is not None:
                most = alive.sum(-1) if budget is None else jnp.asarray(budget)
                most = jnp.broadcast_to(most, alive.shape[:1])[:, None, None, None]
                within = jnp.broadcast_to(jnp.arange(self.budget) < most, index.shape)
            chosen = jnp.put_along_axis(jnp.zeros(scores.shape, bool), index, within, axis=-1, inplace=False)
        if alive is not None and self.prune_rows:
            chosen = chosen & alive[:, None, :, None]
        return jnp.pad(chosen, ((0, 0), (0, 0), (1, 0), (0, 0)), constant_values=True)


def with_zeros(x: jax.Array, alive: jax.Array) -> jax.Array:
    """Tokens `(B, N, …)`, a class token in front, with zeros in place of dead patches."""
    real = jnp.pad(alive, ((0, 0), (1, 0)), constant_values=True)
    return jnp.where(real.reshape(*real.shape, *(1,) * (x.ndim - 2)), x, 0)


def _above(x: jax.Array, threshold: float) -> jax.Array:
    return jnp.where(x > threshold, x, 0)


def _example() -> Example:
    keys = jax.random.split(jax.random.key(0), 2)
    sizes = {"num_heads": 2, "num_tokens": 7, "keep_rate": 0.5, "reduce_n_factor": 2, "top_coefficients": 2}
    module = SparsifinerAttention(8, **sizes, basis_threshold=0.0, rngs=nnx.Rngs(0))
    alive = jnp.array([[True] * 6, [True, False, True, True, False, True]])
    return Example(module, (jax.random.normal(keys[0], (2, 7, 8)), alive), {}, (0, 1), (0,))


@register(
    "sparsifiner",
    kind=Kind.MODULE,
    cost=COST,
    summary="softmax attention on those pairs of tokens that a learned low-rank guess of its map points at",
    small=_example,
    **SOURCE,
)
class SparsifinerAttention(nnx.Module):
    """Tokens `(B, N, C)` of a fixed number, a class token in front, to a `SparseAttention`.

    Args:
      features: channels C.
      num_heads: heads H.
      num_tokens: N, the class token among them.
      qkv_bias: whether queries, keys and values have a bias.
      scale: of the scores; D^-1/2 when None.
      token_keep_rate: share of the patches that is left where this layer prunes.
      prune_tokens: whether this layer prunes patches, those that the class token attends to least.
      reconstruct: whether the approximation is being trained: with `deterministic=False` the attention is full then,
        and patches are never pruned.
      projection_dropout: rate on the result.
      dtype: of the computation; that of the tokens when None. The guess is float32 (or wider).
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **predictor: further arguments of `MaskPredictor`.

    Raises:
      ValueError: if the heads do not divide the channels, and as `MaskPredictor`.
    """

    points = frozenset({"qkv", "attention", "heads"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_tokens: int,
        qkv_bias: bool = True,
        scale: float | None = None,
        token_keep_rate: float = 0.5,
        prune_tokens: bool = False,
        reconstruct: bool = False,
        projection_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **predictor: Any,
    ):
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
        if not 0 < token_keep_rate <= 1:
            raise ValueError(f"token_keep_rate must be in (0, 1], got {token_keep_rate}")
        size, stored = features // num_heads, {"param_dtype": param_dtype, "rngs": rngs}
        self.features, self.dtype, self.reconstruct, self.prune_tokens = features, dtype, reconstruct, prune_tokens
        self.scale, self.left = scale, math.ceil(token_keep_rate * (num_tokens - 1))
        self.query, self.key, self.value = (
            ToHeads(features, num_heads, size, use_bias=qkv_bias, **stored) for _ in range(3)
        )
        self.predictor = MaskPredictor(size, num_heads=num_heads, num_tokens=num_tokens, **predictor, **stored)
        self.out = FromHeads(num_heads, size, features, **stored)
        self.dropout = nnx.Dropout(projection_dropout, rngs=rngs) if projection_dropout > 0 else nnx.data(None)

    def __call__(
        self,
        x: ArrayLike,
        alive: ArrayLike | None = None,
        *,
        budget: ArrayLike | None = None,
        edits: Edits | None = None,
        deterministic: bool = True,
    ) -> SparseAttention:
        """Attends; weights, approximation and connectivity are recorded under these names.

        Args:
          x: tokens `(B, N, C)`.
          alive: `(B, N - 1)` boolean, which patches were left by the layers before; all when None.
          budget: see `MaskPredictor`.
          edits: interventions on this layer of this call.
          deterministic: False in training.

        Raises:
          ValueError: for shapes that do not fit.
        """
        x = jnp.asarray(x, self.dtype)
        if x.ndim != 3 or x.shape[-1] != self.features:
            raise ValueError(f"x must be (B, N, {self.features}), got {x.shape}")
        alive = None if alive is None else jnp.asarray(alive)
        if alive is not None and (alive.shape != (x.shape[0], x.shape[1] - 1) or alive.dtype != jnp.bool_):
            raise ValueError(f"alive must be boolean (B, N - 1), got {alive.dtype}{list(alive.shape)} of {x.shape}")
        wide = x.astype(at_least_float32(x.dtype))  # which pairs are chosen should not hang on rounding
        q, k, v = self.query(wide), self.key(wide), self.value(x)
        if alive is not None and not self.reconstruct:
            q, k, v = (with_zeros(a, alive) for a in (q, k, v))
        signed = self.reconstruct and not deterministic
        guess = self.predictor(q, k, alive, budget=budget, signed=signed)
        q, k, v = visit(self, edits, "qkv", Heads(q.astype(x.dtype), k.astype(x.dtype), v))[:3]
        scores = attention_scores(q, k, scale=self.scale)
        full = masked_softmax(scores)
        weights = full if signed else masked_softmax(scores, guess.connectivity)
        allowed = None if signed else guess.connectivity
        weights = visit(self, edits, "attention", weights, q=q, k=k, v=v, allowed=allowed)
        record(self, "approximation", lambda: guess.approximation)
        record(self, "connectivity", lambda: guess.connectivity)
        y = self.out(visit(self, edits, "heads", weighted_values(weights, v)))
        y = y if self.dropout is None else self.dropout(y, deterministic=deterministic)
        if self.prune_tokens and not self.reconstruct:
            alive = top_k_mask(weights[:, :, 0, 1:].mean(1), self.left, where=alive)
        return SparseAttention(y, *guess, weights, full, alive)
