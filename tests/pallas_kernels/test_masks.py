"""Structural masks: their rule, their algebra, and their block lists against the dense mask."""

import functools
import operator
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import block_lists, masks
from pallas_kernels.block_lists import lower
from pallas_kernels.block_masks import Block, BlockCausal, BlockWindow, Staircase, block_array
from pallas_kernels.grid_masks import Grid, TiledGrid
from pallas_kernels.masks import (
    Causal,
    Columns,
    Concatenated,
    Full,
    Mask,
    PerHead,
    Prefix,
    QueryPrefix,
    SlidingWindow,
    Strided,
)

RULES = [
    (Full(), lambda q, k: True),
    (~Full(), lambda q, k: False),
    (Causal(), lambda q, k: k <= q),
    (Causal(3), lambda q, k: k <= q + 3),
    (Causal(-2), lambda q, k: k <= q - 2),
    (SlidingWindow(2, 1), lambda q, k: q - 2 <= k <= q + 1),
    (SlidingWindow(3, None), lambda q, k: k >= q - 3),
    (SlidingWindow(None, 2), lambda q, k: k <= q + 2),
    (SlidingWindow(-1, 4), lambda q, k: q + 1 <= k <= q + 4),
    (Prefix(4), lambda q, k: k < 4),
    (QueryPrefix(4), lambda q, k: q < 4),
    (Strided(3), lambda q, k: (q - k) % 3 == 0),
    (Strided(4, 1), lambda q, k: (q - k) % 4 == 1),
    (Columns(3, 2), lambda q, k: k % 3 == 2),
    (Block(4), lambda q, k: q // 4 == k // 4),
    (BlockCausal(4), lambda q, k: k // 4 <= q // 4),
    (BlockWindow(3, 2, 1), lambda q, k: q // 3 - 2 <= k // 3 <= q // 3 + 1),
    (Staircase(3, 2), lambda q, k: k >= 3 * ((q - 2) // 3)),
    (Concatenated((Causal(-1), ~Prefix(1)), (4, 5)), lambda q, k: k < q if k < 4 else 4 < k < 9),
    (block_array(np.eye(3, dtype=bool), 4, 3), lambda q, k: q // 4 == k // 3),
    (Causal() & SlidingWindow(2, 2), lambda q, k: q - 2 <= k <= q),
    (Causal() | Prefix(5), lambda q, k: k <= q or k < 5),
    (~Block(3), lambda q, k: q // 3 != k // 3),
    (
        Grid((3, 4), (Causal(), SlidingWindow(1, 1))),
        lambda q, k: k // 4 % 3 <= q // 4 % 3 and abs(k % 4 - q % 4) <= 1,
    ),
]


@pytest.mark.parametrize(("mask", "rule"), RULES, ids=[str(mask) for mask, _ in RULES])
def test_rule(mask, rule):
    expected = np.array([[rule(q, k) for k in range(11)] for q in range(12)])
    np.testing.assert_array_equal(mask.dense(12, 11), expected)
    traced = jax.jit(mask)(jnp.arange(12)[:, None], jnp.arange(11))
    assert traced.dtype == bool
    np.testing.assert_array_equal(traced, expected)


def check_lists(mask: Mask, n: int, m: int, block_q: int, block_k: int) -> None:
    dense, lists = mask.dense(n, m), lower(mask, n, m, block_q, block_k)
    transposed = lists.transpose()
    counts = 0
    assert (lists.num_q_blocks, lists.num_k_blocks) == (-(-n // block_q), -(-m // block_k))
    for i in range(lists.num_q_blocks):
        kinds = {"empty": [], "partial": [], "full": []}
        for j in range(lists.num_k_blocks):
            block = dense[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
            kind = "full" if block.all() else "partial" if block.any() else "empty"
            kinds[kind].append(j)
            assert (i in transposed.full(j), i in transposed.partial(j)) == (kind == "full", kind == "partial")
        for kind, blocks in kinds.items():
            assert getattr(lists, kind)(i).tolist() == blocks, kind
        counts += len(kinds["partial"]) + len(kinds["full"])
    assert lists.fraction == counts / (lists.num_q_blocks * lists.num_k_blocks)


PRIMITIVES = st.one_of(
    st.just(Full()),
    st.builds(Causal, st.integers(-20, 20)),
    st.builds(lambda left, more: SlidingWindow(left, more - left), st.integers(-5, 20), st.integers(0, 20)),
    st.builds(SlidingWindow, st.none(), st.integers(-5, 20)),
    st.builds(Prefix, st.integers(0, 40)),
    st.builds(QueryPrefix, st.integers(0, 40)),
    st.integers(1, 9).flatmap(lambda s: st.builds(Strided, st.just(s), st.integers(0, s - 1))),
    st.integers(1, 9).flatmap(lambda s: st.builds(Columns, st.just(s), st.integers(0, s - 1))),
    st.builds(Block, st.integers(1, 17)),
    st.builds(BlockCausal, st.integers(1, 17)),
    st.builds(BlockWindow, st.integers(1, 9), st.integers(0, 2), st.integers(0, 2)),
    st.builds(Staircase, st.integers(1, 9), st.integers(-3, 20)),
)
BLOCKS = st.integers(0, 2**12 - 1).map(lambda bits: np.array([bits >> n & 1 for n in range(12)], bool).reshape(3, 4))
ARRAYS = st.builds(block_array, BLOCKS, st.integers(1, 20), st.integers(1, 20))
SOURCES = st.lists(st.tuples(PRIMITIVES, st.integers(1, 20)), min_size=1, max_size=3)
MASKS = st.recursive(
    st.one_of(PRIMITIVES, ARRAYS, SOURCES.map(lambda pairs: Concatenated(*zip(*pairs, strict=True)))),
    lambda inner: st.one_of(
        st.builds(operator.and_, inner, inner), st.builds(operator.or_, inner, inner), st.builds(operator.invert, inner)
    ),
    max_leaves=5,
)
LENGTH, BLOCK = st.integers(1, 50), st.integers(1, 17)


@settings(max_examples=150, deadline=None)
@given(MASKS, LENGTH, LENGTH, BLOCK, BLOCK)
def test_blocks_equal_dense(mask, n, m, block_q, block_k):
    check_lists(mask, n, m, block_q, block_k)


@settings(max_examples=50, deadline=None)
@given(MASKS, st.integers(1, 3), st.integers(1, 3))
def test_blocks_of_several_levels_equal_dense(mask, block_q, block_k):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_lists, "_TOP", 2)
        patch.setattr(block_lists, "_FACTOR", 2)
        lower.cache_clear()
        check_lists(mask, 41, 37, block_q, block_k)
        lower.cache_clear()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), PRIMITIVES), min_size=1, max_size=3), BLOCK, BLOCK)
def test_blocks_of_grids_equal_dense(axes, block_q, block_k):
    shape, per_axis = zip(*axes, strict=True)
    size = int(np.prod(shape))
    check_lists(Grid(shape, per_axis), size, size, block_q, block_k)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), PRIMITIVES, st.integers(1, 4)), min_size=1, max_size=3), BLOCK, BLOCK)
def test_blocks_of_tiled_grids_equal_dense(axes, block_q, block_k):
    shape, per_axis, tile = zip(*axes, strict=True)
    mask = TiledGrid(shape, per_axis, tile)
    size = int(np.prod(mask.tiles) * np.prod(tile))
    check_lists(mask, size, size, block_q, block_k)
    coordinates = np.indices([a * b for a, b in zip(mask.tiles, tile, strict=True)])
    split = [n for pair in zip(mask.tiles, tile, strict=True) for n in pair]
    order = [*range(0, len(split), 2), *range(1, len(split), 2)]
    flat = [x.reshape(split).transpose(order).reshape(-1) for x in coordinates]
    want = np.ones((size, size), bool)
    for x, length, own in zip(flat, shape, per_axis, strict=True):
        want &= own(x[:, None], x[None]) & (x < length)[:, None] & (x < length)
    np.testing.assert_array_equal(mask.dense(size), want)


@settings(max_examples=100, deadline=None)
@given(PRIMITIVES, LENGTH, LENGTH, BLOCK, BLOCK)
def test_primitives_are_judged_without_looking(mask, n, m, block_q, block_k):
    def refuse(*indices):
        raise AssertionError("elements were evaluated")

    blind = type("Blind", (type(mask),), {"__call__": refuse})(**vars(mask))
    exact, judged = (lower(each, n, m, block_q, block_k) for each in (mask, blind))
    np.testing.assert_array_equal(exact.key_blocks, judged.key_blocks)
    np.testing.assert_array_equal(exact.is_full, judged.is_full)


def test_a_mask_of_ones_own_needs_only_its_rule(monkeypatch):
    class Odd(Mask):
        def __call__(self, q_idx, k_idx):
            return (q_idx * k_idx) % 5 > 2

    monkeypatch.setattr(block_lists, "_CHUNK", 64)  # many chunks
    check_lists(Odd(), 37, 41, 8, 4)
    check_lists(Odd() & Causal(), 37, 41, 8, 4)


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(9, 2) | Prefix(3), Causal() & Strided(5), ~Full()], ids=str)
def test_live_parts_of_blocks_equal_dense(mask):
    n, m, block, part = 45, 52, (16, 24), (4, 8)
    dense = np.zeros((48, 72), bool)
    dense[:n, :m] = mask.dense(n, m)
    blocks = dense.reshape(3, 4, 4, 3, 3, 8).any((2, 5)).swapaxes(1, 2)
    lists = lower(mask, n, m, *block)
    rows = np.repeat(np.arange(3), lists.counts)
    assert (block_lists.live_parts(mask, n, m, *block, *part) == blocks[rows, lists.key_blocks]).all()
    with pytest.raises(ValueError, match="part_k must divide the block of 24, got 7"):
        block_lists.live_parts(mask, n, m, *block, 4, 7)


