"""Calls of block-sparse attention that tests, benchmarks and documentation share."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.array_masks import ArrayMask, Chosen
from pallas_kernels.block_masks import Block, Staircase, block_array
from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from pallas_kernels.block_sparse_attention.arguments import Indexed, ScoreMod
from pallas_kernels.block_sparse_attention.blocks import Blocks
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.masks import Causal, Columns, Concatenated, Full, Mask, PerHead, Prefix, QueryPrefix, SlidingWindow
from pallas_kernels.trials import Trial

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One call of `block_sparse_attention`.

    Attributes:
      name: unique.
      mask: of indices.
      batch: B.
      queries: N.
      keys: M; N when None.
      heads: H.
      kv_heads: G; H when None.
      key_size: D.
      value_size: E; D when None.
      extra: shapes of further floating arrays, by name; "bias" and "sinks" are arguments of the op.
      options: (arrays, generator) -> further keyword arguments, made from arrays and drawn integers.
      fixed: further keyword arguments.
    """

    name: str
    mask: Mask | None = None
    batch: int = 2
    queries: int = 150
    keys: int | None = None
    heads: int = 2
    kv_heads: int | None = None
    key_size: int = 16
    value_size: int | None = None
    extra: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    options: Callable[[Arrays, np.random.Generator], Arrays] | None = None
    fixed: Arrays = dataclasses.field(default_factory=dict)

    def arguments(self, dtype: Any = jnp.float32) -> tuple[Arrays, Arrays]:
        """Floating arrays, q, k, v in `dtype`, the others in float32 or wider; and nothing else: see `call`."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        b, n, h, d = self.batch, self.queries, self.heads, self.key_size
        m, g, e = self.keys or n, self.kv_heads or h, self.value_size or d
        shapes = {"q": (b, n, h, d), "k": (b, m, g, d), "v": (b, m, g, e), **self.extra}
        wide = at_least_float32(dtype)
        made = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        return {name: jnp.asarray(x, dtype if name in "qkv" else wide) for name, x in made.items()}, {}

    def call(self, arrays: Arrays, **how: Any) -> Any:
        """y and lse of the op on what `arguments` gave."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()) + 1)
        named = {name: arrays[name] for name in ("q", "k", "v", "bias", "sinks") if name in arrays}
        options = {"mask": self.mask} | (self.options(arrays, rng) if self.options else {}) | self.fixed
        return block_sparse_attention(**named, **options, return_lse=True, **how)


def _segments(arrays: Arrays, rng: np.random.Generator) -> Arrays:
    b, n, m = arrays["q"].shape[0], arrays["q"].shape[1], arrays["k"].shape[1]
    return {"segment_ids": tuple(np.sort(rng.integers(0, 4, (b, size)), 1) for size in (n, m))}


