"""Feature maps φ of linear attention that have no parameters: softmax(q·k) is replaced by φ(q)·φ(k) ≥ 0.

Each takes an array with the channels of a head last and returns features in its dtype, non-negative but for `identity`.
`feature_map` finds one by name. (Hedgehog's are learned and stand with that mechanism.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.suggest import suggestion

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
    return jax.nn.softmax(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=-1).astype(x.dtype)


def squared_relu(x: ArrayLike) -> jax.Array:
    """max(x, 0)² (So et al., 2021, arXiv:2109.08668)."""
    return jnp.square(jax.nn.relu(x))


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
