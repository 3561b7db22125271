"""How the TPU kernels cut their work: sizes of tiles, kinds of operands, and what is refused; arithmetic on shapes."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_masks, masks
from pallas_kernels.array_masks import Place
from pallas_kernels.block_lists import lower
from pallas_kernels.block_sparse_attention.arguments import Arguments, Rules
from pallas_kernels.block_sparse_attention.tiles import Layout, is_static, layout_of
from pallas_kernels.block_sparse_attention.tpu.lists import Pattern, lanes_of, masks_of, patterns_of
from pallas_kernels.tpu.chips import LANES, MIB, Chip
from pallas_kernels.tpu.plans import up

SIZES = (128, 256, 512)  # of tiles
STEP_COST = 1 << 16  # of a grid point beside its scores, in elements of scores
MOST_TILES = 1 << 15  # whose four scalars lie in scalar memory, half a MiB
MOST_MASKS = 32 * MIB  # bytes of the masks of partial tiles
LARGEST = 256  # D and E

# What a kernel evaluates on indices: comparisons and integer division.
COMPUTED = (
    masks.Full,
    masks.Causal,
    masks.SlidingWindow,
    masks.Prefix,
    masks.QueryPrefix,
    masks.Strided,
    masks.Columns,
    block_masks.Block,
    block_masks.BlockCausal,
    block_masks.BlockWindow,
    block_masks.Staircase,
    Place,
)


class Extra(NamedTuple):
    """An array beside q, k, v, (B|1, H|G|1, …).

    Attributes:
      name: unique.
      kind: "scalar" (1, 1), "row" (1, N), "column" (1, M), "full" (N, M), or "table" (N, S).
      ids: of a table, the name of the column that says where each key looks.
    """

    name: str
    kind: str
    ids: str | None = None


class PlaceNames(NamedTuple):
    """Names of the extras of a place of the mask: values of queries and keys, or a table of choices."""

    queries: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    table: str | None = None


class Names(NamedTuple):
    """Which extras there are: "bias", those of the score modification, "scale", of segments, and of places."""

    bias: bool
    mods: tuple[str, ...]
    scale: bool
    segments: bool
    places: tuple[PlaceNames, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The work of the kernels of one call, on one device.

    Attributes:
      layout: of the tiles.
      rules: of scores and masks.
      chip: where it runs.
      extras: what is read beside q, k, v.
      names: what they are.
      masks: of partial tiles, (P, block_k, block_q) int8, or None where there are none or kernels evaluate the rule.
      evaluates: whether they do.
      patterns: of the tiles that need a mask, what is computed of them; see `lists.Patterns`.
      differentiated: names of extras whose gradient is asked for.
      full_heads: heads of a lane that have gradients of their own per pair.
    """

    layout: Layout
    rules: Rules
    chip: Chip
    extras: tuple[Extra, ...]
    names: Names
    masks: np.ndarray | None
    evaluates: bool
    patterns: tuple[Pattern, ...]
    differentiated: frozenset[str] = frozenset()
    full_heads: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether a score is q·k times a number."""
        return not (self.names.bias or self.names.scale or self.rules.softcap or self.rules.function)

    def extra(self, name: str) -> Extra:
        """The extra of this name."""
        return next(extra for extra in self.extras if extra.name == name)

    def wanted(self, *kinds: str) -> tuple[Extra, ...]:
        """Extras of these kinds whose gradient is asked for."""
        return tuple(extra for extra in self.extras if extra.kind in kinds and extra.name in self.differentiated)


def refusal(args: Arguments, chip: Chip) -> str | None:
    """Why the kernels cannot take `args` on `chip`; None when they can."""
    if args.q.dtype.name not in ("bfloat16", "float32"):
        return f"it takes bfloat16 and float32, got {args.q.dtype.name}"
    if max(args.q.shape[3], args.v.shape[3]) > LARGEST:
        return f"D and E may be at most {LARGEST}, got {args.q.shape[3]} and {args.v.shape[3]}"
    if args.blocks is not None and (args.blocks.block_q % LANES or args.blocks.block_k % LANES):
        given = f"{args.blocks.block_q} and {args.blocks.block_k}"
        return f"blocks must be of multiples of {LANES} queries and keys, got {given}"
    if not is_static(args):
        if args.rules.mask.heads > 1:
            return "rules per head need tiles that are known when tracing: no blocks, segment_ids or arrays in the mask"
        if (odd := _not_computed(args.rules.mask)) is not None:
            return f"with tiles made at run time, {odd} cannot be evaluated in a kernel"
    chosen = sizes(args, chip)
    if chosen is None:
        return f"the list of tiles is too long for scalar memory: more than {MOST_TILES} of any size"
    partial = masks_of(args.rules.mask, layout_of(args, *chosen)) if is_static(args) else None
    if partial is not None and partial[0].nbytes > MOST_MASKS:
        return f"its partial tiles have {len(partial[0])} different masks, more than {MOST_MASKS // MIB} MiB"
    return None


def sizes(args: Arguments, chip: Chip) -> tuple[int, int] | None:
    """Queries and keys of a tile of the least cost; None where no list fits scalar memory."""
    (b, n, _, _), m = args.q.shape, args.k.shape[1]
    if args.blocks is not None:
        block_q, block_k = args.blocks.block_q, args.blocks.block_k
        fits = int(np.prod(args.blocks.indices.shape)) <= MOST_TILES and block_q * block_k <= 512 * 512
        return (block_q, block_k) if fits else None
    static = is_static(args)
    lanes = 1 if static or args.extras.query_ids is None else b
    return _sizes(args.rules.mask, n, m, 256 if chip.vmem < 32 * MIB else 512, lanes, static)


@functools.lru_cache(maxsize=1024)
def _sizes(mask: masks.Mask, n: int, m: int, largest: int, lanes: int, static: bool) -> tuple[int, int] | None:
    options = [[size for size in SIZES if size <= min(largest, up(length, LANES))] for length in (n, m)]
    best = None
    for block_q, block_k in itertools.product(*options):
        if -(-n // block_q) * -(-m // block_k) > 1 << 22:
            continue
        heads = tuple(mask.head(h) for h in range(mask.heads))
        counts = [lower(head, n, m, block_q, block_k).counts for head in heads]
        tiles = sum(int(c.sum()) for c in counts)
        listed = tiles if static else lanes * len(counts) * counts[0].size * max(1, max(int(c.max()) for c in counts))
        if listed > MOST_TILES:
            continue
        cost = tiles * STEP_COST + patterns_of(heads, n, m, block_q, block_k).computed
        if best is None or cost < best[0]:
            best = cost, (block_q, block_k)
    return None if best is None else best[1]


class Counted(NamedTuple):
    """Pairs of queries and keys of a head, of all its lists that differ.

    Attributes:
      visited: of the tiles that are visited.
      computed: of the sub-tiles of them that are computed, in each of the kernels.
    """

    visited: int
    computed: int


def counted(args: Arguments, chip: Chip) -> Counted:
    """What the kernels do, with tiles that are known when tracing.

    Raises:
      ValueError: if they are made at run time, or the kernels cannot take `args` on `chip`.
    """
    if not is_static(args) or (chosen := sizes(args, chip)) is None:
        raise ValueError("tiles must be known when tracing, and few enough for scalar memory")
    layout = layout_of(args, *chosen)
    found = patterns_of(lanes_of(args.rules.mask, layout), args.q.shape[1], args.k.shape[1], *chosen)
    return Counted(found.number.size * chosen[0] * chosen[1], found.computed)


def _not_computed(mask: masks.Mask) -> str | None:
    """The name of a part of a mask that a kernel cannot evaluate."""
    match mask:
        case masks.And() | masks.Or():
            return _not_computed(mask.first) or _not_computed(mask.second)
        case masks.Not() | masks.Transposed():
            return _not_computed(mask.mask)
        case masks.Concatenated():
            return next(filter(None, map(_not_computed, mask.masks)), None)
    return None if isinstance(mask, COMPUTED) else type(mask).__name__


def padded(x: Any, axis: int, block: int) -> Any:
    """Zeros up to whole blocks."""
    fill = -x.shape[axis] % block
    return jnp.pad(x, [(0, fill if a == axis else 0) for a in range(x.ndim)]) if fill else x
