"""Scans of images: what their papers say of them, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.mixers.mhs_vm import GatedMultiHeadScan, MultiHeadScan, scan_route_attention
from attnlab.mixers.visual_mamba_survey import Scan2d
from attnlab.nn.scans import read_routes, scan_routes, write_routes
from attnlab.nn.selective import SelectiveScan
from tests.accuracy import relative_rms
from tests.pallas_kernels.quick import quick


def test_routes_that_agree_say_nothing_and_have_a_gradient():
    same = jnp.broadcast_to(jnp.arange(6.0).reshape(1, 2, 1, 3), (1, 2, 4, 3))
    for threshold in (0.0, 0.5):
        run = jax.jit(jax.value_and_grad(lambda y, t=threshold: scan_route_attention(y, threshold=t).sum()))
        value, gradient = run(same)
        assert value == 0 and np.all(np.isfinite(gradient))
    with pytest.raises(ValueError, match="at least two, got 1"):
        scan_route_attention(same[:, :, :1])


def test_a_map_of_one_token_has_finite_gradients():
    mixer = MultiHeadScan(8, patterns=("snake", "spiral"), state_size=2, rngs=nnx.Rngs(0))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(mixer(x) ** 2)))(jnp.ones((1, 1, 1, 8)))
    assert np.all(np.isfinite(gradient))


def test_what_the_multi_head_scan_refuses():
    with pytest.raises(ValueError, match="pattern must be one of snake, zigzag, spiral, raster, got 'hilbert'"):
        MultiHeadScan(8, patterns=("hilbert",), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="divide these where projected=False, got 3"):
        GatedMultiHeadScan(8, projected=False, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["raster", "zigzag", "spiral"])
def test_routes_are_read_and_written_back(name):
    x = jnp.arange(2.0 * 15 * 2).reshape(2, 15, 2)
    routes = scan_routes(name, (3, 5))
    read = read_routes(x, routes)
    np.testing.assert_array_equal(write_routes(read, routes), jnp.broadcast_to(x[:, :, None], read.shape))
    np.testing.assert_array_equal(read[:, :, 0], read[:, ::-1, 2])  # [r0, r1, r0 backwards, r1 backwards]
    paired = scan_routes(name, (3, 5), paired=True)
    np.testing.assert_array_equal(paired[[0, 2, 1, 3]], routes)


def cross_scan(**options):
    return Scan2d(6, state_size=3, kernel_size=1, tied=True, rngs=nnx.Rngs(0), **options)


def test_a_tied_cross_scan_commutes_with_transposition_and_half_a_turn():
    """The claim about receptive fields: exact symmetries of the cross-scan, none of which a raster scan has."""
    x = np.random.default_rng(0).standard_normal((1, 5, 5, 6)).astype(np.float32)
    symmetries = [lambda a: a.swapaxes(1, 2), lambda a: a[:, ::-1, ::-1]]
    for mixer, exact in ((cross_scan(), True), (cross_scan(second=False, reverse=False), False)):
        run = jax.jit(mixer)
        for symmetry in symmetries:
            error = relative_rms(run(symmetry(x)), symmetry(run(x)))
            assert error < 1e-6 if exact else error > 1e-2


def test_raster_sees_half_of_the_plane_and_a_cross_scan_all_of_it():
    x = np.random.default_rng(1).standard_normal((1, 5, 5, 6)).astype(np.float32)

    def seen(mixer):
        gradient = jax.jit(jax.grad(lambda x: mixer(x)[0, 2, 2].sum()))(x)
        return np.asarray(jnp.abs(gradient[0]).sum(-1)) > 0

    assert seen(cross_scan()).all()
    np.testing.assert_array_equal(seen(cross_scan(second=False, reverse=False)), np.arange(25).reshape(5, 5) <= 12)


@pytest.mark.parametrize("order", quick(["window", "dilated"], ["dilated"]))
def test_restarted_scans_stay_in_their_window(order):
    mixer = cross_scan(order=order, size=2, restart=True)
    x = np.random.default_rng(2).standard_normal((1, 4, 5, 6)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda x: mixer(x)[0, 1, 3].sum()))(x)
    rows, columns = np.mgrid[:4, :5]
    same = (rows // 2 == 0) & (columns // 2 == 1) if order == "window" else (rows % 2 == 1) & (columns % 2 == 1)
    np.testing.assert_array_equal(np.abs(gradient[0]).sum(-1) > 0, same)


@pytest.mark.parametrize("merge", quick(["mean", "concat", "gated"], ["concat"]))
def test_other_merges(merge):
    x = np.random.default_rng(3).standard_normal((1, 3, 4, 6)).astype(np.float32)
    y = jax.jit(cross_scan(merge=merge))(x)
    assert y.shape == x.shape and np.all(np.isfinite(y))


def test_what_scans_refuse():
    for options, message in (
        ({"merge": "max"}, "merge must be one of sum, mean, concat, gated, got 'max'"),
        ({"causal": True}, "causal scans are of sequences, along one raster route, got layout image"),
        ({"layout": "sequence", "second": True}, "a sequence has no second route"),
        ({"restart": True}, "restart needs an order of windows"),
        ({"merge": "gated", "second": False, "reverse": False}, "a gate looks at how routes differ"),
    ):
        with pytest.raises(ValueError, match=message):
            Scan2d(6, **options, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        SelectiveScan(4, rank=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="step_range must be two positive numbers"):
        SelectiveScan(4, step_range=(0.1, 0.01), rngs=nnx.Rngs(0))
