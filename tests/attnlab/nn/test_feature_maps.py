"""Feature maps by name and value, monomials against the polynomials that they make linear."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.nn.feature_maps import FEATURE_MAPS, elu1, feature_map, monomial_weights, monomials, taylor
from tests.accuracy import relative_rms


def _random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("size", "degree"), [(4, 2), (3, 3), (5, 1), (1, 4), (2, 0)])
def test_taylor_features_multiply_to_the_polynomial(size, degree):
    q, k, scale = _random(3, 2, size), _random(3, 2, size, seed=1), 0.7
    got = (taylor(q, degree, scale=scale) * taylor(k, degree, scale=scale)).sum(-1)
    product = scale * (np.float64(q) * k).sum(-1)
    want = sum(product**n / math.factorial(n) for n in range(degree + 1))
    assert relative_rms(got, want) < 1e-6


def test_monomials_of_three_factors_with_other_coefficients():
    x, y, z = (_random(5, 3, seed=seed) for seed in range(3))
    p = [0.3, -1.0, 2.0, 0.5]
    weights = monomial_weights(3, 3, scale=0.4, coefficients=p)
    got = np.einsum("a,na,na,na->n", weights, *(np.float64(monomials(part, 3)) for part in (x, y, z)))
    product = 0.4 * (np.float64(x) * y * z).sum(-1)
    assert relative_rms(got, sum(c * product**n for n, c in enumerate(p))) < 1e-6


def test_monomials_are_in_the_order_stated():
    np.testing.assert_array_equal(monomials(np.array([2.0, 3.0, 5.0]), 2), [1, 2, 3, 5, 4, 6, 10, 9, 15, 25])
    gradient = jax.grad(lambda x: monomials(x, 2).sum())(jnp.array([2.0, 3.0, 5.0]))
    np.testing.assert_allclose(gradient, [1 + 2 * 2 + 8, 1 + 2 * 3 + 7, 1 + 2 * 5 + 5])
    assert monomials(jnp.ones(3, jnp.bfloat16), 2).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="coefficients must be 3"):
        monomial_weights(3, 2, coefficients=[1.0])
    with pytest.raises(ValueError, match="degree must be"):
        monomials(np.ones(3), -1)


@pytest.mark.parametrize("name", [name for name in FEATURE_MAPS if name != "identity"])
def test_feature_maps_are_non_negative_and_never_overflow(name):
    x = np.array([[-1e4, -3.0, 0.0, 2.0, 1e4], [-2.0, -1.0, 0.0, 1.0, 2.0]], np.float32)
    y = feature_map(name)(x)
    assert (np.asarray(y) >= 0).all() and np.isfinite(y).all()
    assert feature_map(name)(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_feature_maps_by_name_and_value():
    x = np.array([-20.0, -1.0, 0.0, 2.0], np.float32)
    np.testing.assert_allclose(elu1(x), [np.exp(-20), np.exp(-1), 1, 3], rtol=1e-6)
    np.testing.assert_allclose(feature_map("exp")(x), np.exp(x - 2), rtol=1e-6)
    with pytest.raises(ValueError, match="did you mean softmax"):
        feature_map("sofmax")
    with pytest.raises(ValueError, match="there are identity, relu"):
        feature_map("taylor")
