"""Tiles that are visited against the dense mask: exactly those that hold an allowed pair."""

import jax
import numpy as np
import pytest

from pallas_kernels.block_sparse_attention import reference
from pallas_kernels.block_sparse_attention.api import normal_form
from pallas_kernels.block_sparse_attention.arguments import Arguments
from pallas_kernels.block_sparse_attention.cases import SMALL, Case
from pallas_kernels.block_sparse_attention.tiles import tiles_of
from tests.pallas_kernels.quick import quick

CASES = {case.name: case for case in SMALL}
# What is judged by least and largest values may visit tiles without a pair.
APPROXIMATE = ("array_mask", "routed_segments")
NAMES = (
    "window",
    "staircase",
    "boolean_blocks",
    "per_head",
    "per_group",
    "segments",
    "routed",
    "routed_shared",
    "chosen",
    "chosen_by_ids",
    "decode",
    *APPROXIMATE,
)


def arguments_of(case: Case) -> Arguments:
    arrays, _ = case.arguments()
    options = {"mask": case.mask} | (case.options(arrays, np.random.default_rng(3)) if case.options else {})
    return normal_form(arrays["q"], arrays["k"], arrays["v"], **options)


def dense_of(args: Arguments) -> np.ndarray:
    """(B, H, N, M), whether a pair is allowed."""
    _, seen = reference._scores(args)
    return np.asarray(seen).reshape(seen.shape[0], -1, *seen.shape[3:])


@pytest.mark.parametrize("name", quick(NAMES, ("window", "per_group", "segments", "routed", "chosen")))
def test_visited_tiles_are_those_with_an_allowed_pair(name):
    args = arguments_of(CASES[name])
    blocks = args.blocks
    sizes = (32, 24) if blocks is None else (blocks.block_q, blocks.block_k)
    layout, tiles = tiles_of(args, *sizes)
    row, column, full, offsets = (np.asarray(x) for x in tiles)
    visited = np.zeros((layout.rows, layout.k_blocks), bool)
    whole = np.zeros_like(visited)
    count = offsets[-1]
    visited[row[:count], column[:count]], whole[row[:count], column[:count]] = True, full[:count]
    assert visited.sum() == count
    assert (np.diff(row[:count] * layout.k_blocks + column[:count]) > 0).all()
    shape = layout.lanes_b, layout.lanes_h, layout.q_blocks, layout.k_blocks
    visited, whole = visited.reshape(shape), whole.reshape(shape)
    dense = dense_of(args)
    for b, h in np.ndindex(dense.shape[:2]):
        lane = b % layout.lanes_b, h * layout.lanes_h // dense.shape[1]
        for i, j in np.ndindex(shape[2:]):
            pairs = dense[b, h, i * sizes[0] : (i + 1) * sizes[0], j * sizes[1] : (j + 1) * sizes[1]]
            assert visited[lane][i, j] >= pairs.any()
            if name not in APPROXIMATE:
                assert visited[lane][i, j] == pairs.any()
            short = (j + 1) * sizes[1] > layout.keys
            assert not (whole[lane][i, j] and (short or not pairs.all()))


def test_lists_known_when_tracing_are_constants():
    args = arguments_of(CASES["window"])
    text = str(jax.make_jaxpr(lambda q: tiles_of(args, 32, 24)[1].row.sum())(args.q))
    assert "nonzero" not in text
    assert isinstance(tiles_of(args, 32, 24)[1].row, np.ndarray)
