"""Curved spaces: inverse maps, distances, the flat limit, and slopes where formulas have none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.nn.stereographic import (
    distance,
    distance0,
    distances,
    exp0,
    half,
    inside,
    log0,
    mobius_add,
    scaled,
    tangent_midpoint,
    weighted_midpoint,
)
from tests.accuracy import relative_rms


def draw(*shape, seed=0):
    return 0.4 * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("k", [-1.7, -1e-6, 0.0, 1e-6, 0.9])
def test_maps_and_distances_of_every_curvature(k):
    v, w = draw(2, 5, 3), draw(2, 4, 3, seed=1)

    @jax.jit
    def run(v, w):
        x, y = exp0(v, k), exp0(w, k)
        pairs = x[:, :, None], y[:, None]
        ones = jnp.ones((2, 1, 5))
        return (
            log0(x, k),
            distance0(x, k),
            distance(*pairs, k),
            distances(x, y, k),
            scaled(jnp.full((2, 5), 0.5), x, k),
            (half(x, k)),
            mobius_add(-x, mobius_add(x, x, k), k),
            x,
            weighted_midpoint(x[:, :1], ones[..., :1], k),
        )

    back, lengths, each, all_pairs, halved, same, cancelled, x, alone = run(v, w)
    assert relative_rms(back, v) < 1e-5
    assert relative_rms(lengths, 2 * np.linalg.norm(v, axis=-1)) < 1e-5
    assert relative_rms(all_pairs, each) < 1e-4
    assert relative_rms(halved, same) < 1e-5
    assert relative_rms(cancelled, x) < 1e-5
    assert relative_rms(alone, x[:, :1]) < 1e-5, "the midpoint of one point is the point"
    if abs(k) < 1e-5:
        assert relative_rms(each, 2 * np.linalg.norm(v[:, :, None] - w[:, None], axis=-1)) < 1e-4


@pytest.mark.parametrize("k", [-2.0, 0.0, 3.0])
def test_gradients_are_finite_at_the_origin_where_points_meet_and_at_the_rim(k):
    def everything(x, y, k):
        total = log0(x, k).sum() + exp0(x, k).sum() + distance0(x, k).sum() + distance(x, y, k).sum()
        return total + distances(x, y, k).sum() + weighted_midpoint(x, jnp.ones((1, 3)), k, margin=4e-3).sum()

    rim = jnp.asarray([0.0, 0.999999]) / np.sqrt(abs(k) or 1)
    x = jnp.stack([jnp.zeros(2), jnp.asarray([0.2, 0.1]), rim])
    value, slopes = jax.jit(jax.value_and_grad(everything, (0, 1, 2)))(x, x, k)
    assert np.isfinite(value)
    assert all(np.isfinite(slope).all() for slope in slopes)
    out = inside(jnp.asarray([[3.0, 4.0], [0.1, 0.1]]), -4.0)
    np.testing.assert_allclose(np.linalg.norm(out, axis=-1), [0.498, np.sqrt(0.02)], rtol=1e-5)


def test_the_midpoint_from_vectors_is_that_of_points():
    v, weights = 3 * draw(2, 6, 3), np.random.default_rng(1).random((2, 4, 6)).astype(np.float32)
    weights[0, 1] = 0

    @jax.jit
    def run(v):
        want = log0(weighted_midpoint(exp0(v, -0.5), weights, -0.5, margin=4e-3), -0.5)
        slope = jax.grad(lambda v: tangent_midpoint(v, weights, 0.5).sum())(v.at[0, 0].set(0))
        return tangent_midpoint(v, weights, 0.5), want, slope

    got, want, slope = run(v)
    assert relative_rms(got, want) < 1e-4
    assert not np.any(got[0, 1])
    assert np.isfinite(slope).all()
