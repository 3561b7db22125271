"""Newton's inverses: what they converge to, and their two gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.linear.soft import gaussian_kernel
from attnlab.nn.newton_inverse import newton_inverse, symmetric_newton_inverse


def kernels(*shape, spread=1.5):
    """Gaussian kernels of points that stand apart."""
    points = spread * np.random.default_rng(0).normal(size=(*shape, 8)).astype(np.float32)
    return gaussian_kernel(points, points)


def test_the_residual_falls_with_every_iteration():
    """The paper's claim, for 49 landmarks."""
    kernel, eye = kernels(2, 49), np.eye(49)
    shifted = np.asarray(kernel) + 0.01 * eye
    residuals = [
        np.linalg.norm(np.asarray(newton_inverse(kernel, iterations=n)) @ shifted - eye, axis=(-2, -1)).max()
        for n in (0, 5, 10, 15, 20)
    ]
    steps = itertools.pairwise(residuals)
    assert all(after < before or after < 1e-3 for before, after in steps), "until it is rounding"
    assert residuals[-1] / 7 < 1e-2
    np.testing.assert_allclose(symmetric_newton_inverse(kernel), np.linalg.inv(np.asarray(kernel)), atol=1e-3)


def test_the_analytic_gradient_is_that_of_the_iterations_once_they_converged():
    kernel, weight = kernels(9), np.random.default_rng(1).normal(size=(9, 9)).astype(np.float32)
    grads = {
        rule: jax.grad(lambda k, rule=rule: jnp.vdot(weight, newton_inverse(k, gradient=rule, ridge=0.0)))(kernel)
        for rule in ("analytic", "unrolled")
    }
    np.testing.assert_allclose(grads["analytic"], grads["unrolled"], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="gradient must be"):
        newton_inverse(kernel, gradient="none")


def test_a_matrix_does_not_depend_on_those_beside_it_unless_the_start_is_shared():
    pair = jnp.stack([kernels(9), jnp.ones((9, 9)) + jnp.eye(9)])
    few = {"iterations": 3}
    alone = symmetric_newton_inverse(pair[:1], **few)
    np.testing.assert_allclose(symmetric_newton_inverse(pair, **few)[:1], alone, rtol=1e-5)
    assert not np.allclose(symmetric_newton_inverse(pair, shared_start=True, **few)[:1], alone, rtol=1e-2)
    with pytest.raises(ValueError, match=r"matrix must be \(…, m, m\)"):
        newton_inverse(jnp.ones((3, 4)))
