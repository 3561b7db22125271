"""Block-sparse attention as Triton kernels, called through jax-triton: forward, and a backward pass by hand.

A program owns a block of queries of one head and walks over its list of tiles; in the backward pass another kernel
owns a block of keys of one group, with the lists transposed. Nothing is added atomically. Masks of partial tiles of a
rule on indices are arrays, the same ones as on TPU; segments are compared on the tile.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, partition
from pallas_kernels.block_sparse_attention.arguments import Arguments, Extras, Rules
from pallas_kernels.block_sparse_attention.blocks import Blocks
from pallas_kernels.block_sparse_attention.tiles import (
    Layout,
    Tiles,
    is_static,
    layout_of,
    static_tiles,
    tiles_of,
)
from pallas_kernels.block_sparse_attention.tpu.lists import masks_of
from pallas_kernels.block_sparse_attention.tpu.plan import MOST_MASKS
from pallas_kernels.block_sparse_attention.triton import kernels
from pallas_kernels.gpus import Gpu, find
from pallas_kernels.symbolic_zeros import cotangent
from pallas_kernels.triton_launch import launch as _launch

SIZES = (16, 256)  # least and greatest D and E
DTYPES = ("bfloat16", "float16", "float32")
BLOCKS = (16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class _Config:
    """What is static in a call."""

    rules: Rules
    gpu: Gpu | None
    block_q: int
    block_k: int
    segments: bool
    blocks: tuple[int, int] | None
    axes: tuple[str, ...]  # of the segments and of the arrays of `blocks`, for `partition`

    def axes_of(self, *axes: str) -> tuple[str, ...]:
        """Axes with the letters of heads only where heads may be cut over devices."""
        shared = self.rules.mask.heads == 1
        return tuple(each if shared else each.replace("H", "X").replace("G", "Y") for each in axes)


def supports(args: Arguments) -> str | None:
    """Why the kernels cannot take `args`; None when they can."""
    dtype, (low, high), x = args.q.dtype.name, SIZES, args.extras
    if dtype not in DTYPES:
        return f"it takes {', '.join(DTYPES)}, got {dtype}"
    for name, size in (("D", args.q.shape[3]), ("E", args.v.shape[3])):
        if not low <= size <= high:
            return f"it takes head sizes of {low} to {high}, got {name}={size}"
    if x.bias is not None or args.rules.function is not None or x.scale is not None:
        return "it takes no bias, no score_mod, and no scale that is an array"
    if not args.rules.mask.static:
        return "it takes masks of indices, without arrays"
    if args.rules.mask.heads > 1 and not is_static(args):
        return "rules per head need tiles that are known when tracing: no blocks and no segment_ids"
    block_q, block_k = _sizes(args)
    if block_q not in BLOCKS or block_k not in BLOCKS:
        return f"blocks must be of {', '.join(map(str, BLOCKS))} queries and keys, got {block_q} and {block_k}"
    partial = masks_of(args.rules.mask, _of_indices(layout_of(args, block_q, block_k), args.rules))
    if partial is not None and partial[0].nbytes > MOST_MASKS:
        return f"its partial tiles have {len(partial[0])} different masks, more than {MOST_MASKS >> 20} MiB"
    return None


def run(args: Arguments) -> tuple[jax.Array, jax.Array]:
    """y (B, N, H, E) in the dtype of q, and lse (B, N, H) in float32."""
    b, _, h, _ = args.q.shape
    groups, x = args.k.shape[2], args.extras
    ids = () if x.query_ids is None else (x.query_ids[:, 0, 0, :, 0], x.key_ids[:, 0, 0, 0])
    lists = () if args.blocks is None else (args.blocks.indices, args.blocks.counts)

    def axes(a: jax.Array) -> str:
        heads = {h: "H", groups: "G"}.get(a.shape[1], "y") if a.shape[1] > 1 else "y"
        return ("B" if a.shape[0] == b else "x") + heads + "zw"[: a.ndim - 2]

    config = _Config(
        args.rules,
        find(dispatch.current_device_kind()),
        *_sizes(args),
        segments=bool(ids),
        blocks=None if args.blocks is None else (args.blocks.block_q, args.blocks.block_k),
        axes=("BN", "BM")[: len(ids)] + tuple(map(axes, lists)),
    )
    rest = tuple(a.astype(jnp.int32) for a in (*ids, *lists))
    y, lse = _attention(config, *partition.same_manual_axes((args.q, args.k, args.v, rest)))
    return y, jnp.moveaxis(lse, 1, 2)


def _sizes(args: Arguments) -> tuple[int, int]:
    if args.blocks is not None:
        return args.blocks.block_q, args.blocks.block_k
    small = args.q.dtype.itemsize > 2 or max(args.q.shape[3], args.v.shape[3]) > 128
    return (64, 32) if small else (128, 64)


# ---- the op and its derivative


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config: _Config, q, k, v, rest):
    """y (B, N, H, E) and lse (B, H, N)."""
    axes = config.axes_of("BNHD", "BMGD", "BMGE"), config.axes_of("BNHE", "BHN")
    local = partition.batched_and_partitioned(functools.partial(_forward, config), (*axes[0], *config.axes), axes[1])
    return local(q, k, v, *rest)


def _attention_forward(config: _Config, *arguments):
    arguments = jax.tree.map(lambda x: x.value, arguments)
    y, lse = _attention(config, *arguments)
    return (y, lse), (*arguments, y, lse)


def _attention_backward(config: _Config, residuals, cotangents):
    q, k, v, rest, y, lse = residuals
    dy, dlse = map(cotangent, cotangents)
    dy = jnp.zeros_like(y) if dy is None else dy
    delta = jnp.moveaxis((dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1), 1, 2)
    delta = delta if dlse is None else delta - dlse
    inputs = config.axes_of("BNHD", "BMGD", "BMGE", "BNHE", "BHN", "BHN")
    local = partition.batched_and_partitioned(
        functools.partial(_backward, config), (*inputs, *config.axes), config.axes_of("BNHD", "BMGD", "BMGE")
    )
    return *local(q, k, v, dy, jnp.where(lse == -jnp.inf, 0, lse), delta, *rest), None


_attention.defvjp(_attention_forward, _attention_backward, symbolic_zeros=True)


def _forward(config: _Config, q, k, v, *rest):
    call = _Call(config, q, k, v, rest)
    b, n, h, _ = q.shape
    outputs = ((b, n, h, v.shape[3]), q.dtype), ((b, h, n), jnp.float32)
    return call(kernels.forward, (q, k, v), False, outputs, b * h * call.layout.q_blocks)


def _backward(config: _Config, q, k, v, dy, lse, delta, *rest):
    call = _Call(config, q, k, v, rest)
    (b, _, h, _), g = q.shape, k.shape[2]
    arrays = (q, k, v, dy, lse, delta)
    (dq,) = call(kernels.backward_rows, arrays, False, ((q.shape, q.dtype),), b * h * call.layout.q_blocks)
    outputs = (k.shape, k.dtype), (v.shape, v.dtype)
    return dq, *call(kernels.backward_columns, arrays, True, outputs, b * g * call.layout.k_blocks)


class _Call:
    """What the kernels of a device's part share: lists, masks and constants."""

    def __init__(self, config: _Config, q, k, v, rest) -> None:
        self.config, self.q, self.v = config, q, v
        self.ids, lists = rest[: 2 * config.segments], rest[2 * config.segments :]
        x = Extras()
        if config.segments:
            x = x._replace(query_ids=self.ids[0][:, None, None, :, None], key_ids=self.ids[1][:, None, None, None])
        blocks = None if config.blocks is None else Blocks(*lists, *config.blocks)
        args = Arguments(q, k, v, x, blocks, config.rules)
        self.layout, tiles = tiles_of(args, config.block_q, config.block_k)
        self.masks, kinds = _kinds(config.rules, self.layout, tiles)
        self.by_row = tiles.offsets, tiles.column, kinds
        self.by_column = _transposed(self.layout, tiles, kinds)

    def __call__(self, kernel: Any, arrays: Any, columns: bool, outputs: Any, grid: int) -> list[jax.Array]:
        config, layout, rules = self.config, self.layout, self.config.rules
        half = self.q.dtype.itemsize <= 2
        stand_in = jnp.zeros(1, jnp.int32)
        ids = self.ids or (stand_in, stand_in)
        masks = jnp.zeros(1, jnp.int8) if self.masks is None else jnp.asarray(self.masks)
        lists = [jnp.asarray(_some(x), jnp.int32) for x in (self.by_column if columns else self.by_row)]
        d, e = self.q.shape[3], self.v.shape[3]
        constants = {
            "KEYS": layout.keys,
            "HEADS": layout.groups * layout.repeats,
            "GROUPS": layout.groups,
            "D": d,
            "E": e,
            "BLOCK_D": max(16, 1 << (d - 1).bit_length()),
            "BLOCK_E": max(16, 1 << (e - 1).bit_length()),
            "BLOCK_Q": layout.block_q,
            "BLOCK_K": layout.block_k,
            "LANES_B": layout.lanes_b,
            "LANES_H": layout.lanes_h,
            "SCALE": rules.scale,
            "SOFTCAP": rules.softcap or 0.0,
            "SEGMENTS": config.segments,
            "MASKED": self.masks is not None,
            "DOT": kernels.tl.bfloat16 if half else kernels.tl.float32,
            "PRECISION": "tf32" if half else "ieee",  # the first concerns float32 operands alone
        }
        shapes = [jax.ShapeDtypeStruct(*output) for output in outputs]
        capability = None if config.gpu is None else config.gpu.capability
        inputs = [*arrays, *ids, *lists, masks]
        results = _launch(kernel, inputs, layout.queries, shapes, capability, grid, 4, 2, constants)
        # A call that JAX knows nothing of gives arrays that are typed as equal on all shards of a `jax.shard_map`.
        return partition.same_manual_axes((list(results), inputs))[0]


