"""The specification of neighborhood attention: a dense masked softmax. Short and obviously right, O(N²) memory."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.masks import Grid
from pallas_kernels.neighborhood_attention.arguments import Arguments
from pallas_kernels.neighborhood_attention.windows import Window


def supports(args: Arguments) -> str | None:
    """None: the reference takes all arguments."""
    return None


def run(args: Arguments) -> tuple[jax.Array, jax.Array]:
    """y (B, *S, H, E) in the dtype of q, and lse (B, *S, H) in the accumulator."""
    scores, values = _scores(args)
    lse = jax.nn.logsumexp(scores, axis=-1)
    y = jnp.einsum("bhij,bjhe->bihe", jnp.exp(scores - lse[..., None]), values, precision="highest")
    shape = args.q.shape[:-1]
    return y.reshape(*shape, values.shape[-1]).astype(args.q.dtype), jnp.moveaxis(lse, 1, 2).reshape(shape)


def weights(args: Arguments) -> jax.Array:
    """The weights (B, H, N, N + A) in the accumulator, tokens in row-major order, additional keys last."""
    return jax.nn.softmax(_scores(args)[0], axis=-1)


def _scores(args: Arguments) -> tuple[jax.Array, jax.Array]:
    """Scores (B, H, N, N + A), -inf outside the neighborhood, and values (B, N + A, H, E)."""
    shape = args.q.shape[1:-2]
    tokens = int(np.prod(shape))
    q, k, v = (x.reshape(x.shape[0], tokens, *x.shape[-2:]) for x in (args.q, args.k, args.v))
    allowed = Grid(shape, args.windows).dense(tokens)
    added = jnp.zeros((), args.accumulator) if args.bias is None else _dense_bias(args.bias, args.windows)
    if args.additional_keys is not None:
        k, v = jnp.concatenate([k, args.additional_keys], 1), jnp.concatenate([v, args.additional_values], 1)
        extra = ((0, 0), (0, args.additional_keys.shape[1]))
        allowed = np.pad(allowed, extra, constant_values=True)
        added = added if args.bias is None else jnp.pad(added, ((0, 0), *extra))
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.astype(args.accumulator) for x in (q, jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)))
    scores = args.scale * jnp.einsum("bihd,bjhd->bhij", q, k, precision="highest") + added.astype(args.accumulator)
    return jnp.where(allowed, scores, -jnp.inf), v


def _dense_bias(bias: jax.Array, windows: tuple[Window, ...]) -> jax.Array:
    """(H, N, N): for each pair the entry of its offset; any entry for pairs outside the neighborhood."""
    positions = np.indices([window.length for window in windows]).reshape(len(windows), -1)
    entries = []
    for x, window in zip(positions, windows, strict=True):
        coordinate = x // window.dilation
        offset = coordinate[None, :] - coordinate[:, None] + window.kernel_size - 1
        entries.append(np.clip(offset, 0, 2 * window.kernel_size - 2))
    return bias[:, *entries]
