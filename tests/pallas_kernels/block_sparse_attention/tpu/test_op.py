"""The TPU kernels, interpreted: memory that nobody wrote is NaN, reads out of bounds raise, races are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_lists, dispatch
from pallas_kernels.block_masks import Block, Staircase
from pallas_kernels.block_sparse_attention import Blocks
from pallas_kernels.block_sparse_attention.api import block_sparse_attention, normal_form
from pallas_kernels.block_sparse_attention.cases import SMALL
from pallas_kernels.block_sparse_attention.tiles import tiles_of
from pallas_kernels.block_sparse_attention.tpu import lists
from pallas_kernels.block_sparse_attention.tpu import plan as tpu_plan
from pallas_kernels.masks import Causal, Full, PerHead, Prefix, SlidingWindow, Strided
from pallas_kernels.tpu.chips import CHIPS
from tests.pallas_kernels.quick import joined, quick
from tests.pallas_kernels.tpu_interpreter import interpreted

BOUND = {"float32": 2e-6, "bfloat16": 4e-3}
# Blocks that are no multiples of a tile are refused.
TAKEN = [
    case for case in SMALL if not case.name.startswith(("routed", "score_mod_routed")) or case.name == "routed_128"
]
RUNS = [(case, "float32") for case in TAKEN]
RUNS += [(case, "bfloat16") for case in TAKEN if case.name in ("window", "staircase", "segments", "chosen")]
# In tiles of 256, with sub-tiles of 128.
IN_PIECES = [case for case in TAKEN if case.name in ("window", "staircase", "per_head", "segments", "score_mod")]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 128, so that small cases have several."""
    monkeypatch.setattr(tpu_plan, "SIZES", (128,))
    tpu_plan._sizes.cache_clear()
    yield
    tpu_plan._sizes.cache_clear()


@pytest.mark.parametrize(("case", "dtype"), quick(RUNS, ("staircase-bfloat16", "routed_128-float32"), joined))
def test_relative_rms_error(case, dtype, errors):
    with interpreted() as kernels:
        found = errors(case, jnp.dtype(dtype), implementation="tpu")
    full = "bias" in case.extra and case.extra["bias"][2:] == (case.queries, case.keys or case.queries)
    assert len(kernels) == 3 + full
    assert max(found.outputs) <= BOUND[dtype], found.outputs
    assert set(found.gradients) == {"q", "k", "v", *case.extra}
    assert max(found.gradients.values()) <= 2 * BOUND[dtype], found.gradients


@pytest.fixture
def tiles_of_256(monkeypatch):
    monkeypatch.setattr(tpu_plan, "SIZES", (256,))
    tpu_plan._sizes.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("case", IN_PIECES, ids=lambda case: case.name)
def test_relative_rms_error_in_pieces(case, errors, tiles_of_256):
    with interpreted():
        found = errors(case, jnp.float32, implementation="tpu")
    assert max(found.outputs) <= BOUND["float32"], found.outputs
    assert max(found.gradients.values()) <= 2 * BOUND["float32"], found.gradients


@pytest.mark.slow
def test_sub_tiles_that_hold_no_pair_are_not_computed(tiles_of_256):
    # What is computed mixes NaN into the rows of the products, masked or not: here the second half of the keys of the
    # first batch element, and the first half of the queries of the other one.
    x = jnp.ones((2, 256, 1, 8))
    k, q = x.at[0, 128:].set(jnp.nan), x.at[1, :128].set(jnp.nan)
    with interpreted():
        y, pull = jax.vjp(lambda *a: block_sparse_attention(*a, mask=Causal(), implementation="tpu"), q, k, k)
        dq, dk, dv = pull(x)
    for rows, cut in ((y[0], slice(128)), (dq[0], slice(128)), (dk[1], slice(128, None)), (dv[1], slice(128, None))):
        assert jnp.isfinite(rows[cut]).all()
        assert jnp.isnan(rows).any()


