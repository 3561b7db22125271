"""How many directions features take: singular values, numerical rank, and the matrix-based entropy.

Of tokens h (N, C), with the eigenvalues e of the smaller of h hᵀ and hᵀ h, clipped at 0, and p = e / Σ e:

    S_1 = -Σ p ln p,    S_α = ln(Σ p^α) / (1 - α)                  (Giraldo et al., 2015, arXiv:1211.2459)

exp(S_1) is an effective number of directions. The numerical rank counts singular values above a share of the largest.

Reference: JeffreyWong20/Secondary-Attention-Sinks, `compute_matrix_based_entropy`, where eigenvalues are divided by
their sum over the whole batch, which means something for a batch of one alone; here each example has its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32


class Spectrum(NamedTuple):
    """Entropy and eigenvalues of a Gram matrix, float32.

    Attributes:
      entropy: `(...)`, in nats; 0 for features that are all zero.
      eigenvalues: `(..., min(N, C))` in ascending order, at least 0.
    """

    entropy: jax.Array
    eigenvalues: jax.Array


@register(
    "secondary_sinks.matrix_entropy",
    kind=Kind.ANALYSIS,
    paper=Paper(
        "On the Existence and Behaviour of Secondary Attention Sinks", "Wong et al.", 2025, "2512.22213", number=162
    ),
    source=Source.AUTHORS_CODE,
    repository="JeffreyWong20/Secondary-Attention-Sinks",
    cost=Cost("O(N·C·min(N,C))", "O(min(N,C)²)"),
    summary="entropy of the eigenvalues of the tokens' Gram matrix: how many directions they take",
    small=lambda: Example(matrix_entropy, (jax.random.normal(jax.random.key(0), (2, 5, 7)),)),
)
def matrix_entropy(x: ArrayLike, *, alpha: float = 1.0) -> Spectrum:
    """The matrix-based entropy of features.

    Args:
      x: `(..., N, C)`; what is masked is set to zero before.
      alpha: order α of the entropy, above 0; 1 for Shannon's.

    Raises:
      ValueError: for fewer than two axes, or another order.
    """
    x = _wide(x)
    if not alpha > 0:
        raise ValueError(f"alpha must be above 0, got {alpha}")
    tokens, channels = x.shape[-2:]
    rows = x if tokens < channels else x.mT
    values = jnp.maximum(jnp.linalg.eigvalsh(jnp.matmul(rows, rows.mT, precision="highest")), 0)
    total = values.sum(-1, keepdims=True)
    share = values / jnp.where(total > 0, total, 1)
    positive = share > 0
    # Zeros are replaced in front of logarithm and power, whose slopes there are not finite.
    safe = jnp.where(positive, share, 1)
    if alpha == 1:
        entropy = -jnp.sum(share * jnp.log(safe), -1)
    else:
        power = jnp.where(positive, safe**alpha, 0).sum(-1)
        entropy = jnp.where(power > 0, jnp.log(jnp.where(power > 0, power, 1)) / (1 - alpha), 0)
    return Spectrum(entropy, values)


def singular_values(x: ArrayLike) -> jax.Array:
    """Singular values `(..., min(N, C))` in float32 of features `(..., N, C)`, the largest first.

    Raises:
      ValueError: for fewer than two axes.
    """
    return jnp.linalg.svd(_wide(x), compute_uv=False)


def numerical_rank(x: ArrayLike, *, tolerance: float = 1e-3) -> jax.Array:
    """How many singular values exceed `tolerance` times the largest: `(...)` int32, 0 for features that are zero.

    Raises:
      ValueError: for fewer than two axes, or a tolerance outside of 0..1.
    """
    if not 0 <= tolerance <= 1:
        raise ValueError(f"tolerance must lie in 0..1, got {tolerance}")
    values = singular_values(x)
    return jnp.sum((values > tolerance * values[..., :1]) & (values > 0), axis=-1, dtype=jnp.int32)


def _wide(x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"features must be (..., N, C), got shape {x.shape}")
    return x.astype(at_least_float32(x.dtype))
