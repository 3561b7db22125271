"""Routing of tokens to heads, experts and slots: exact choices, a router with its balance, lists of static length.

A router gives a token x a probability for each of E experts and sends it to the k likeliest of them:

    p = softmax(W x),    m = the k largest of p,    gates g = k · p m / Σ p m

so that the gates of a token sum to k. Training may add the loss E Σ_e mean(p_e) mean(m_e) (Shazeer et al., 2017,
arXiv:1701.06538; in this form Fedus et al., 2021, arXiv:2101.03961), over all tokens, which is k where all experts are
used alike. So that shapes stay static, an expert takes a fixed number of tokens: `select_tokens` lists them, and
`take_tokens` and `add_tokens` bring them to the expert and back.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.aux_loss import AuxLoss
from attnlab.nn.linear import Linear, fan_in_normal
from pallas_kernels.dtypes import at_least_float32

# Choices


def top_k_mask(x: ArrayLike, k: int, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """Which entries are the k largest along an axis: exactly k, of equal ones those of lower index.

    Args:
      x: finite numbers of any shape; no gradient flows through the choice.
      k: how many.
      axis: along which they are compared.
      where: boolean, broadcastable to `x`: what may be chosen. Where fewer than k may, all those are.

    Returns:
      Boolean in the shape of `x`.

    Raises:
      ValueError: if k is negative or more than there are.
    """
    x = jax.lax.stop_gradient(jnp.asarray(x))
    if not 0 <= k <= x.shape[axis]:
        raise ValueError(f"k must be in 0..{x.shape[axis]}, the length of axis {axis}, got {k}")
    if where is not None:
        where = jnp.broadcast_to(jnp.asarray(where), x.shape)
        x = jnp.where(where, x, -jnp.inf)
    moved = jnp.moveaxis(x, axis, -1)
    index = jax.lax.top_k(moved, k)[1]
    chosen = jnp.put_along_axis(jnp.zeros(moved.shape, bool), index, True, axis=-1, inplace=False)
    chosen = jnp.moveaxis(chosen, -1, axis)
    return chosen if where is None else chosen & where


def straight_through(hard: ArrayLike, soft: ArrayLike) -> jax.Array:
    """`hard` in value, `soft` in its gradient (Bengio et al., 2013, arXiv:1308.3432); in the dtype of `soft`."""
    soft = jnp.asarray(soft)
    hard = jax.lax.stop_gradient(jnp.asarray(hard)).astype(soft.dtype)
    return hard + (soft - jax.lax.stop_gradient(soft))


# Routers


class Routing(NamedTuple):
    """Where a router sends tokens.

    Attributes:
      probabilities: p `(…, E)` in float32 (or wider).
      chosen: m `(…, E)` boolean.
    """

    probabilities: jax.Array
    chosen: jax.Array

    @property
    def gates(self) -> jax.Array:
        """g `(…, E)`: the probabilities of what was chosen, scaled to sum to their number; else 0."""
        kept = jnp.where(self.chosen, self.probabilities, 0)
        least = jnp.finfo(kept.dtype).eps
        count = self.chosen.sum(-1, keepdims=True, dtype=kept.dtype)
        return kept / jnp.maximum(kept.sum(-1, keepdims=True), least) * count


def route(logits: ArrayLike, k: int) -> Routing:
    """Sends tokens with logits `(…, E)` to their k likeliest experts; softmax in float32 (or wider)."""
    logits = jnp.asarray(logits)
    probabilities = jax.nn.softmax(logits.astype(at_least_float32(logits.dtype)))
    return Routing(probabilities, top_k_mask(probabilities, k))


def balance_loss(routing: Routing, *, real: ArrayLike | None = None) -> jax.Array:
    """E Σ_e mean(p_e) mean(m_e) over all tokens, a float32 scalar; its gradient goes through p alone.

    Args:
      routing: of tokens `(…, E)`.
      real: `(…)` boolean, which tokens count; all when None. The loss is 0 if none does.
    """
    experts = routing.probabilities.shape[-1]
    real = jnp.ones(routing.chosen.shape[:-1], bool) if real is None else jnp.asarray(real)
    count = jnp.maximum(real.sum(dtype=jnp.float32), 1)
    probability, share = (
        jnp.where(real[..., None], part, 0).reshape(-1, experts).sum(0, dtype=jnp.float32) / count for part in routing
    )
    return experts * jnp.dot(probability, share)


class SoftmaxRouter(nnx.Module):
    """A linear router with, in training, its loss for balance.

    Args:
      features: channels C of the tokens.
      num_experts: E.
      k: experts of each token.
      use_bias: whether the logits have a bias.
      balance_factor: of `balance_loss`, which is left in `balance` for the training to add; 0 for none.
      kernel_init: of the map to logits; normal with variance 1 / C unless given.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if k is not in 1..E.
    """

    def __init__(
        self,
        features: int,
        num_experts: int,
        k: int,
        *,
        use_bias: bool = False,
        balance_factor: float = 0.0,
        kernel_init: nnx.Initializer = fan_in_normal,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not 1 <= k <= num_experts:
            raise ValueError(f"k must be in 1..{num_experts}, the number of experts, got {k}")
        self.k, self.balance_factor = k, balance_factor
        options = {"use_bias": use_bias, "kernel_init": kernel_init, "param_dtype": param_dtype, "rngs": rngs}
        self.logits = Linear(features, num_experts, axes=("embed", None), **options)
        self.balance = AuxLoss(jnp.zeros((), jnp.float32)) if balance_factor else nnx.data(None)

    def __call__(self, x: ArrayLike, *, real: ArrayLike | None = None, deterministic: bool = True) -> Routing:
        """Routes tokens `(…, C)`; `real` `(…)` says which count in the balance. Logits are in the dtype of `x`."""
        routing = route(self.logits(jnp.asarray(x)), self.k)
        if self.balance is not None and not deterministic:
            self.balance[...] = self.balance_factor * balance_loss(routing, real=real)
        return routing


# Lists of static length


class TokenList(NamedTuple):
    """Tokens that an expert takes.

    Attributes:
      places: `(…, L)` int32, indices of the tokens, ascending.
      chosen: `(…, L)` boolean; False for tokens that only fill the list.
    """

    places: jax.Array
    chosen: jax.Array


def select_tokens(scores: ArrayLike, capacity: int, *, chosen: ArrayLike | None = None) -> TokenList:
    """The `capacity` tokens of the highest scores in their order, of equal ones the earlier.

    Args:
      scores: `(…, N)`, finite: how much each token wants this expert, one row for each expert and example.
      capacity: L, at most N.
      chosen: boolean, broadcastable to the scores: the tokens that were sent here. They come before all others, which
        fill the list; those above the capacity, of the lowest scores, are left out. All when None.

    Raises:
      ValueError: if the capacity is not in 1..N.
    """
    scores = jax.lax.stop_gradient(jnp.asarray(scores))
    tokens = scores.shape[-1]
    if not 1 <= capacity <= tokens:
        raise ValueError(f"capacity must be in 1..{tokens}, the number of tokens, got {capacity}")
    if chosen is None:
        index = jnp.sort(jax.lax.top_k(scores, capacity)[1], axis=-1)
        return TokenList(index, jnp.ones(index.shape, bool))
    chosen = jnp.broadcast_to(jnp.asarray(chosen), scores.shape)
    # Sorted by two keys, stably: what is not chosen is behind all that is, whatever its score.
    places = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    order = jax.lax.sort((~chosen, -scores, places), dimension=-1, num_keys=2)[2]
    index = jnp.sort(order[..., :capacity], axis=-1)
    return TokenList(index, jnp.take_along_axis(chosen, index, axis=-1))


def take_tokens(x: ArrayLike, index: ArrayLike) -> jax.Array:
    """The tokens of these places: `(*A, N, C)` at `(*A, L)` to `(*A, L, C)`; the axes A broadcast.

    Tokens that all experts share are `x[:, None]` `(B, 1, N, C)` at `(B, E, L)`.
    """
    return jnp.take_along_axis(jnp.asarray(x), jnp.asarray(index)[..., None], axis=-2)


def add_tokens(y: ArrayLike, index: ArrayLike, num_tokens: int, *, where: ArrayLike | None = None) -> jax.Array:
    """Brings results back: the sum, at each token, of all that the experts of its example made of it.

    Args:
      y: `(B, *E, L, C)`.
      index: `(B, *E, L)`, the token of each.
      num_tokens: N.
      where: `(B, *E, L)` boolean, what is added; all when None.

    Returns:
      `(B, N, C)` in the dtype of `y`, zeros where no expert took the token; sums are in float32 (or wider).
    """
    y, index = jnp.asarray(y), jnp.asarray(index)
    wide = y.astype(at_least_float32(y.dtype))
    wide = wide if where is None else jnp.where(jnp.asarray(where)[..., None], wide, 0)
    batch, channels = y.shape[0], y.shape[-1]
    total = jnp.zeros((batch, num_tokens, channels), wide.dtype)
    rows = jnp.arange(batch)[:, None]
    return total.at[rows, index.reshape(batch, -1)].add(wide.reshape(batch, -1, channels)).astype(y.dtype)
