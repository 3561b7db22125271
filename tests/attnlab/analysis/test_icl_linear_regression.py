import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.analysis import icl_linear_regression as theory
from attnlab.models.in_context_regression import InContextAttention

SETTING = {"d": 5, "length": 40, "variance": 0.1}


def test_heads_of_diagonal_maps_are_the_theorys():
    """Two opposite heads with KQ = ω I on the covariates and OV = μ on the response predict as the theory says."""
    omega, mu = np.array([0.2, -0.2]), np.array([2.0, -2.0])
    module = InContextAttention(6, num_heads=2, out_features=1, init="oppo_small_id", rngs=nnx.Rngs(0))
    signs = np.sign(np.diagonal(np.asarray(module.query.kernel), axis1=0, axis2=2)[:, 0])
    assert signs.tolist() == [1, -1]
    module.query.kernel[...] = module.query.kernel[...] * 1e6 * 0.2 * 6**0.5
    module.key.kernel[...] = module.key.kernel[...] * 1e6
    module.value.kernel[...] = jnp.zeros((6, 2, 6)).at[5, :, 5].set(1)
    module.out.kernel[...] = jnp.zeros((2, 6, 1)).at[:, 5, 0].set(mu)
    heads = theory.heads_of(module)
    np.testing.assert_allclose(heads.omega, omega, rtol=1e-5)
    np.testing.assert_allclose(heads.mu, mu, rtol=1e-5)
    random = np.random.default_rng(0)
    x, y, x_q = random.standard_normal((5, 40)), random.standard_normal(40), random.standard_normal(5)
    z = np.concatenate([x, y[None]]).T[None].astype(np.float32)
    z_q = np.append(x_q, 0)[None, None].astype(np.float32)
    want = theory.predict_by_heads(x, y, x_q, omega=omega, mu=mu)
    np.testing.assert_allclose(module(z_q, z)[0, 0, 0], want, rtol=1e-4)
    # For small ω they are a step of debiased descent: the softmax to first order.
    small = theory.predict_by_heads(x, y, x_q, omega=omega / 100, mu=mu)
    step = theory.predict_by_descent(x, y, x_q, omega=0.002, mu=2.0, debiased=True)
    np.testing.assert_allclose(small, step, rtol=1e-3)


def test_gradients_are_those_of_the_loss():
    omega, mu = np.array([0.2, -0.1, 0.05]), np.array([1.0, -0.5, 0.2])
    by_mu, by_omega = theory.flow_gradients(omega, mu, **SETTING)
    for by, vary in ((by_mu, lambda e: (omega, mu + e)), (by_omega, lambda e: (omega + e, mu))):
        for head in range(3):
            e = 1e-6 * np.eye(3)[head]
            above, below = (theory.approximate_loss(*vary(step), **SETTING) for step in (e, -e))
            np.testing.assert_allclose(by[head], (above - below) / 4e-6, rtol=1e-6)
    best = theory.optimal_mu(omega, **SETTING)
    np.testing.assert_allclose(theory.flow_gradients(omega, best, **SETTING)[0], 0, atol=1e-12)
    flow = theory.gradient_flow(omega, mu, **SETTING, rate=0.05, steps=20, every=10)
    assert flow.loss.shape == (3,) and (np.diff(flow.loss) < 0).all()
    with pytest.raises(ValueError, match="every must divide steps"):
        theory.gradient_flow(omega, mu, **SETTING, rate=0.05, steps=20, every=3)


def test_ridge_nears_its_limit():
    random, d, length = np.random.default_rng(0), 60, 240
    errors = []
    for _ in range(40):
        beta = random.standard_normal(d) / d**0.5
        x, x_q = random.standard_normal((d, length)), random.standard_normal(d)
        y = beta @ x + 0.1**0.5 * random.standard_normal(length)
        errors.append((theory.predict_by_ridge(x, y, x_q, variance=0.1) - beta @ x_q) ** 2)
    limit = theory.ridge_risk(d / length, 0.1)
    assert abs(np.mean(errors) + 0.1 - limit) < 0.02, "the target's own noise counts"


def test_initial_weights():
    for init, heads in (("small_id", 3), ("small_id_qk", 3), ("random", 3)):
        module = InContextAttention(4, num_heads=heads, init=init, rngs=nnx.Rngs(0))
        assert jax.tree.leaves(nnx.state(module, nnx.Param))[0].dtype == jnp.float32
    module = InContextAttention(4, num_heads=3, init="small_id", rngs=nnx.Rngs(0))
    np.testing.assert_allclose(module.out.kernel[1], 1e-6 * np.eye(4))
    np.testing.assert_allclose(module.value.kernel[:, 2], 1e-6 * np.eye(4))
    with pytest.raises(ValueError, match="even num_heads"):
        InContextAttention(4, num_heads=3, init="oppo_small_id", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="init must be one of"):
        InContextAttention(4, num_heads=2, init="big", rngs=nnx.Rngs(0))
