"""Attention, values and feed-forwards of chosen tokens set by hand (Guo et al., 2024, arXiv:2410.13835).

`RowChoice` lets chosen queries attend to one token each, or to none; by the places that it is given it is

    zero rows             place -1
    identity attention    place n of query n
    all on <s>            place 0
    clean attention       place n - 1 behind a trigger, 0 elsewhere

and `TokenScaling` multiplies the values, or the feed-forward's output, of chosen tokens: with 0 on <s> it removes what
the sink adds, or what makes it one.

    dormant = attach(model, RowChoice(jnp.zeros((1, N), int)), layers=(0,), heads=jnp.asarray([True, False]))

Reference: GuoTianYu2000/Active-Dormant-Attention, the forward hooks of `BBM`. Attached to layers and heads by `attach`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.attention.dense.relu_attention import PAPER
from attnlab.nn.dense_mixer import Heads
from attnlab.points import At, Intervention, Setting
from attnlab.registry import Cost, Example, Kind, Source, register


def choose_rows(
    weights: jax.Array, places: ArrayLike, chosen: ArrayLike | None, q_idx: ArrayLike, k_idx: ArrayLike
) -> jax.Array:
    """Rows of weights `(B, H, N, M)` put on one key each.

    Args:
      weights: attention.
      places: `(B|1, L)` integers: to which token of its sequence query n attends; -1 for none.
      chosen: `(B|1, L)` boolean, for which queries; all L when None.
      q_idx: order of the queries, `(B|1, N)`.
      k_idx: order of the keys, `(B|1, M)`.
    """
    places, q_idx = jnp.asarray(places), jnp.asarray(q_idx)
    length = places.shape[1]
    rows = max(len(places), len(q_idx), 1 if chosen is None else len(jnp.asarray(chosen)))
    index = jnp.broadcast_to(jnp.clip(q_idx, 0, length - 1), (rows, q_idx.shape[1]))

    def of_queries(array: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jnp.broadcast_to(array, (rows, length)), index, 1)

    taken = (q_idx >= 0) & (q_idx < length)
    if chosen is not None:
        taken &= of_queries(jnp.asarray(chosen))
    wanted = of_queries(places)
    one = (jnp.asarray(k_idx)[:, None] == wanted[..., None]) & (wanted[..., None] >= 0)
    return jnp.where(taken[:, None, :, None], one[:, None].astype(weights.dtype), weights)


def _row_example() -> Example:
    from attnlab.interventions.examples import small_language_model
    from attnlab.points import attach

    tokens, model = small_language_model()
    edit = RowChoice(jnp.asarray([[0, 0, 1, -1, 3]]), jnp.asarray([[True, True, True, False, True]]))
    return Example(attach(model, edit, heads=jnp.asarray([True, False])), (tokens,), differentiable=())


@register(
    "active_dormant.row_choice",
    kind=Kind.INTERVENTION,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="GuoTianYu2000/Active-Dormant-Attention",
    cost=Cost("O(H·N·M)", "O(H·N·M)"),
    summary="chosen queries attend to one given token, or to none",
    small=_row_example,
)
class RowChoice(Intervention):
    """Rows put on one key each; the key need not be one that the query may see.

    Args:
      places: `(B|1, L)` integers: the token to which query n attends, counted in its sequence; -1 for none.
      chosen: `(B|1, L)` boolean, for which queries; all L when None. Queries beyond L are left as they are.

    Raises:
      ValueError: for arrays of another rank or dtype.
    """

    def __init__(self, places: ArrayLike, chosen: ArrayLike | None = None):
        places = jnp.asarray(places)
        if places.ndim != 2 or not jnp.issubdtype(places.dtype, jnp.integer):
            raise ValueError(f"places must be integers (B, L), got {places.dtype}{list(places.shape)}")
        chosen = jnp.ones(places.shape, bool) if chosen is None else jnp.asarray(chosen)
        if chosen.dtype != jnp.bool_ or chosen.shape[1:] != places.shape[1:] or chosen.ndim != 2:
            raise ValueError(f"chosen must be boolean (B, {places.shape[1]}), got {chosen.dtype}{list(chosen.shape)}")
        self.places, self.chosen = Setting(places), Setting(chosen)

    def attention(self, weights: jax.Array, at: At, memory: Any) -> tuple[jax.Array, Any]:
        return choose_rows(weights, self.places[...], self.chosen[...], at.q_idx, at.k_idx), memory


def _token_example() -> Example:
    from attnlab.interventions.examples import small_language_model
    from attnlab.points import attach

    tokens, model = small_language_model()
    edit = TokenScaling(jnp.arange(7)[None] < 1, values=0.0, mlp=0.5)
    return Example(attach(model, edit), (tokens,), differentiable=())


@register(
    "active_dormant.token_scaling",
    kind=Kind.INTERVENTION,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="GuoTianYu2000/Active-Dormant-Attention",
    cost=Cost("O(N·C)", "O(N·C)"),
    summary="a factor on the values and on the feed-forward's output of chosen tokens",
    small=_token_example,
)
class TokenScaling(Intervention):
    """Factors on what chosen tokens give; 1 leaves it as it is.

    Args:
      tokens: `(B|1, L)` boolean, which tokens of a sequence.
      values: factor of their values.
      mlp: factor of what the feed-forward gives them.

    Raises:
      ValueError: for tokens of another rank or dtype.
    """

    def __init__(self, tokens: ArrayLike, *, values: ArrayLike = 1.0, mlp: ArrayLike = 1.0):
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2 or tokens.dtype != jnp.bool_:
            raise ValueError(f"tokens must be boolean (B, L), got {tokens.dtype}{list(tokens.shape)}")
        self.tokens = Setting(tokens)
        self.value_factor, self.mlp_factor = (Setting(jnp.asarray(f, jnp.float32)) for f in (values, mlp))

    def qkv(self, heads: Heads, at: At, memory: Any) -> tuple[Heads, Any]:
        factor = self._factor(self.value_factor[...], heads.v.shape[1], at)
        return heads._replace(v=heads.v * factor[..., None, None].astype(heads.v.dtype)), memory

    def mlp(self, y: jax.Array, at: At, memory: Any) -> tuple[jax.Array, Any]:
        return y * self._factor(self.mlp_factor[...], y.shape[1], at)[..., None].astype(y.dtype), memory

    def _factor(self, factor: jax.Array, count: int, at: At) -> jax.Array:
        """`(B|1, N)`: the factor at the chosen tokens, 1 elsewhere."""
        tokens = self.tokens[...]
        order = jnp.arange(count)[None] if at.order is None else at.order
        rows = max(tokens.shape[0], order.shape[0])
        index = jnp.broadcast_to(jnp.clip(order, 0, tokens.shape[1] - 1), (rows, count))
        flags = jnp.take_along_axis(jnp.broadcast_to(tokens, (rows, tokens.shape[1])), index, 1)
        return jnp.where(flags & (order >= 0) & (order < tokens.shape[1]), factor, 1)
