"""Poolings of bags by ACMIL (Zhang et al., ECCV 2024, arXiv:2311.07125): several branches, and their favourites masked.

K branches score the instances h_n of a bag, and each makes a vector of its own; the bag's is that of the mean of their
weights:

    s_kn = w_k · (tanh(V h_n) ⊙ σ(U h_n)) + c_k,     p_k = softmax_n(s_k)               V, U shared by the branches
    branches: p_k h      bag: (Σ_k p_k / K) h

or, with heads, each branch is an attention by a learned query, of which the bag takes the weights, head by head:

    s_khn = q_k W_kh · h_n W'_kh / √D,     branches: LN(p_k (h W_k) W_o),     bag: LN((Σ_k p_k / K) (h W) W_o)

Masking, in training: of the m instances of the highest scores, in each branch and head a share, drawn anew, is given
the score -1e9, so that the others take their weight (STKIM): ranks argsort(u)[: ⌊m · share⌋] of the descending list,
u uniform. With K = 1 and no masking it is ABMIL (Ilse et al., 2018, arXiv:1802.04712), gated. Instances that a mask
leaves out are no favourites and have no weight. Code: dazhangyu123/ACMIL. Cost O(N·(C·A + K·C)).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Pooling, record
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.linear import Linear, uniform_init
from attnlab.nn.masking import masked_softmax
from attnlab.nn.norms import LayerNorm
from attnlab.pooling.parts import head_size, wide
from attnlab.registry import Cost, Example, Kind, Paper, Source, register

PAPER = Paper(
    "Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification",
    "Zhang et al.",
    2024,
    arxiv="2311.07125",
    number=62,
)
REPOSITORY = "dazhangyu123/ACMIL"
COST = Cost(time="O(N·(C·A+K·C))", memory="O(N·K)")
MASKED = -1e9


def _masking_example() -> Example:
    rng = np.random.default_rng(0)
    scores, draws = rng.standard_normal((2, 3, 7)).astype(np.float32), rng.random((2, 3, 4)).astype(np.float32)
    return Example(mask_top_instances, (scores, draws), {"share": 0.5}, batched=(0, 1))


@register(
    "acmil.masking",
    kind=Kind.FUNCTION,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=Cost(time="O(N·log(m))", memory="O(N)"),
    summary="a share of the instances of the highest scores, drawn at random, scored as good as absent",
    small=_masking_example,
)
def mask_top_instances(
    scores: ArrayLike, draws: ArrayLike, *, share: float = 0.6, mask: ArrayLike | None = None
) -> jax.Array:
    """Gives a share of the best instances the score -1e9.

    Args:
      scores: `(…, N)`.
      draws: uniform numbers `(…, m)` for the m best; further ones than N are not used.
      share: of the best that is masked, rounded down.
      mask: `(…, N)` boolean, which instances exist, broadcastable; of fewer than m, the share is of those.

    Returns:
      The shape of `scores`; no gradient passes the choice.

    Raises:
      ValueError: for a share that is not in 0..1.
    """
    scores = jnp.asarray(scores)
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in 0..1, got {share}")
    count = min(jnp.shape(draws)[-1], scores.shape[-1])
    draws = jax.lax.stop_gradient(jnp.asarray(draws, jnp.float32)[..., :count])
    ranked = jax.lax.stop_gradient(wide(scores))
    real = count
    if mask is not None:
        there = jnp.broadcast_to(jnp.asarray(mask), scores.shape)
        ranked = jnp.where(there, ranked, -jnp.inf)
        real = jnp.minimum(there.sum(-1, keepdims=True), count)
        draws = jnp.where(jnp.arange(count) < real, draws, jnp.inf)
    places = jax.lax.top_k(ranked, count)[1]
    turn = jnp.argsort(jnp.argsort(draws, axis=-1), axis=-1)
    # The number that is masked, of static numbers as the authors round it.
    most = math.floor(count * share) if mask is None else jnp.floor(jnp.asarray(real, jnp.float32) * share + 1e-6)
    hit = jnp.put_along_axis(jnp.zeros(scores.shape, bool), places, turn < most, axis=-1, inplace=False)
    return jnp.where(hit, jnp.asarray(MASKED, scores.dtype), scores)


class _Branches(Pooling):
    """What the poolings of several branches share: the masking of favourites.

    Attributes:
      masked: m.
      share: of them.
    """

    def _check(self, num_branches: int, masked: int, share: float, rngs: nnx.Rngs) -> None:
        if num_branches < 1 or masked < 0 or not 0 <= share <= 1:
            raise ValueError(
                f"num_branches must be at least 1, masked at least 0, share in 0..1: {num_branches}, {masked}, {share}"
            )
        self.num_branches, self.masked, self.share = num_branches, masked, share
        self.rngs = rngs["dropout"].fork() if masked else nnx.data(None)

    def _challenged(
        self, scores: jax.Array, mask: jax.Array | None, draws: ArrayLike | None, deterministic: bool
    ) -> jax.Array:
        """Scores `(B, …, N)` with favourites masked, in training or where draws are given."""
        if draws is None:
            if deterministic or self.rngs is None:
                return scores
            draws = jax.random.uniform(self.rngs(), (*scores.shape[:-1], min(self.masked, scores.shape[-1])))
        there = None if mask is None else mask.reshape(mask.shape[0], *(1,) * (scores.ndim - 2), -1)
        return mask_top_instances(scores, draws, share=self.share, mask=there)


@register(
    "acmil",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=COST,
    summary="gated scores of several branches, the bag weighed by their mean; favourites masked in training",
    small={"hidden_features": 8},
)
class MultiBranchPooling(_Branches):
    """Bags `(B, N, C)` to one vector `(B, C)`, or to that of each branch; see the module docstring.

    Args:
      features: channels C of the instances.
      num_branches: K.
      hidden_features: channels of V and U.
      masked: m, favourites of which some are masked in training; 0 for none, the authors train with 10.
      share: of them that is.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` for the masking.

    Raises:
      ValueError: for numbers out of range.
    """

    def __init__(
        self,
        features: int,
        *,
        num_branches: int = 5,
        hidden_features: int = 128,
        masked: int = 0,
        share: float = 0.6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self._check(num_branches, masked, share, rngs)
        self.features = self.out_features = features
        self.dtype = dtype
        init = uniform_init(features)
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        into = {"axes": ("embed", "mlp"), "kernel_init": init, "bias_init": init, **common}
        self.tanh, self.gate = (Linear(features, hidden_features, **into) for _ in range(2))
        last = uniform_init(hidden_features)
        self.score = Linear(
            hidden_features, num_branches, axes=("mlp", None), kernel_init=last, bias_init=last, **common
        )

    def scores(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        *,
        draws: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """The scores of all instances in each branch, -1e9 where they are masked.

        Args:
          x: `(B, N, C)`.
          mask: `(B, N)` boolean, which instances exist.
          draws: uniform numbers `(B, K, m)` for the masking; in training drawn from the stream when None.
          deterministic: False in training.

        Returns:
          `(B, K, N)` in float32 (or wider).
        """
        hidden = jnp.tanh(wide(self.tanh(x))) * jax.nn.sigmoid(wide(self.gate(x)))
        scores = wide(self.score(hidden.astype(x.dtype))).swapaxes(1, 2)
        return self._challenged(scores, mask, draws, deterministic)

    def read(
        self, x: jax.Array, scores: jax.Array, mask: jax.Array | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """The branches' vectors `(B, K, C)` and the bag's `(B, C)` by scores of `scores`."""
        weights = self._weights(scores, mask)
        return _sums(weights, x), _sums(weights.mean(1, keepdims=True), x)[:, 0]

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        weights = self._weights(self.scores(x, mask, deterministic=deterministic), mask)
        record(self, "attention", lambda: weights[:, None])
        return _sums(weights.mean(1, keepdims=True), x)[:, 0]

    def pool_branches(
        self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        return _sums(self._weights(self.scores(x, mask, deterministic=deterministic), mask), x)

    @staticmethod
    def _weights(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
        return masked_softmax(scores, None if mask is None else mask[:, None])


@register(
    "acmil.abmil",
    paper=Paper("Attention-based Deep Multiple Instance Learning", "Ilse et al.", 2018, arxiv="1802.04712"),
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=COST,
    summary="gated attention of one branch weighs the instances of a bag, without masking",
    small={"hidden_features": 8},
)
class GatedABMILPooling(MultiBranchPooling):
    """Bags `(B, N, C)` to one vector `(B, C)`: one branch, no masking.

    Args:
      features: channels C of the instances.
      hidden_features: channels of V and U.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        *,
        hidden_features: int = 128,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(features, num_branches=1, hidden_features=hidden_features, **common)


class _Read(nnx.Module):
    """Values of instances summed with weights of each head, mapped and normed: LN(p (h W) W_o)."""

    def __init__(self, features: int, num_heads: int, dropout: float, *, dtype: Any, **stored: Any):
        init, size = uniform_init(features), features // num_heads
        common: dict[str, Any] = {"kernel_init": init, "bias_init": init, "dtype": dtype, **stored}
        self.value = ToHeads(features, num_heads, size, **common)
        self.out = FromHeads(num_heads, size, features, **common)
        self.dropout = nnx.Dropout(dropout, rngs=stored["rngs"]) if dropout > 0 else nnx.data(None)
        self.norm = LayerNorm(features, param_dtype=stored["param_dtype"], rngs=stored["rngs"])

    def __call__(self, x: jax.Array, weights: jax.Array, deterministic: bool) -> jax.Array:
        """Instances `(B, N, C)` with weights `(B, H, N)` to `(B, C)`."""
        y = jnp.einsum("bhn,bnhd->bhd", weights.astype(x.dtype), self.value(x), preferred_element_type=weights.dtype)
        y = self.out(y.astype(x.dtype))
        y = y if self.dropout is None else self.dropout(y, deterministic=deterministic)
        return self.norm(y)


@register(
    "acmil.heads",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=Cost(time="O(K·N·C²)", memory="O(K·N·(C+H))"),
    summary="attention by a learned query in each of several branches, the bag weighed by their mean in each head",
)
class MultiBranchHeadsPooling(_Branches):
    """Bags `(B, N, C)` to one vector `(B, C)`, or to that of each branch; see the module docstring.

    Args:
      features: channels C of the instances.
      num_branches: K.
      num_heads: heads H of each.
      masked: m, favourites of which some are masked in training; 0 for none, the authors train with 10.
      share: of them that is.
      dropout: rate on what is mapped out of the heads; the authors' code has 0.1.
      auxiliary: whether the branches have vectors of their own, which their classifiers need; else only their weights
        exist.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` for masking and dropout.

    Raises:
      ValueError: for numbers out of range, or if heads do not divide the channels.
    """

    def __init__(
        self,
        features: int,
        *,
        num_branches: int = 5,
        num_heads: int = 8,
        masked: int = 0,
        share: float = 0.6,
        dropout: float = 0.0,
        auxiliary: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self._check(num_branches, masked, share, rngs)
        size = head_size(features, num_heads)
        self.features = self.out_features = features
        self.num_heads, self.dtype = num_heads, dtype
        stored: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        init = uniform_init(features)
        into: dict[str, Any] = {"kernel_init": init, "bias_init": init, "dtype": dtype, **stored}
        drawn = nnx.initializers.normal(1e-6)(rngs.params(), (num_branches, features), param_dtype)
        self.queries = nnx.Param(drawn, logical_axes=(None, "embed"), weight_decay=False)
        self.query, self.key = (
            nnx.List(ToHeads(features, num_heads, size, **into) for _ in range(num_branches)) for _ in range(2)
        )
        count = num_branches if auxiliary else 0
        self.reads = nnx.List(_Read(features, num_heads, dropout, dtype=dtype, **stored) for _ in range(count))
        self.bag = _Read(features, num_heads, dropout, dtype=dtype, **stored)

    def scores(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        *,
        draws: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """The scores of all instances in each head and branch, -1e9 where they are masked.

        Args:
          x: `(B, N, C)`.
          mask: `(B, N)` boolean, which instances exist.
          draws: uniform numbers `(B, H, K, m)` for the masking; in training drawn from the stream when None.
          deterministic: False in training.

        Returns:
          `(B, H, K, N)` in float32 (or wider).
        """
        rows = []
        for own, query, key in zip(self.queries[...], self.query, self.key, strict=True):
            q, k = query(own.astype(x.dtype)), key(x)
            rows.append(jnp.einsum("hd,bnhd->bhn", wide(q), wide(k)) * q.shape[-1] ** -0.5)
        return self._challenged(jnp.stack(rows, 2), mask, draws, deterministic)

    def read(
        self, x: jax.Array, scores: jax.Array, mask: jax.Array | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """The branches' vectors `(B, K, C)` and the bag's `(B, C)` by scores of `scores`."""
        weights = self._weights(scores, mask)
        return self._each(x, weights, deterministic), self.bag(x, weights.mean(2), deterministic)

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        weights = self._weights(self.scores(x, mask, deterministic=deterministic), mask)
        record(self, "attention", lambda: weights)
        return self.bag(x, weights.mean(2), deterministic)

    def pool_branches(
        self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        weights = self._weights(self.scores(x, mask, deterministic=deterministic), mask)
        return self._each(x, weights, deterministic)

    def _each(self, x: jax.Array, weights: jax.Array, deterministic: bool) -> jax.Array:
        if not self.reads:
            raise ValueError("auxiliary is False: the branches have no vectors of their own")
        return jnp.stack([read(x, weights[:, :, k], deterministic) for k, read in enumerate(self.reads)], 1)

    @staticmethod
    def _weights(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
        return masked_softmax(scores, None if mask is None else mask[:, None, None])


def _sums(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Instances `(B, N, C)` summed with weights `(B, K, N)`: `(B, K, C)`, sums in float32 (or wider)."""
    y = jnp.einsum("bkn,bnc->bkc", weights.astype(x.dtype), x, preferred_element_type=weights.dtype)
    return y.astype(x.dtype)
