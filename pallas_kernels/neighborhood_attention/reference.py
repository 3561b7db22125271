"""The specification of neighborhood attention: a dense masked softmax. Short and obviously right, O(N²) memory."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grid_masks import Grid
from pallas_kernels.neighborhood_attention.arguments import Arguments
from pallas_kernels.neighborhood_attention.windows import Window


def supports(args: Arguments) -> str | None:
    """None: the reference takes all arguments."""
    return None


def run(args: Arguments) -> tuple[jax.Array, jax.Array]:
    """y (B, *S, H, E) in the dtype of q, and lse (B, *S, H) in the accumulator."""
    scores, allowed, values = _scores(args)
    lse = jnp.where(allowed.any(-1), jax.nn.logsumexp(scores, axis=-1), -jnp.inf)
    y = jnp.einsum("bhij,bjhe->bihe", _softmax(scores, allowed), values, precision="highest")
    shape = args.q.shape[:-1]
    return y.reshape(*shape, values.shape[-1]).astype(args.q.dtype), jnp.moveaxis(lse, 1, 2).reshape(shape)


def weights(args: Arguments) -> jax.Array:
    """The weights (B, H, N, N + A) in the accumulator, tokens in row-major order, additional keys last."""
    scores, allowed, _ = _scores(args)
    return _softmax(scores, allowed)


def _softmax(scores: jax.Array, allowed: jax.Array) -> jax.Array:
    return jnp.where(allowed.any(-1, keepdims=True), jax.nn.softmax(scores, axis=-1), 0)


def _scores(args: Arguments) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores (B, H, N, N + A), what is allowed (B or 1, 1, N, N + A), and values (B, N + A, H, E).

    A score that is not allowed is -inf, or 0 in a row where none is.
    """
    shape = args.q.shape[1:-2]
    tokens = int(np.prod(shape))
    q, k, v = (x.reshape(x.shape[0], tokens, *x.shape[-2:]) for x in (args.q, args.k, args.v))
    allowed = jnp.asarray(Grid(shape, args.windows).dense(tokens))[None, None]
    if args.key_mask is not None:
        allowed = allowed & args.key_mask.reshape(-1, 1, 1, tokens)
    added = jnp.zeros((), args.accumulator) if args.bias is None else _dense_bias(args.bias, args.windows)
    if args.additional_keys is not None:
        k, v = jnp.concatenate([k, args.additional_keys], 1), jnp.concatenate([v, args.additional_values], 1)
        extra = ((0, 0), (0, args.additional_keys.shape[1]))
        allowed = jnp.pad(allowed, ((0, 0), (0, 0), *extra), constant_values=True)
        added = added if args.bias is None else jnp.pad(added, ((0, 0), *extra))
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.astype(args.accumulator) for x in (q, jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)))
    scores = args.scale * jnp.einsum("bihd,bjhd->bhij", q, k, precision="highest") + added.astype(args.accumulator)
    allowed = allowed & (scores != -jnp.inf)
    nothing = jnp.where(allowed.any(-1, keepdims=True), -jnp.inf, 0)
    return jnp.where(allowed, scores, nothing), allowed, v


def _dense_bias(bias: jax.Array, windows: tuple[Window, ...]) -> jax.Array:
    """(H, N, N): for each pair the entry of its offset; any entry for pairs outside the neighborhood."""
    positions = np.indices([window.length for window in windows]).reshape(len(windows), -1)
    entries = []
    for x, window in zip(positions, windows, strict=True):
        coordinate = x // window.dilation
        offset = coordinate[None, :] - coordinate[:, None] + window.kernel_size - 1
        entries.append(np.clip(offset, 0, 2 * window.kernel_size - 2))
    return bias[:, *entries]