def test_long_masks_are_looked_at_only_where_needed(monkeypatch):
    seen = []
    call = masks.And.__call__

    def counting(self, q_idx, k_idx):
        seen.append(np.broadcast(q_idx, k_idx).size)
        return call(self, q_idx, k_idx)

    monkeypatch.setattr(masks.And, "__call__", counting)
    n, block = 1 << 18, 256
    lists = lower(Causal() & SlidingWindow(4095, 0), n, n, block, block)
    assert lists.counts.max() == 17
    assert lists.partial(500).tolist() == [484, 500]
    assert lists.full(500).tolist() == list(range(485, 500))
    assert sum(seen) <= 2 * n * block


def test_a_window_over_a_million_tokens_is_lowered_in_small_memory():
    n, block = 1 << 20, 128
    lower.cache_clear()
    tracemalloc.start()
    lists = lower(SlidingWindow(4095, 0), n, n, block, block)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100e6
    assert lists.counts.tolist() == [min(i, 32) + 1 for i in range(n // block)]


def test_rules_per_head_combine():
    mask = Causal() & ~PerHead((Block(2), Full(), ~Full()))
    assert mask.heads == 3
    assert [mask.head(h) for h in range(3)] == [Causal() & ~Block(2), Causal() & ~Full(), Causal() & ~~Full()]
    with pytest.raises(ValueError, match="agree in heads, got 3 and 2"):
        _ = (mask & PerHead((Full(), Causal()))).heads
    with pytest.raises(ValueError, match="3 rules for 3 heads"):
        lower(mask, 8, 8, 4, 4)


def test_the_picture_shows_blocks_and_sparsity():
    lists = lower(Causal(), 8, 8, 2, 2)
    assert repr(lists) == "BlockLists(4×4 blocks, 62.5 % visited, 60 % of these full)\n▒···\n█▒··\n██▒·\n███▒"
    assert Causal().picture(4096, columns=2).endswith("▒·\n█▒")
    assert "head 1: " in PerHead((Causal(), Full())).picture(64)
    ax = Causal().plot(64)
    assert "50.8 %" in ax.get_title()
    assert ax.images[0].get_array().shape == (64, 64)


def test_table_pads_with_what_is_already_fetched():
    lists = lower(Causal() & ~Prefix(2), 8, 8, 2, 2)
    table, full = lists.table()
    assert lists.counts.tolist() == [0, 1, 2, 3]
    assert table.tolist() == [[0, 0, 0], [1, 1, 1], [1, 2, 2], [1, 2, 3]]
    assert full.tolist() == [[False] * 3, [False] * 3, [True, False, False], [True, True, False]]


def test_masks_are_static_arguments_and_lowered_once():
    traces = []

    @functools.partial(jax.jit, static_argnums=1)
    def count(x, mask):
        traces.append(mask)
        return jnp.sum(jnp.where(mask(jnp.arange(8)[:, None], jnp.arange(8)), x, 0))

    assert count(1.0, Causal() & Block(4)) == count(1.0, Causal() & Block(4)) == 20
    assert len(traces) == 1
    assert lower(Causal() | Prefix(3), 64, 64, 8, 8) is lower(Causal() | Prefix(3), 64, 64, 8, 8)
    assert {Causal(), Causal(0), Causal(1)} == {Causal(1), Causal()}


def test_shared_lists_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        lower(Causal(), 64, 64, 8, 8).key_blocks[0] = 1


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Causal(1.5), TypeError, "offset must be an int, got float"),
        (lambda: Causal(True), TypeError, "offset must be an int, got bool"),
        (lambda: SlidingWindow(1, -2), ValueError, "holds no key"),
        (lambda: Prefix(-1), ValueError, "length must be at least 0, got -1"),
        (lambda: Strided(0), ValueError, "stride must be at least 1, got 0"),
        (lambda: Strided(3, 3), ValueError, "phase must be at least 0 and below 3, got 3"),
        (lambda: Grid((4,), (Full(), Full())), ValueError, "one mask per axis"),
        (lambda: BlockWindow(0, 1, 1), ValueError, "size must be at least 1, got 0"),
        (lambda: Staircase(0, 1), ValueError, "step must be at least 1, got 0"),
        (lambda: PerHead(()), ValueError, "one mask per head"),
        (lambda: Concatenated((Full(),), (0,)), ValueError, "length of at least 1"),
        (lambda: block_array(np.eye(3), 4, 4), TypeError, "blocks must be boolean"),
        (lambda: block_array(np.ones(3, bool), 4, 4), ValueError, "got shape \\(3,\\)"),
        (lambda: Causal() & True, TypeError, "unsupported operand"),
        (lambda: lower(Causal(), 8, 8, 0, 4), ValueError, "block_q must be at least 1, got 0"),
        (lambda: lower(np.tri, 8, 8, 4, 4), TypeError, "mask must be a Mask"),
    ],
)
def test_refusals(build, error, message):
    with pytest.raises(error, match=message):
        build()
