"""Sums, maxima and log-sum-exps of all tokens up to each one, restarted where a packed segment begins.

Along axis 1 of `(B, N, ...)`, in float32 (or wider), as scans of depth log N. `segment_ids` `(B, N)`: each run of equal
ids is a sequence of its own. `initial` `(B, ...)` is the result before the first token, for decoding in parts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.nn.masking import segment_positions
from pallas_kernels.dtypes import at_least_float32

NOTHING = -1e30
"""The logarithm of no tokens at all: finite, so that its gradient is; `exp(x - NOTHING)` must not be asked for."""


def prefix_sum(x: ArrayLike, *, segment_ids: ArrayLike | None = None, initial: ArrayLike | None = None) -> jax.Array:
    """Σ_{s ≤ t} x_s, of the shape of `x`."""
    return _scan(jnp.add, x, segment_ids, initial)


def prefix_max(x: ArrayLike, *, segment_ids: ArrayLike | None = None, initial: ArrayLike | None = None) -> jax.Array:
    """max_{s ≤ t} x_s, of the shape of `x`."""
    return _scan(jnp.maximum, x, segment_ids, initial)


def prefix_logsumexp(
    x: ArrayLike,
    *,
    real: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    initial: ArrayLike | None = None,
) -> jax.Array:
    """log Σ_{s ≤ t} exp(x_s), of the shape of `x`; `NOTHING`, or about that, where no token counts so far.

    Args:
      x: `(B, N, ...)`, finite.
      real: `(B, N)` boolean, which tokens count; all when None.
      segment_ids: `(B, N)`.
      initial: `(B, ...)`.
    """
    return _scan(jnp.logaddexp, _real_or_nothing(x, real), segment_ids, initial)


def segment_sum(x: ArrayLike, *, segment_ids: ArrayLike | None = None) -> jax.Array:
    """The sum of each token's whole segment, `(B, N, ...)`; without segments of all tokens, `(B, 1, ...)`."""
    if segment_ids is None:
        return _wide(x).sum(1, keepdims=True)
    return _at_ends(prefix_sum(x, segment_ids=segment_ids), segment_ids)


def segment_max(x: ArrayLike, *, segment_ids: ArrayLike | None = None) -> jax.Array:
    """The maximum of each token's whole segment, `(B, N, ...)`; without segments of all tokens, `(B, 1, ...)`."""
    if segment_ids is None:
        return _wide(x).max(1, keepdims=True)
    return _at_ends(prefix_max(x, segment_ids=segment_ids), segment_ids)


def segment_logsumexp(
    x: ArrayLike, *, real: ArrayLike | None = None, segment_ids: ArrayLike | None = None
) -> jax.Array:
    """The log-sum-exp of each token's whole segment, `(B, N, ...)`; without segments of all tokens, `(B, 1, ...)`."""
    if segment_ids is None:
        return jax.nn.logsumexp(_real_or_nothing(x, real), axis=1, keepdims=True)
    return _at_ends(prefix_logsumexp(x, real=real, segment_ids=segment_ids), segment_ids)


def softmax_recurrence(
    logits: ArrayLike,
    *,
    causal: bool = True,
    real: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    initial: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """A softmax over the tokens up to each one, as a recurrence whose exponents are all at most 0.

    With z_t = log Σ_{s ≤ t} exp(g_s), the sum Σ_{s ≤ t} softmax_{s ≤ t}(g)_s x_s is

        y_t = exp(z_{t-1} - z_t) y_{t-1} + exp(g_t - z_t) x_t

    Args:
      logits: g, `(B, N, ...)`, finite.
      causal: False for a softmax over all tokens, without decay.
      real: `(B, N)` boolean, which tokens count; all when None. Where False the factor means nothing.
      segment_ids: `(B, N)`.
      initial: z `(B, ...)` before the first token; `NOTHING` at the start. Causal only.

    Returns:
      Factors exp(g_t - z_t), log decays z_{t-1} - z_t (0 for a first token), and z `(B, ...)` after the last token; if
      not causal, factors of the whole sum, None and None.
    """
    g = _real_or_nothing(logits, real)
    if not causal:
        return jnp.exp(g - segment_logsumexp(g, segment_ids=segment_ids)), None, None
    initial = jnp.full_like(g[:, 0], NOTHING) if initial is None else jnp.asarray(initial, g.dtype)
    z = prefix_logsumexp(g, segment_ids=segment_ids, initial=initial)
    before = jnp.concatenate([initial[:, None], z[:, :-1]], axis=1)
    first = before < NOTHING / 2
    if segment_ids is not None:
        first |= _along(segment_positions(segment_ids) == 0, g)
    return jnp.exp(g - z), jnp.where(first, 0, before - z), z[:, -1]


def _at_ends(total: jax.Array, segment_ids: ArrayLike) -> jax.Array:
    """For each token the entry at the end of its segment."""
    starts = segment_positions(segment_ids) == 0
    tokens = starts.shape[1]
    ends = jnp.where(jnp.roll(starts, -1, axis=1).at[:, -1].set(True), jnp.arange(tokens), tokens)
    return jnp.take_along_axis(total, _along(jax.lax.cummin(ends, axis=1, reverse=True), total), axis=1)


def _real_or_nothing(x: ArrayLike, real: ArrayLike | None) -> jax.Array:
    """Logits in float32 (or wider), `NOTHING` where `real` `(B, N)` is False."""
    x = _wide(x)
    return x if real is None else jnp.where(_along(jnp.asarray(real), x), x, NOTHING)


def _scan(
    combine: Callable[[jax.Array, jax.Array], jax.Array],
    x: ArrayLike,
    segment_ids: ArrayLike | None,
    initial: ArrayLike | None,
) -> jax.Array:
    x = _wide(x)
    if initial is not None:
        x = x.at[:, 0].set(combine(_wide(initial), x[:, 0]))
    if segment_ids is None:
        return jax.lax.associative_scan(combine, x, axis=1)

    def restarted(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        (a, a_starts), (b, b_starts) = first, second
        return jnp.where(b_starts, b, combine(a, b)), a_starts | b_starts

    starts = _along(segment_positions(segment_ids) == 0, x)
    return jax.lax.associative_scan(restarted, (x, starts), axis=1)[0]


def _wide(x: ArrayLike) -> jax.Array:
    return jnp.asarray(x, at_least_float32(jnp.result_type(x)))


def _along(tokens: jax.Array, x: jax.Array) -> jax.Array:
    """`(B, N)` with as many axes as `x`."""
    return tokens.reshape(*tokens.shape, *(1,) * (x.ndim - 2))
