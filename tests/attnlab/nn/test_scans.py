"""Orders of grids: what they are on small grids, and what holds on all."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.nn.scans import inverse_order, permute, scan_order, scan_segments

PLANE = ["raster", "snake", "diagonal", "zigzag", "spiral", "hilbert", "gilbert"]
ON_3_BY_7 = {
    ("snake", False, None): [0, 1, 2, 3, 4, 5, 6, 13, 12, 11, 10, 9, 8, 7, 14, 15, 16, 17, 18, 19, 20],
    ("snake", True, None): [0, 7, 14, 15, 8, 1, 2, 9, 16, 17, 10, 3, 4, 11, 18, 19, 12, 5, 6, 13, 20],
    ("zigzag", False, None): [0, 1, 7, 14, 8, 2, 3, 9, 15, 16, 10, 4, 5, 11, 17, 18, 12, 6, 13, 19, 20],
    ("zigzag", False, 1): [6, 5, 13, 20, 12, 4, 3, 11, 19, 18, 10, 2, 1, 9, 17, 16, 8, 0, 7, 15, 14],
    ("spiral", False, None): [0, 1, 2, 3, 4, 5, 6, 13, 20, 19, 18, 17, 16, 15, 14, 7, 8, 9, 10, 11, 12],
    ("spiral", False, 0): [14, 15, 16, 17, 18, 19, 20, 13, 6, 5, 4, 3, 2, 1, 0, 7, 8, 9, 10, 11, 12],
    ("raster", True, None): [0, 7, 14, 1, 8, 15, 2, 9, 16, 3, 10, 17, 4, 11, 18, 5, 12, 19, 6, 13, 20],
    ("diagonal", False, None): [0, 1, 7, 2, 8, 14, 3, 9, 15, 4, 10, 16, 5, 11, 17, 6, 12, 18, 13, 19, 20],
}


@pytest.mark.parametrize(("name", "transpose", "mirror"), ON_3_BY_7)
def test_orders_on_a_small_grid(name, transpose, mirror):
    """Snakes, zigzags and spirals as the code of MHS-VM (arXiv:2406.05992) has them."""
    order = scan_order(name, (3, 7), transpose=transpose, mirror=mirror)
    np.testing.assert_array_equal(order, ON_3_BY_7[name, transpose, mirror])
    backwards = scan_order(name, (3, 7), transpose=transpose, mirror=mirror, reverse=True)
    np.testing.assert_array_equal(backwards, order[::-1])


def steps(order, grid):
    places = np.stack(np.unravel_index(order, grid), -1)
    return np.abs(np.diff(places, axis=0)).sum(1)


@pytest.mark.parametrize("name", PLANE)
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (4, 4), (5, 7), (6, 10)])
def test_every_token_once(name, grid):
    for transpose, mirror, reverse in itertools.product((False, True), (None, 0, 1), (False, True)):
        order = scan_order(name, grid, transpose=transpose, mirror=mirror, reverse=reverse)
        np.testing.assert_array_equal(np.sort(order), np.arange(len(order)))
        np.testing.assert_array_equal(order[inverse_order(order)], np.arange(len(order)))
    if name in ("snake", "spiral", "gilbert"):
        assert (steps(order, grid) == 1).all()


def test_curves():
    np.testing.assert_array_equal(scan_order("hilbert", (4, 4)), [0, 1, 5, 4, 8, 12, 13, 9, 10, 14, 15, 11, 7, 6, 2, 3])
    assert (steps(scan_order("hilbert", (16, 16)), (16, 16)) == 1).all()
    for grid in [(4, 4, 4), (2, 3, 4), (8, 4, 6), (4, 6, 10), (3, 1, 1), (5, 1, 3), (5, 6, 7)]:
        order = scan_order("gilbert", grid)
        np.testing.assert_array_equal(np.sort(order), np.arange(np.prod(grid)))
        # Odd sides may need a few steps across a corner.
        assert (steps(order, grid) == 1).all() or grid == (5, 6, 7)
    assert (steps(scan_order("snake", (2, 3, 4)), (2, 3, 4)) == 1).all()


def test_windows_and_sub_grids():
    np.testing.assert_array_equal(scan_order("window", (2, 5), size=2), [0, 1, 5, 6, 2, 3, 7, 8, 4, 9])
    np.testing.assert_array_equal(scan_segments("window", (2, 5), 2), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    np.testing.assert_array_equal(scan_order("dilated", (3, 3), size=2), [0, 2, 6, 8, 1, 7, 3, 5, 4])
    np.testing.assert_array_equal(scan_segments("dilated", (3, 3), 2), [0, 0, 0, 0, 1, 1, 2, 2, 3])
    np.testing.assert_array_equal(scan_order("window", (5, 2), size=(2, 1), transpose=True)[:2], [0, 2])


def test_tokens_go_there_and_back():
    x, order = jnp.arange(24.0).reshape(2, 12), scan_order("spiral", (3, 4))
    there = permute(x, order)
    np.testing.assert_array_equal(there, x[:, order])
    np.testing.assert_array_equal(permute(there, inverse_order(order)), x)
    np.testing.assert_array_equal(permute(x.T, order, axis=0), x.T[order])
    weights = jnp.arange(12.0)
    gradient = jax.grad(lambda x: (permute(x, order) * weights).sum())(x)
    np.testing.assert_array_equal(gradient[0], weights[inverse_order(order)])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: scan_order("spirals", (3, 4)), "did you mean spiral"),
        (lambda: scan_order("spiral", (3, 4, 2)), "spiral orders grids of two axes"),
        (lambda: scan_order("gilbert", (3,)), "gilbert orders grids of two or three axes"),
        (lambda: scan_order("spiral", (0, 4)), "axes of at least 1"),
        (lambda: scan_order("window", (3, 4)), "size is needed for window and dilated"),
        (lambda: scan_order("raster", (3, 4), size=2), "size is needed"),
        (lambda: scan_order("raster", (3, 4), mirror=2), "mirror must be an axis"),
        (lambda: permute(np.ones((1, 5)), scan_order("raster", (2, 3))), "the order is of 6 tokens, got 5"),
    ],
)
def test_what_has_no_order_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
