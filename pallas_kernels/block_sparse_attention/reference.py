"""The specification of block-sparse attention: a dense masked softmax. Short and obviously right, O(N·M) memory."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import scores
from pallas_kernels.block_sparse_attention.arguments import Arguments
from pallas_kernels.block_sparse_attention.blocks import Blocks


def supports(args: Arguments) -> str | None:
    """None: the reference takes all arguments."""
    return None


def run(args: Arguments) -> tuple[jax.Array, jax.Array]:
    """y (B, N, H, E) in the dtype of q, and lse (B, N, H) in the accumulator."""
    s, seen = _scores(args)
    lse = jnp.where(seen.any(-1), jax.nn.logsumexp(s, axis=-1), -jnp.inf)
    v = args.v.astype(args.accumulator)
    y = jnp.einsum("bgrnm,bmge->bngre", _softmax(s, seen), v, precision="highest")
    b, n, h, _ = args.q.shape
    return y.reshape(b, n, h, -1).astype(args.q.dtype), jnp.moveaxis(lse, 3, 1).reshape(b, n, h)


def weights(args: Arguments) -> jax.Array:
    """The weights (B, H, N, M) in the accumulator."""
    s, seen = _scores(args)
    return _softmax(s, seen).reshape(s.shape[0], -1, *s.shape[3:])


def _softmax(s: jax.Array, seen: jax.Array) -> jax.Array:
    return jnp.where(seen.any(-1, keepdims=True), jax.nn.softmax(s, axis=-1), 0)


def _scores(args: Arguments) -> tuple[jax.Array, jax.Array]:
    """Scores and what is allowed, (B, G, R, N, M); a score that is not allowed is -inf, or 0 in a row where none is."""
    (b, n, h, d), (_, m, g, _) = args.q.shape, args.k.shape
    q, k = (x.astype(args.accumulator) for x in (args.q.reshape(b, n, g, h // g, d), args.k))
    products = jnp.einsum("bngrd,bmgd->bgrnm", q, k, precision="highest")
    at = scores.of(b, g, h // g, jnp.arange(n), jnp.arange(m))
    s = scores.modified(args.rules, products, args.extras, at)
    seen = jnp.broadcast_to(scores.allowed_by_heads(args.rules.mask, args.extras, at), s.shape)
    if args.blocks is not None:
        seen = seen & _in_blocks(args.blocks, g, n, m)
    seen = seen & (s != -jnp.inf)  # a bias hides, too
    return jnp.where(seen, s, jnp.where(seen.any(-1, keepdims=True), -jnp.inf, 0)), seen


def _in_blocks(blocks: Blocks, groups: int, n: int, m: int) -> jax.Array:
    """(B|1, G|1, R|1, N, M) booleans."""
    columns = jnp.arange(-(-m // blocks.block_k))
    listed = jnp.arange(blocks.indices.shape[-1]) < blocks.counts[..., None]
    visible = ((blocks.indices[..., None] == columns) & listed[..., None]).any(-2)
    heads = visible.shape[1]
    shape = (1, 1) if heads == 1 else (groups, heads // groups)
    visible = visible.reshape(visible.shape[0], *shape, *visible.shape[2:])
    return visible[..., (jnp.arange(n) // blocks.block_q)[:, None], jnp.arange(m) // blocks.block_k]
