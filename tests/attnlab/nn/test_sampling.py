"""Values between tokens, against sums over all tokens of a grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.nn.sampling import DeformableSampling, corners, reference_points, sample
from tests.accuracy import relative_rms


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_hats(x, points):
    """Σ over all tokens of Π over the axes max(0, 1 - |distance|)."""
    y = np.zeros((*points.shape[:-1], x.shape[-1]))
    for b in range(len(x)):
        for place in np.ndindex(*x.shape[1:-1]):
            weight = np.clip(1 - np.abs(np.float64(points[b]) - np.asarray(place)), 0, None).prod(-1)
            y[b] += weight[..., None] * x[b][place]
    return y


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)])
def test_samples_and_their_gradients(grid):
    x, weights = draw(0, 2, *grid, 3), draw(1, 2, 7, 2, 3)
    points = np.random.default_rng(2).uniform(-1.5, np.asarray(grid) + 0.5, (2, 7, 2, len(grid))).astype(np.float32)
    points[0, 0] = 1.0
    both = jax.value_and_grad(lambda x, p: (sample(x, p) * weights).sum(), (0, 1))
    (got, (dx, dpoints)), y = jax.jit(lambda x, p: (both(x, p), sample(x, p)))(x, points)
    assert relative_rms(y, by_hats(x, points)) < 1e-6
    assert float(got) == pytest.approx((by_hats(x, points) * weights).sum(), rel=1e-4, abs=1e-4)
    assert float((dx * x).sum()) == pytest.approx(float(got), rel=1e-4, abs=1e-4)
    step, direction = 1e-4, draw(3, *points.shape)
    direction[0, 0] = 0
    change = [(by_hats(x, points + s * step * direction) * weights).sum() for s in (1, -1)]
    assert float((dpoints * direction).sum()) == pytest.approx((change[0] - change[1]) / (2 * step), rel=2e-2, abs=1e-2)


def test_far_points_are_zero_and_corners_in_order():
    x = draw(0, 1, 3, 4, 2)
    assert (sample(x, np.array([[[1e30, 0.0], [-1e30, 1.0], [-1.0, 2.0], [3.0, 2.0]]])) == 0).all()
    places, weights = corners(np.array([1.25, 2.5]), (3, 4))
    np.testing.assert_array_equal(places, [6, 7, 10, 11])
    np.testing.assert_allclose(weights, [0.375, 0.375, 0.125, 0.125])
    half = sample(jnp.asarray(x, jnp.bfloat16), np.array([[[0.5, 0.5]]]))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half[0, 0], x[0, :2, :2].mean((0, 1)), atol=2e-2)
    with pytest.raises(ValueError, match="points must have 2 coordinates"):
        sample(x, np.zeros((1, 5, 3)))
    with pytest.raises(ValueError, match="with B = 1"):
        sample(x, np.zeros((2, 5, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, (2, 3)])
def test_tokens_are_read_on_an_even_grid_at_first(stride):
    x = draw(0, 2, 5, 7, 4)
    module = DeformableSampling(4, stride=stride, groups=2, reach=1.5, rngs=nnx.Rngs(0))
    counts = (5, 7) if stride == 1 else (3, 3)
    centres = np.broadcast_to(reference_points((5, 7), counts), (2, *counts, 2))
    assert relative_rms(module(x), by_hats(x, centres)) < 1e-6
    if stride == 1:
        np.testing.assert_allclose(module(x), x, atol=1e-6)
    module.offset.kernel[...] = 50 * draw(1, 2, 2)
    points = np.asarray(module.points(x))
    assert points.shape == (2, *counts, 2, 2) and np.abs(points - centres[..., None, :]).max() <= 1.5
    source = draw(2, 2, 4, 4, 6)
    at = np.asarray(module.points(x, (4, 4)))
    want = np.concatenate([by_hats(source[..., :3], at[..., 0, :]), by_hats(source[..., 3:], at[..., 1, :])], -1)
    assert relative_rms(module(x, source), want) < 1e-5
    gradient = nnx.grad(lambda m: (m(x, source) ** 2).sum())(module)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    with pytest.raises(ValueError, match="groups must divide"):
        DeformableSampling(4, groups=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        DeformableSampling(4, kernel_size=2, rngs=nnx.Rngs(0))
