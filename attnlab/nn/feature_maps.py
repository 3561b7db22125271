"""Feature maps φ of linear attention that have no parameters: softmax(q·k) is replaced by φ(q)·φ(k) ≥ 0.

Each takes an array with the channels of a head last and returns features in its dtype, non-negative but for `identity`.
`feature_map` finds one by name. (Hedgehog's are learned and stand with that mechanism.)

A polynomial of the product of q and k, such as the first terms of its exponential, is linear in monomials of q and k:

    Σ_n p_n (τ Σ_c q_c k_c …)^n = Σ_a w_a m_a(q) m_a(k) …
    m_a(x) = Π_c x_c^{a_c},    w_a = p_|a| τ^|a| |a|! / Π_c a_c!

over all exponents a with |a| = Σ_c a_c at most the degree g, binomial(D + g, g) in number; the dots stand for further
factors, as in attention of pairs of keys. `monomials` are m, `monomial_weights` w, `taylor` is √w m for exp.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnlab.suggest import suggestion
from pallas_kernels.dtypes import at_least_float32

FeatureMap = Callable[[jax.Array], jax.Array]


def identity(x: ArrayLike) -> jax.Array:
    """x itself; weights may then be negative."""
    return jnp.asarray(x)


def relu(x: ArrayLike) -> jax.Array:
    """max(x, 0), as EfficientViT (Cai et al., 2023, arXiv:2205.14756). A token may have no feature at all."""
    return jax.nn.relu(x)


def elu1(x: ArrayLike) -> jax.Array:
    """elu(x) + 1, as linear transformers (Katharopoulos et al., 2020, arXiv:2006.16236)."""
    x = jnp.asarray(x)
    # elu(x) + 1 would round small features to 0. The inner choice keeps exp from overflowing where it is not taken.
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


def exp(x: ArrayLike) -> jax.Array:
    """exp(x - max(x)) over the last axis: a token's largest feature is 1, and nothing overflows.

    The plain exponential but for a factor per token, which cancels for queries where attention is normalised, and
    evens out the weight of keys. The factor carries no gradient.
    """
    x = jnp.asarray(x)
    return jnp.exp(x - jax.lax.stop_gradient(x.max(-1, keepdims=True)))


def softmax(x: ArrayLike) -> jax.Array:
    """Softmax over the last axis, in float32: efficient attention (Shen et al., 2021, arXiv:1812.01243) for queries."""
    x = jnp.asarray(x)
    return jax.nn.softmax(x.astype(at_least_float32(x.dtype)), axis=-1).astype(x.dtype)


def squared_relu(x: ArrayLike) -> jax.Array:
    """max(x, 0)² (So et al., 2021, arXiv:2109.08668)."""
    return jnp.square(jax.nn.relu(x))


def monomials(x: ArrayLike, degree: int) -> jax.Array:
    """All products of at most `degree` channels: `(…, D)` to `(…, binomial(D + degree, degree))`.

    The constant 1 comes first, then the channels, then their products by two (x_0², x_0 x_1, …, x_1², …), and so on;
    computed in float32 (or wider).

    Raises:
      ValueError: if the degree is negative.
    """
    x = jnp.asarray(x)
    wide = x.astype(at_least_float32(x.dtype))
    factors = jnp.concatenate([jnp.ones((*x.shape[:-1], 1), wide.dtype), wide], -1)
    y = jnp.ones((), wide.dtype)
    for places in _factors(x.shape[-1], degree).T:
        y = y * factors[..., places]
    return jnp.broadcast_to(y, (*x.shape[:-1], math.comb(x.shape[-1] + degree, degree))).astype(x.dtype)


def monomial_weights(
    size: int, degree: int, *, scale: float = 1.0, coefficients: Sequence[float] | None = None
) -> np.ndarray:
    """The weights w of the monomials of `size` channels, float64, in the order of `monomials`.

    Args:
      size: channels D.
      degree: g.
      scale: τ, the factor of the product.
      coefficients: p_0..p_g of the polynomial; 1/n!, those of exp, when None.

    Raises:
      ValueError: if there are not g + 1 coefficients.
    """
    if coefficients is None:
        coefficients = [1 / math.factorial(power) for power in range(degree + 1)]
    if len(coefficients) != degree + 1:
        raise ValueError(f"coefficients must be {degree + 1}, one for each power up to {degree}: {len(coefficients)}")
    weights = []
    for places in _factors(size, degree).tolist():
        powers = [places.count(channel) for channel in set(places) - {0}]
        total = sum(powers)
        several = math.factorial(total) / math.prod(math.factorial(power) for power in powers)
        weights.append(coefficients[total] * scale**total * several)
    return np.asarray(weights)


def taylor(x: ArrayLike, degree: int = 2, *, scale: float = 1.0) -> jax.Array:
    """Features whose product is the Taylor polynomial of exp(scale · q·k) of that degree; positive if it is even.

    `(…, D)` to `(…, binomial(D + degree, degree))` in the dtype of `x`; scale ≥ 0.
    """
    x = jnp.asarray(x)
    wide = x.astype(at_least_float32(x.dtype))
    weights = np.sqrt(monomial_weights(x.shape[-1], degree, scale=scale))
    return (monomials(wide, degree) * jnp.asarray(weights, wide.dtype)).astype(x.dtype)


@functools.cache
def _factors(size: int, degree: int) -> np.ndarray:
    """`(binomial(size + degree, degree), degree)`: the factors of each monomial, 0 for 1 and c + 1 for channel c."""
    if degree < 0:
        raise ValueError(f"degree must be at least 0, got {degree}")
    chosen = list(itertools.combinations_with_replacement(range(size + 1), degree))
    return np.asarray(chosen, np.int32).reshape(len(chosen), degree)


FEATURE_MAPS: dict[str, FeatureMap] = {
    "identity": identity,
    "relu": relu,
    "elu1": elu1,
    "exp": exp,
    "softmax": softmax,
    "squared_relu": squared_relu,
    "softplus": jax.nn.softplus,
    "sigmoid": jax.nn.sigmoid,
}


def feature_map(name: str) -> FeatureMap:
    """The feature map of that name.

    Raises:
      ValueError: with the nearest name, or all of them, if there is none.
    """
    if name not in FEATURE_MAPS:
        raise ValueError(f"no feature map is called {name!r}: {suggestion(name, FEATURE_MAPS)}")
    return FEATURE_MAPS[name]