def _blocks(block_q: int, block_k: int, *, per_head: bool = True, per_batch: bool = True):
    """A routing at random: of some rows nothing, of others everything."""

    def options(arrays: Arrays, rng: np.random.Generator) -> Arrays:
        (b, n, h, _), m = arrays["q"].shape, arrays["k"].shape[1]
        shape = (b if per_batch else 1, h if per_head else 1, -(-n // block_q), -(-m // block_k))
        visible = rng.random(shape) < 0.3
        visible[:, :, 0] = False
        visible[0, 0, -1] = True
        return {"blocks": Blocks.from_booleans(jnp.asarray(visible), block_q, block_k)}

    return options


def _reach(i: Any, j: Any, reach: Any, kind: Any, key_kind: Any) -> Any:
    return (i - j <= reach) & (j - i <= reach) | (kind == key_kind)


def _array_mask(arrays: Arrays, rng: np.random.Generator) -> Arrays:
    (b, n, h, _), m = arrays["q"].shape, arrays["k"].shape[1]
    queries = rng.integers(0, 30, (b, h, n)), np.sort(rng.integers(0, 5, (1, 1, n)))
    return {"mask": ArrayMask(_reach, queries, (np.sort(rng.integers(0, 5, (b, 1, m))),)) & ~Prefix(3)}


def _chosen(arrays: Arrays, rng: np.random.Generator) -> Arrays:
    (b, n, h, _), m = arrays["q"].shape, arrays["k"].shape[1]
    table = rng.random((b, h, n, -(-m // 20))) < 0.2
    return {"mask": Causal() & (Block(20) | Chosen(table, 20))}


def _chosen_by_ids(arrays: Arrays, rng: np.random.Generator) -> Arrays:
    (b, n, _, _), (_, m, g, _) = arrays["q"].shape, arrays["k"].shape
    return {"mask": Chosen(rng.random((1, g, n, 5)) < 0.4, np.sort(rng.integers(-1, 6, (b, m)), 1))}


def _before(i: Any, j: Any, length: Any) -> Any:
    return j < length


def _lengths(arrays: Arrays, rng: np.random.Generator) -> Arrays:
    (b, n, h, _), m = arrays["q"].shape, arrays["k"].shape[1]
    return {"mask": ArrayMask(_before, (np.broadcast_to(rng.integers(0, m + 1, (b, h, 1)), (b, h, n)),))}


def _bend(score: Any, b: Any, h: Any, i: Any, j: Any, slope: Any, row: Any, column: Any, table: Any, by_id: Any) -> Any:
    return jnp.tanh(score + slope * abs(i - j) / 100 + row * column) + table * by_id + 0.1 * jnp.cos(i + 2 * j + h + b)


def _routed_segments(arrays: Arrays, rng: np.random.Generator) -> Arrays:
    return _blocks(32, 16)(arrays, rng) | _segments(arrays, rng)


def _routed_score_mod(arrays: Arrays, rng: np.random.Generator) -> Arrays:
    return _score_mod(arrays, rng) | _blocks(32, 24)(arrays, rng)


def _score_mod(arrays: Arrays, rng: np.random.Generator) -> Arrays:
    b, m = arrays["k"].shape[:2]
    ids = rng.integers(0, 7, (b, m))
    indexed = (
        Indexed(arrays["slope"], "h"),
        Indexed(arrays["row"], "b i"),
        Indexed(arrays["column"], "g j"),
        Indexed(arrays["table"], "b h i j//16"),
        Indexed(arrays["by_id"], "h id[j]", ids),
    )
    return {"score_mod": ScoreMod(_bend, indexed)}


MIXED_HEADS = PerHead((Causal(), SlidingWindow(20, 0), Causal(), ~Full()))

MODS = {"slope": (4,), "row": (2, 150), "column": (2, 150), "table": (2, 4, 150, 10), "by_id": (4, 7)}

# Small enough to check against float64 in a second; together they meet every option.
SMALL = (
    Case("one_pair", batch=1, queries=1, key_size=1),
    Case("full", queries=40, keys=70, heads=4, kv_heads=2, value_size=24),
    Case("window", SlidingWindow(25, 3) | Prefix(4) | QueryPrefix(3), queries=300, heads=4, kv_heads=1),
    Case("staircase", Causal() & Staircase(16, 40), queries=200, fixed={"softcap": 2.0, "scale": 0.7}),
    Case("empty_rows", Causal(-40) & ~Columns(7), queries=130, extra={"sinks": (2,)}),
    Case("more_keys", Concatenated((Causal(-1), Full()), (150, 37)), keys=190, heads=3),
    Case("boolean_blocks", block_array(np.arange(20).reshape(4, 5) % 3 == 0, 30, 20), queries=110, keys=95),
    Case("per_head", MIXED_HEADS, heads=4, kv_heads=2, extra={"bias": (1, 4, 150, 150)}),
    Case("per_group", PerHead((Causal(),) * 2 + (Block(30),) * 2), heads=4, kv_heads=2, extra={"bias": (2, 2, 1, 150)}),
    Case("segments", Causal(), queries=200, heads=4, kv_heads=2, options=_segments, extra={"bias": (1, 1, 200, 1)}),
    Case("routed", queries=150, keys=130, heads=4, kv_heads=2, options=_blocks(32, 24)),
    Case("routed_shared", Causal(), options=_blocks(17, 11, per_head=False, per_batch=False)),
    Case("routed_segments", ~Causal(20), heads=4, kv_heads=2, options=_routed_segments),
    Case("routed_128", None, 2, 300, 290, 4, 2, options=_blocks(128, 128), extra={"bias": (1, 2, 300, 290)}),
    Case("array_mask", heads=4, kv_heads=2, options=_array_mask),
    Case("chosen", heads=2, options=_chosen),
    Case("chosen_by_ids", heads=4, kv_heads=2, options=_chosen_by_ids),
    Case("decode", queries=1, keys=700, heads=4, kv_heads=2, options=_lengths),
    Case("score_mod", Causal(), heads=4, kv_heads=2, options=_score_mod, extra=MODS),
    Case("score_mod_routed", heads=4, kv_heads=2, options=_routed_score_mod, extra=MODS),
    Case("long_window", SlidingWindow(199, 0), batch=1, queries=1500, heads=2, key_size=32),
)

# What benchmarks time: 95 % of the pairs of blocks masked in all of them but the first and the last.
SPEED = (
    Case("causal_4096", Causal(), 1, 4096, heads=8, key_size=64),
    Case("window_8192", SlidingWindow(409, 0), 1, 8192, heads=8, key_size=64),
    Case("band_8192", SlidingWindow(200, 200), 1, 8192, heads=8, key_size=64),
    Case("global_8192", SlidingWindow(150, 150) | Prefix(64) | QueryPrefix(64), 1, 8192, heads=8, key_size=64),
    Case("windows_of_49", None, 512, 49, heads=4, key_size=32),
)

# What a kernel must be right in to qualify on a device.
# Not "segments": its bias is the same for all keys, so that its gradient is zero, and any rounding is far from that.
TRIED = ("full", "window", "staircase", "per_head", "routed_segments", "routed_128", "chosen")


def trials() -> tuple[Trial, ...]:
    """What kernels of `block_sparse_attention` are tried with."""
    small = [_trial(case, dtype) for case in SMALL if case.name in TRIED for dtype in ("bfloat16", "float32")]
    return (*small, *(_trial(case, "bfloat16", timed=True) for case in SPEED[:3]))


def _trial(case: Case, dtype: str, timed: bool = False) -> Trial:
    def call(arrays: Arrays, implementation: str) -> Any:
        return case.call(arrays, implementation=implementation)[0]

    return Trial(case.name, dtype, jax.tree.map(np.asarray, case.arguments(jnp.dtype(dtype))[0]), call, timed)
