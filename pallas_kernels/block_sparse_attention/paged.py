"""Decoding: few queries against a cache of keys and values in pages, of which only those that exist are read."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels import array_masks, partition
from pallas_kernels.array_masks import ArrayMask
from pallas_kernels.block_sparse_attention import checks, xla
from pallas_kernels.block_sparse_attention.arguments import Arguments, Extras, Rules
from pallas_kernels.block_sparse_attention.blocks import Blocks
from pallas_kernels.block_sparse_attention.tiles import tiles_of


def paged_attention(
    q: ArrayLike,
    key_pages: ArrayLike,
    value_pages: ArrayLike,
    page_table: ArrayLike,
    lengths: ArrayLike,
    *,
    causal: bool = True,
    blocks: Blocks | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    splits: int | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention to keys in pages: key j of batch element b is row j % S of page `page_table[b, j // S]`.

    The cost follows the lengths, and the counts of `blocks`; pages are read where they are. It is plain JAX on every
    platform, and differentiable in q and the pages.

    Args:
      q: queries, (B, N, H, D): with `causal`, the last N tokens.
      key_pages: (P, S, G, D), in the dtype of q; pages that several elements share, such as a prompt, are there once.
      value_pages: (P, S, G, E), in the dtype of q.
      page_table: (B, W) integers: the page of each run of S keys; what lies behind the length is not looked at.
      lengths: keys that exist, integers (B,), or (B, H) for a length of each head.
      causal: whether query i sees keys up to length - N + i alone.
      blocks: pages that are visited at most: `Blocks` with `block_q` N and `block_k` S over the W pages.
      scale: factor of q·k, a number; D^-1/2 when None.
      softcap: as in `block_sparse_attention`.
      splits: runs into which the visited keys are cut, which are done side by side and joined by lse; as many as the
        size of the table suggests when None.
      return_lse: also return lse, (B, N, H).

    Returns:
      y (B, N, H, E) in the dtype of q, and lse where it is asked for.

    Raises:
      ValueError: for shapes that have no meaning; the message names the argument.
      TypeError: for dtypes that are not allowed.
    """
    q, key_pages, value_pages, page_table, lengths = (
        jnp.asarray(x) for x in (q, key_pages, value_pages, page_table, lengths)
    )
    checks.tensors(jnp.broadcast_to(q[:1], (key_pages.shape[0], *q.shape[1:])), key_pages, value_pages)
    (b, n, h, d), (pages, size, g, _) = q.shape, key_pages.shape
    if page_table.ndim != 2 or page_table.shape[0] != b or not jnp.issubdtype(page_table.dtype, jnp.integer):
        raise ValueError(f"page_table must be integers ({b}, W), got {page_table.dtype.name} of {page_table.shape}")
    if lengths.shape not in ((b,), (b, h)) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths must be integers ({b},) or ({b}, {h}), got {lengths.dtype.name} of {lengths.shape}")
    if splits is not None and splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    width = page_table.shape[1]
    sizes = checks.Sizes(b, n, width * size, h, g)
    if blocks is not None:
        checks.blocks(blocks, sizes)
        if (blocks.block_q, blocks.block_k) != (n, size):
            raise ValueError(f"blocks must have block sizes ({n}, {size}), got {blocks.block_q} and {blocks.block_k}")
    until = lengths.reshape(b, -1, 1) + (jnp.arange(1 - n, 1) if causal else jnp.zeros(n, int))
    mask, values = array_masks.split(ArrayMask(_before, (until,)), sizes.keys)
    rules = Rules(mask, d**-0.5 if scale is None else checks.number("scale", scale), softcap)
    extras = checks.with_values(Extras(), values, sizes)
    keys, stored_values = (x.reshape(1, pages * size, g, -1) for x in (key_pages, value_pages))
    y, lse = _run(rules, q, keys, stored_values, page_table, extras, blocks, size, splits)
    return (y, lse) if return_lse else y


def _before(i: Any, j: Any, until: Any) -> Any:
    return j < until


def _run(rules: Rules, q, keys, values, page_table, extras: Extras, blocks: Blocks | None, size: int, splits):
    """y and lse, of keys and values (1, pages · size, G, ·)."""
    (b, n, h, _), g, width = q.shape, keys.shape[2], page_table.shape[1]
    shape = jax.ShapeDtypeStruct((b, width * size, g, keys.shape[-1]), q.dtype)
    args = Arguments(q, shape, shape, extras, blocks, rules)
    layout, tiles = tiles_of(args, n, size)
    together = max(c for c in xla.TOGETHER if c <= max(1, min(width, 512 // size)))
    splits = xla.splits_of(layout, tiles.row.size // together) if splits is None else splits
    plan = xla._Plan(layout, rules, together, args.precision, args.accumulator, splits, as_stored=True)
    lane = jnp.asarray(tiles.row) // layout.q_blocks // layout.lanes_h
    steps = xla._steps(plan, tiles, page_table[lane, tiles.column])
    x = xla._Tensors(
        jnp.moveaxis(q.reshape(b, n, g, h // g, -1), 1, 3), keys, values, xla._padded_extras(layout, extras)
    )
    y, lse = xla._sweep(plan, *partition.same_manual_axes((x, steps)))
    y, lse = (jnp.moveaxis(a, 3, 1) for a in (y, lse))
    return y.reshape(b, n, h, -1), lse.reshape(b, n, h)