def _some(x: Any) -> Any:
    """At least one number, so that there is something to point at."""
    return x if x.size else np.zeros(1, np.int32)


def _of_indices(layout: Layout, rules: Rules) -> Layout:
    """The layout of the mask alone, whose lists no batch element has for itself."""
    return layout if rules.mask.heads > 1 else dataclasses.replace(layout, lanes_b=1, lanes_h=1)


def _kinds(rules: Rules, layout: Layout, tiles: Tiles) -> tuple[np.ndarray | None, Any]:
    """The masks of partial tiles, and of each tile which it has: 0 for none, else its number and one."""
    own = _of_indices(layout, rules)
    made = masks_of(rules.mask, own)
    if made is None:
        return None, tiles.column * 0
    masks, number = made
    if isinstance(tiles.row, np.ndarray):
        return masks, np.where(tiles.full, 0, number + 1)
    static = static_tiles(rules.mask, own)
    table = np.zeros((layout.q_blocks, layout.k_blocks), np.int32)
    table[static.row, static.column] = np.where(static.full, 0, number + 1)
    return masks, jnp.asarray(table)[tiles.row % layout.q_blocks, tiles.column]


def _transposed(layout: Layout, tiles: Tiles, kinds: Any) -> tuple[Any, Any, Any]:
    """The lists by key block: offsets (lanes · key blocks + 1,), query blocks, and kinds."""
    lib = np if isinstance(tiles.row, np.ndarray) else jnp
    count, places = tiles.offsets[-1], layout.lanes_b * layout.lanes_h * layout.k_blocks
    inside = lib.arange(tiles.row.size) < count
    place = tiles.row // layout.q_blocks * layout.k_blocks + tiles.column
    place = lib.where(inside, place, places)
    order = lib.lexsort((tiles.row, place))
    offsets = lib.searchsorted(place[order], lib.arange(places + 1))
    return offsets, (tiles.row % layout.q_blocks)[order], kinds[order]
