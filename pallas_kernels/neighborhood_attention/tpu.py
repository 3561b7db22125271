"""Neighborhood attention on TPU: block-sparse attention over tokens that are brought into the order of tiles.

In row-major order a block of 128 tokens is two rows of an image, and sees a dozen others whole. In the order of tiles
it is a box, 8 by 16, whose neighborhoods are a box too, a few blocks (Faster Neighborhood Attention, arXiv:2403.04690,
and token permutation, arXiv:2504.16922). So tokens are permuted once, and the kernels of `block_sparse_attention` visit
the blocks that a `TiledGrid` needs.

The relative bias is a row table: along an axis the keys of a window have different remainders of their coordinate by
the kernel size, so that each query has Πk numbers, and each key says by its remainder which of them is its own.
Additional keys are attended to apart, and joined by lse.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention import Indexed, ScoreMod, block_sparse_attention, merge_attention
from pallas_kernels.block_sparse_attention import api as block_sparse
from pallas_kernels.block_sparse_attention.tpu import op as block_sparse_tpu
from pallas_kernels.grid_masks import TiledGrid
from pallas_kernels.neighborhood_attention.arguments import Arguments
from pallas_kernels.neighborhood_attention.windows import Window

TILE = 128  # tokens
MOST_ENTRIES = 1024  # of a row of the table of the bias


def supports(args: Arguments) -> str | None:
    """Why the kernels cannot take `args`; None when they can."""
    if args.key_mask is not None:
        return "key_mask makes the list of tiles at run time, and windows cannot be evaluated in a kernel"
    entries = math.prod(window.kernel_size for window in args.windows)
    if args.bias is not None and entries > MOST_ENTRIES:
        return f"bias needs a table of {entries} numbers per query, and at most {MOST_ENTRIES} are taken"

    def normal(args: Arguments) -> Any:
        q, k, v, options = _operands(args)
        return block_sparse.normal_form(q, k, v, **options)

    return block_sparse_tpu.supports(jax.eval_shape(normal, args))


def run(args: Arguments) -> tuple[jax.Array, jax.Array]:
    """y (B, *S, H, E) in the dtype of q, and lse (B, *S, H) in float32."""
    q, k, v, options = _operands(args)
    attend = functools.partial(block_sparse_attention, return_lse=True, implementation="tpu")
    y, lse = attend(q, k, v, **options)
    if args.additional_keys is not None:
        more = attend(q, args.additional_keys, args.additional_values, scale=args.scale)
        y, lse = merge_attention([(y, lse), more])
    tile = options["mask"].tile
    return _row_major(args.windows, tile, y), _row_major(args.windows, tile, lse[..., None])[..., 0]


def tile_of(windows: tuple[Window, ...]) -> tuple[int, ...]:
    """Lengths of a tile of 128 tokens: those with which a tile sees the fewest, and then fill the grid best."""
    powers = [2**n for n in range(TILE.bit_length())]
    tiles = [tile for tile in itertools.product(powers, repeat=len(windows)) if math.prod(tile) == TILE]

    def cost(tile: tuple[int, ...]) -> tuple[int, int]:
        visited = count = 1
        for window, size in zip(windows, tile, strict=True):
            along = -(-window.length // size)
            reach = window.kernel_size // 2 * window.dilation
            count *= along
            visited *= along * min(along, 1 + 2 * -(-reach // size))
        return visited, count

    return min(tiles, key=cost)


def _operands(args: Arguments) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, Any]]:
    """q, k, v in the order of tiles, and the other arguments of `block_sparse_attention`."""
    tile = tile_of(args.windows)
    mask = TiledGrid(tuple(window.length for window in args.windows), args.windows, tile)
    options: dict[str, Any] = {"mask": mask, "scale": args.scale}
    if args.bias is not None:
        table, ids = _row_table(args.bias, args.windows)
        table = _tiled(tile, table[None])  # (1, tokens, H, entries)
        ids = _tiled(tile, ids[None, ..., None, None])[:, :, 0, 0]
        options["score_mod"] = ScoreMod(_plus, (Indexed(jnp.moveaxis(table[0], 1, 0), "h i id[j]", ids),))
    q, k, v = (_tiled(tile, x) for x in (args.q, args.k, args.v))
    return q, k, v, options


def _plus(score: jax.Array, b: Any, h: Any, i: Any, j: Any, value: jax.Array) -> jax.Array:
    return score + value


def _row_table(bias: jax.Array, windows: tuple[Window, ...]) -> tuple[jax.Array, jax.Array]:
    """The bias of each query by the remainders of keys, (*S, H, Πk), and the remainders of each token as one, (*S)."""
    entries, remainders = [], np.zeros((), np.int32)
    for window in windows:
        x, k = np.arange(window.length), window.kernel_size
        coordinate = x // window.dilation
        group = (window.length - x % window.dilation + window.dilation - 1) // window.dilation
        first, _ = window.bounds(coordinate, group)
        key = first[:, None] + (np.arange(k) - first[:, None]) % k
        entries.append(key - coordinate[:, None] + k - 1)
        remainders = remainders[..., None] * k + coordinate % k
    n = len(windows)
    for axis, chosen in enumerate(entries):
        # An axis of offsets becomes one of queries and one of remainders, in its place and at the end.
        bias = jnp.moveaxis(jnp.take(bias, chosen, axis=1 + axis), 2 + axis, -1)
    table = jnp.moveaxis(bias, 0, n)
    return table.reshape(*table.shape[: n + 1], -1), jnp.asarray(remainders, jnp.int32)


def _tiled(tile: tuple[int, ...], x: jax.Array) -> jax.Array:
    """(B, *S, H, D) to (B, N', H, D)."""
    n = len(tile)
    x = jnp.pad(x, [(0, 0), *((0, -x.shape[1 + a] % tile[a]) for a in range(n)), (0, 0), (0, 0)])
    split = [size for a in range(n) for size in (x.shape[1 + a] // tile[a], tile[a])]
    x = x.reshape(x.shape[0], *split, *x.shape[-2:])
    x = x.transpose(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1, 2 * n + 2)
    return x.reshape(x.shape[0], -1, *x.shape[-2:])


def _row_major(windows: tuple[Window, ...], tile: tuple[int, ...], x: jax.Array) -> jax.Array:
    """(B, N', H, D) to (B, *S, H, D): the inverse of `_tiled`."""
    n, tail = len(tile), x.shape[-2:]
    counts = [-(-window.length // size) for window, size in zip(windows, tile, strict=True)]
    x = x.reshape(x.shape[0], *counts, *tile, *tail)
    x = x.transpose(0, *(axis for a in range(n) for axis in (1 + a, 1 + n + a)), 2 * n + 1, 2 * n + 2)
    x = x.reshape(x.shape[0], *(count * size for count, size in zip(counts, tile, strict=True)), *tail)
    return x[:, *(slice(window.length) for window in windows)]
