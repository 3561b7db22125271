"""Fewer tokens by their scores, and tokens in another order: shapes are static, gradients go through values alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.nn.routing import take_tokens, top_k_mask
from pallas_kernels.dtypes import at_least_float32


class Selection(NamedTuple):
    """The tokens that stay and the others, by their places.

    Attributes:
      kept: `(B, k)` int32.
      rest: `(B, N - k)` int32, ascending.
    """

    kept: jax.Array
    rest: jax.Array

    def keep(self, x: ArrayLike) -> jax.Array:
        """Tokens `(B, N, C)` to those that stay, `(B, k, C)`."""
        return take_tokens(x, self.kept)

    def fuse(self, x: ArrayLike, weights: ArrayLike) -> jax.Array:
        """The other tokens as one, Σ_j w_j x_j with weights `(B, N)` as they are: `(B, 1, C)`, summed in float32."""
        x, weights = jnp.asarray(x), jnp.asarray(weights)
        others, share = take_tokens(x, self.rest), jnp.take_along_axis(weights, self.rest, axis=1)
        wide = at_least_float32(x.dtype)
        return jnp.einsum("bn,bnc->bc", share.astype(wide), others.astype(wide))[:, None].astype(x.dtype)


def select_top(scores: ArrayLike, k: int, *, by_score: bool = False) -> Selection:
    """The k tokens of the highest scores; of equal ones the earlier.

    Args:
      scores: `(B, N)`, finite.
      k: how many stay.
      by_score: whether those that stay are in descending order of their scores; else in the order of their places.

    Raises:
      ValueError: if k is not in 0..N.
    """
    scores = jax.lax.stop_gradient(jnp.asarray(scores))
    chosen = top_k_mask(scores, k)
    # Stable: what is not chosen comes behind all that is, both in order.
    places = jnp.argsort(~chosen, axis=1, stable=True).astype(jnp.int32)
    kept = jax.lax.top_k(scores, k)[1].astype(jnp.int32) if by_score else places[:, :k]
    return Selection(kept, places[:, k:])


class Order(NamedTuple):
    """Tokens in another order.

    Attributes:
      places: `(B, N)` int32, place of each token of the new order in the old one.
      inverse: `(B, N)` int32, place of each token of the old order in the new one.
    """

    places: jax.Array
    inverse: jax.Array

    def sort(self, x: ArrayLike) -> jax.Array:
        """Tokens `(B, N, C)` in the new order."""
        return take_tokens(x, self.places)

    def unsort(self, y: ArrayLike) -> jax.Array:
        """Tokens in the new order back in the old one."""
        return take_tokens(y, self.inverse)


def order_of(places: ArrayLike) -> Order:
    """The order whose tokens stood at `places` `(B, N)`, each of 0..N-1 once."""
    places = jnp.asarray(places).astype(jnp.int32)
    rows = jnp.arange(places.shape[0])[:, None]
    index = jnp.broadcast_to(jnp.arange(places.shape[1], dtype=jnp.int32), places.shape)
    return Order(places, jnp.zeros_like(places).at[rows, places].set(index))


def group_by(labels: ArrayLike) -> Order:
    """The order that puts tokens of equal labels `(B, N)` side by side, by ascending label, else as they stood."""
    return order_of(jnp.argsort(jnp.asarray(labels), axis=1, stable=True))
