"""Sums with given weights: the definition, neighborhood attention's own weights, gradients, refusals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.neighborhood_attention import (
    neighborhood_attention,
    neighborhood_attention_weights,
    neighborhood_places,
    neighborhood_sum,
)
from tests.accuracy import relative_rms
from tests.jaxprs import largest_array

CASES = [((7,), 3), ((5, 6), (5, 3)), ((4, 4), (2, 4)), ((2, 3, 4), (1, 3, 2))]


def arrays(shape, taps):
    random = np.random.default_rng(0)
    weights = random.standard_normal((2, *shape, 2, taps)).astype(np.float32)
    return weights, random.standard_normal((2, *shape, 2, 3)).astype(np.float32)


def written_out(weights, v, places):
    """Σ_t w_i[t] v at the t-th tap of i, token by token."""
    y = np.zeros(v.shape)
    for token in np.ndindex(*v.shape[1:-2]):
        taps = itertools.product(*(place[i] for place, i in zip(places, token, strict=True)))
        for t, tap in enumerate(taps):
            y[:, *token] += weights[:, *token, :, t, None] * v[:, *tap]
    return y


@pytest.mark.parametrize(("shape", "kernel_size"), CASES)
def test_it_is_the_definition_and_so_are_its_gradients(shape, kernel_size):
    places = neighborhood_places(shape, kernel_size)
    weights, v = arrays(shape, int(np.prod([place.shape[1] for place in places])))
    assert all(place.min() == 0 and place.max() == n - 1 for place, n in zip(places, shape, strict=True))
    want = written_out(weights, v, places)
    y, pull = jax.vjp(lambda w, v: neighborhood_sum(w, v, kernel_size), weights, v)
    assert relative_rms(y, want) < 1e-6
    dy = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
    dw, dv = pull(dy)
    # It is linear in each, so that its gradients are the definition's: ⟨dw, w'⟩ = ⟨dy, y(w', v)⟩.
    other, values = arrays(shape, weights.shape[-1])
    assert np.vdot(dw, other[::-1]) == pytest.approx(np.vdot(dy, written_out(other[::-1], v, places)), rel=1e-4)
    assert np.vdot(dv, values[::-1]) == pytest.approx(np.vdot(dy, written_out(weights, values[::-1], places)), rel=1e-4)


def test_with_its_own_weights_it_is_neighborhood_attention():
    shape, kernel_size = (5, 6), (3, 5)
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, *shape, 2, 4)).astype(np.float32)
    whole = neighborhood_attention_weights(q, k, kernel_size).reshape(2, 2, *shape, *shape)
    rows, columns = neighborhood_places(shape, kernel_size)
    i, j = np.ogrid[:5, :6]
    taps = whole[:, :, i[..., None, None], j[..., None, None], rows[:, None, :, None], columns[None, :, None, :]]
    weights = jnp.moveaxis(taps.reshape(2, 2, *shape, -1), 1, 3)
    want = neighborhood_attention(q, k, v, kernel_size, implementation="reference")
    assert relative_rms(neighborhood_sum(weights, v, kernel_size), want) < 1e-6


def test_it_never_copies_the_values_once_for_each_tap():
    weights, v = np.ones((1, 9, 9, 1, 49), np.float32), np.ones((1, 9, 9, 1, 64), np.float32)
    gradient = jax.grad(lambda w, v: neighborhood_sum(w, v, 7).sum(), (0, 1))
    assert largest_array(gradient, weights, v) <= 7 * v.size


def test_dtypes_and_refusals():
    weights, v = (a.astype(jnp.bfloat16) for a in arrays((5,), 3))
    assert neighborhood_sum(weights, v, 3).dtype == jnp.bfloat16
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(lambda w, v: neighborhood_sum(w, v, 3), weights.astype(np.float32), v)
    with pytest.raises(ValueError, match="weights must be"):
        neighborhood_sum(weights[..., :2], v, 3)
    with pytest.raises(ValueError, match="kernel_size"):
        neighborhood_sum(weights, v, 7)
    with pytest.raises(ValueError, match="v must be"):
        neighborhood_sum(weights[0], v[0], 3)