COUNTED = {
    "causal": (Causal(), 2048),
    "window": (SlidingWindow(409, 0), 2048),
    "band": (SlidingWindow(200, 200), 2048),
    "staircase": (Causal() & Staircase(64, 384), 2048),
    "strided": (Causal() & Strided(3), 1100),
    "per_head": (PerHead((Causal(), ~Full(), Block(256))), 1024),
}


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5e"])
@pytest.mark.parametrize("name", COUNTED)
def test_pairs_that_are_computed_are_those_of_live_sub_tiles(name, kind, monkeypatch):
    monkeypatch.setattr(tpu_plan, "SIZES", (128, 256, 512))
    tpu_plan._sizes.cache_clear()
    (mask, n), chip = COUNTED[name], CHIPS[kind]
    q = jax.ShapeDtypeStruct((1, n, mask.heads, 128), jnp.bfloat16)
    args = jax.eval_shape(lambda q: normal_form(q, q, q, mask=mask), q)
    sizes = tpu_plan.sizes(args, chip)
    dense = np.zeros((mask.heads, *(-(-n // size) * size for size in sizes)), bool)
    for h in range(mask.heads):
        dense[h, :n, :n] = mask.head(h).dense(n)

    def pairs_in(block_q, block_k):
        blocks = dense.reshape(mask.heads, dense.shape[1] // block_q, block_q, dense.shape[2] // block_k, block_k)
        return int(blocks.any((2, 4)).sum()) * block_q * block_k

    counted = tpu_plan.counted(args, chip)
    assert counted == (pairs_in(*sizes), pairs_in(lists.PART, lists.PART))
    assert counted.computed < counted.visited or name == "strided" or max(sizes) == lists.PART


def test_kinds_of_tiles_beyond_those_with_code_are_computed_whole():
    rules, n, whole = [Causal(offset) for offset in (0, -128, -256, 128, 256)], 1024, lists.Piece(0, 0, 512, 512)
    found = lists.patterns_of(tuple(rules), n, n, 512, 512)
    assert len(found.kinds) == lists.MOST_PATTERNS
    assert found.kinds[-1] == (whole,)
    live = np.concatenate([block_lists.live_parts(rule, n, n, 512, 512, 128, 128) for rule in rules])
    total = 0
    for number, needed in zip(found.number, live, strict=True):
        computed = np.zeros((4, 4), int)
        for i, j, queries, keys in (whole,) if number == lists.WHOLE else found.kinds[number - lists.MASKED]:
            computed[i // 128 : (i + queries) // 128, j // 128 : (j + keys) // 128] += 1
        assert (computed == needed).all() or (computed == 1).all()
        total += 128 * 128 * computed.sum()
    assert found.computed == total


def visited(run) -> list[tuple[int, ...]]:
    points = []

    def record(token, point, core):
        points.append(tuple(int(x) for x in point))
        return token

    with interpreted(recorder=record):
        jax.block_until_ready(run())
    return points


def test_grid_points_are_the_tiles_that_are_needed():
    mask, n = Causal() & SlidingWindow(130, 0), 520
    q = jnp.ones((1, n, 2, 8))
    lists_ = mask.dense(n)
    needed = sum(lists_[i : i + 128, j : j + 128].any() for i in range(0, n, 128) for j in range(0, n, 128))
    points = visited(lambda: block_sparse_attention(q, q, q, mask=mask, implementation="tpu"))
    assert len(points) == len(set(points)) == 2 * needed


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_grid_points_follow_counts_at_run_time(share):
    visible = np.random.default_rng(0).random((2, 2, 3, 3)) < share
    q = jnp.ones((2, 300, 2, 8))

    @jax.jit
    def run(visible):
        blocks = Blocks.from_booleans(visible, 128, 128)
        return jax.grad(lambda q: block_sparse_attention(q, q, q, blocks=blocks, implementation="tpu").sum())(q)

    # One grid point of each kernel that writes zeros, where nothing is visited.
    assert len(visited(lambda: run(jnp.asarray(visible)))) == 3 * max(1, visible.sum())


def test_partial_masks_are_shared_and_nothing_is_copied_twice():
    q = jax.ShapeDtypeStruct((1, 4096, 4, 64), jnp.bfloat16)
    mask = PerHead((Causal(), SlidingWindow(511, 0), Causal() | Prefix(8), Block(256)))
    args = jax.eval_shape(lambda q: normal_form(q, q, q, mask=mask), q)
    layout, tiles = tiles_of(args, 256, 256)
    masks, number = lists.masks_of(mask, layout)
    dense = [mask.head(h).dense(4096) for h in range(4)]
    for row, column, full, at in zip(tiles.row, tiles.column, tiles.full, number, strict=True):
        h, i = divmod(int(row), layout.q_blocks)
        pairs = dense[h][i * 256 : (i + 1) * 256, column * 256 : (column + 1) * 256]
        assert full == pairs.all()
        assert full or (pairs == masks[at].T).all()
    assert len(masks) == len({one.tobytes() for one in masks}) == 3
    _, work = lists.patterns(mask, layout, tiles)
    by_row, by_column = lists.walks(layout, tiles, number, work)
    for walk, place in ((by_row, tiles.row), (by_column, None)):
        flags = np.asarray(walk.flags)
        lane = flags >> lists.LANE
        written = lane * 16 + (walk.row if place is not None else walk.column)
        assert walk.total == tiles.row.size == (walk.flags & lists.FIRST > 0).sum() + (np.diff(written) == 0).sum()
        assert (np.flatnonzero(np.diff(written)) + 1 == np.flatnonzero(flags & lists.FIRST)[1:]).all()
        assert (np.flatnonzero(np.diff(written)) == np.flatnonzero(flags & lists.LAST)[:-1]).all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"blocks": Blocks.from_booleans(jnp.ones((1, 1, 3, 3), bool), 64, 64)}, "multiples of 128"),
        ({"mask": PerHead((Causal(), Causal(1))), "segment_ids": np.zeros((1, 150), int)}, "rules per head"),
    ],
)
def test_refusals_say_why(options, reason):
    q = jnp.zeros((1, 150, 2, 8))
    with dispatch.target("tpu", "TPU v5e"), pytest.raises(dispatch.UnsupportedError, match=reason):
        block_sparse_attention(q, q, q, implementation="tpu", **options)


@pytest.mark.parametrize("kind", CHIPS)
def test_long_sequences_get_larger_tiles(kind, monkeypatch):
    monkeypatch.setattr(tpu_plan, "SIZES", (128, 256, 512))
    tpu_plan._sizes.cache_clear()
    q = jax.ShapeDtypeStruct((1, 1 << 17, 1, 128), jnp.bfloat16)
    args = jax.eval_shape(lambda q: normal_form(q, q, q, mask=SlidingWindow(4095, 0)), q)
    block_q, block_k = tpu_plan.sizes(args, CHIPS[kind])
    layout, tiles = tiles_of(args, block_q, block_k)
    assert tiles.row.size <= tpu_plan.MOST_TILES
    # Keys and values that are fetched, over those that are needed.
    fetched = tiles.row.size * block_k
    assert fetched <= 1.2 * layout.q_blocks * (4095 + block_q)
