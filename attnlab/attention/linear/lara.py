"""LARA: linear complexity randomized self-attention (Zheng et al., ICML 2022, arXiv:2204.04667), as the benchmark CAB
(Zhang et al., ICML 2023, arXiv:2210.07661) has it.

Random features whose rows are not drawn alike everywhere: each of m landmarks, the mean of a segment of the sequence,
proposes one, and a query weighs the proposals by importance. Per head, with log φ_c(x) = (w_c·x - |x|²/2) D^-1/2:

    μ_c  = q̄_c + k̄_c                                    means of segment c;  w_c = μ_c, in training μ_c + N(0, I)
    α_ic = softmax_c(μ_c·q_i D^-1/2 + log φ_c(q_i) + log Σ_j φ_c(k_j) - log φ_c(μ_c))
    y_i  = Σ_c α_ic Σ_j softmax_j(log φ_c(k_j)) v_j

so that it is linear attention with features α and softmax_j log φ. A sequence of fewer tokens than landmarks has one
for each token. CAB's code counts padding in segments and in Σ_j φ_c, here it counts nowhere. Cost O(N·m·D) per head.

Code: Shark-NLP/CAB. Its antithetic and variance-reduced forms cannot be chosen there, and are not here.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.linear_mixer import Places, Recurrence
from attnlab.nn.masking import masked_softmax
from attnlab.nn.prefix_scans import segment_logsumexp
from attnlab.nn.projected_mixer import ProjectedLinearMixer
from attnlab.nn.random_features import log_features
from attnlab.nn.segment_means import segment_means
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32


def lara_features(
    q: ArrayLike,
    k: ArrayLike,
    *,
    num_landmarks: int = 16,
    noise: jax.Array | None = None,
    real: ArrayLike | None = None,
    padding_counts: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys whose linear attention, without a denominator, is LARA.

    Args:
      q: `(B, N, H, D)`.
      k: `(B, N, H, D)`.
      num_landmarks: m.
      noise: random key of the noise of the proposals; none when None.
      real: boolean, tokens that exist: `(B, N)`, or with `padding_counts` `(B, N, H)` too, keys that are read.
      padding_counts: whether tokens that do not exist count in segments and in the sum of features, as in CAB's code.

    Returns:
      α `(B, N, H, m)` and the weights of keys `(B, N, H, m)`, in the dtype of `q`; m is N for shorter sequences.
    """
    q, k = jnp.asarray(q), jnp.asarray(k)
    dtype, wide, size = q.dtype, at_least_float32(q.dtype), q.shape[-1]
    q, k = q.astype(wide), k.astype(wide)
    counted = None if padding_counts or real is None else jnp.asarray(real)
    segments = segment_means(q.shape[1], num_landmarks, counted)
    landmarks = jnp.einsum(
        "bmn,bnhd->bmhd",
        jnp.broadcast_to(segments.weights, (q.shape[0], *segments.weights.shape[1:])).astype(wide),
        q + k,
    )
    rows = landmarks if noise is None else landmarks + jax.random.normal(noise, landmarks.shape, wide)
    rows = rows.swapaxes(1, 2) * size**-0.25  # (B, H, m, D), for x scaled by D^-1/4
    of_queries, of_keys = (products - half for products, half in (log_features(x, rows) for x in (q, k)))
    scaled = landmarks.swapaxes(1, 2) * size**-0.25
    of_landmarks = (rows * scaled).sum(-1) - jnp.square(scaled).sum(-1) / 2  # (B, H, m)
    near = jnp.einsum("bhmd,bnhd->bnhm", scaled, q) * size**-0.25
    total = segment_logsumexp(of_keys, real=counted)  # (B, 1, H, m)
    ratio = near + of_queries + total - of_landmarks[:, None]
    weights = masked_softmax(ratio, segments.exist[:, None, None])
    read = None
    if real is not None:
        read = jnp.asarray(real)
        read = (read if read.ndim == 3 else read[..., None])[..., None]
    return weights.astype(dtype), masked_softmax(of_keys, read, axis=1).astype(dtype)


@register(
    "cab.lara",
    paper=Paper(
        "Linear Complexity Randomized Self-attention Mechanism",
        "Zheng et al.",
        2022,
        arxiv="2204.04667",
    ),
    source=Source.AUTHORS_CODE,
    repository="Shark-NLP/CAB",
    cost=Cost(time="O(N·H·m·(D+E))", memory="O(N·H·(m+E))"),
    kernel="linear_attention",
    summary="random features proposed by segment means, weighed by importance for each query",
    small={"num_landmarks": 4, "noisy": False},
)
class LinearRandomizedAttention(ProjectedLinearMixer):
    """Tokens (B, N, C) to (B, N, C). See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      num_landmarks: m.
      noisy: whether training adds noise to the proposals.
      qkv_bias: whether the maps to queries, keys and values have a bias; the last map has.
      head_dim: D; C / H when None.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if `noisy`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    accepts = frozenset({"key_mask"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_landmarks: int = 16,
        noisy: bool = True,
        qkv_bias: bool = True,
        head_dim: int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"causal": False, "head_dim": head_dim, "use_bias": qkv_bias, "out_bias": True}
        super().__init__(features, num_heads=num_heads, **options, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if num_landmarks < 1:
            raise ValueError(f"num_landmarks must be at least 1, got {num_landmarks}")
        self.key_size = self.num_landmarks = num_landmarks
        self.draws = rngs["dropout"].fork() if noisy else nnx.data(None)

    def project(self, x: jax.Array, source: jax.Array, at: Places, carry: Any) -> tuple[Recurrence, Any]:
        noise = None if self.draws is None or at.deterministic else self.draws()
        q, k = self.query(x), self.key(source)
        q, k = lara_features(q, k, num_landmarks=self.num_landmarks, noise=noise, real=at.real)
        return Recurrence(q, k, self.value(source)), carry

    def merge(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return self.out(y)
