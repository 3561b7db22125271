"""Choices, routers and lists of static length against loops over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.nn.aux_loss import total_aux_loss
from attnlab.nn.routing import (
    Routing,
    SoftmaxRouter,
    add_tokens,
    balance_loss,
    route,
    select_tokens,
    straight_through,
    take_tokens,
    top_k_mask,
)
from tests.accuracy import relative_rms


def _random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_top_k_is_exact_and_prefers_the_lower_index():
    x = np.array([[1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(top_k_mask(x, 2), [[False, True, True, False], [True, True, False, False]])
    np.testing.assert_array_equal(top_k_mask(x.T, 2, axis=0), top_k_mask(x, 2).T)
    where = [False, False, True, True]
    np.testing.assert_array_equal(top_k_mask(x, 3, where=where), [where, where])
    assert not top_k_mask(x, 0).any()
    many = _random(3, 5, 4)
    assert (top_k_mask(many, 3, axis=1).sum(1) == 3).all()
    with pytest.raises(ValueError, match=r"k must be in 0\.\.4"):
        top_k_mask(x, 5)


def test_straight_through_has_one_value_and_the_other_gradient():
    logits, weights = _random(2, 5), _random(2, 5, seed=1)

    def hard(logits, dtype=jnp.float32):
        soft = jax.nn.softmax(logits.astype(dtype))
        return (straight_through(top_k_mask(soft, 1), soft) * weights.astype(dtype)).sum()

    assert float(hard(logits)) == pytest.approx(weights[np.arange(2), logits.argmax(1)].sum(), rel=1e-6)
    soft_gradient = jax.grad(lambda x: (jax.nn.softmax(x) * weights).sum())(logits)
    np.testing.assert_allclose(jax.grad(hard)(logits), soft_gradient, rtol=1e-6)
    half = straight_through(np.ones(3, bool), jnp.full(3, 0.3, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and (half == 1).all()


def test_router_against_a_loop_over_tokens():
    logits, k = _random(2, 3, 5), 2
    routing = route(logits, k)
    p = np.exp(np.float64(logits))
    p /= p.sum(-1, keepdims=True)
    gates, counted, chosen_share = np.zeros_like(p), np.zeros(5), np.zeros(5)
    real = np.array([[True, True, False], [True, False, False]])
    for b, n in np.ndindex(2, 3):
        best = sorted(range(5), key=lambda e, row=p[b, n]: -row[e])[:k]
        gates[b, n, best] = k * p[b, n, best] / p[b, n, best].sum()
        if real[b, n]:
            counted += p[b, n]
            chosen_share[best] += 1
    assert relative_rms(routing.gates, gates) < 1e-6
    want = 5 * (counted / 3 * chosen_share / 3).sum()
    assert float(balance_loss(routing, real=real)) == pytest.approx(want, rel=1e-6)
    assert float(balance_loss(routing, real=np.zeros((2, 3), bool))) == 0
    even = Routing(jnp.full((4, 4), 0.25), jnp.eye(4, dtype=bool))
    assert float(balance_loss(even)) == pytest.approx(1)


def test_router_leaves_its_loss_in_training_alone_and_keeps_float32():
    router = SoftmaxRouter(6, 4, 2, balance_factor=0.5, use_bias=True, rngs=nnx.Rngs(0))
    x = _random(2, 3, 6)
    routing = router(x.astype(jnp.bfloat16))
    assert routing.probabilities.dtype == jnp.float32
    assert float(total_aux_loss(router)) == 0
    routing = router(x, deterministic=False)
    assert float(total_aux_loss(router)) == pytest.approx(0.5 * float(balance_loss(routing)), rel=1e-6)

    def loss(router):
        router(x, deterministic=False)
        return total_aux_loss(router)

    gradient = nnx.grad(loss)(router)
    assert np.abs(gradient["logits"]["kernel"][...]).max() > 0
    assert total_aux_loss(SoftmaxRouter(6, 4, 2, rngs=nnx.Rngs(0))) is None
    with pytest.raises(ValueError, match="k must be"):
        SoftmaxRouter(6, 4, 5, rngs=nnx.Rngs(0))


def test_lists_hold_the_chosen_first_and_in_order():
    scores = np.array([0.1, 0.9, 0.5, 0.9, 0.3], np.float32)
    chosen = np.array([True, False, False, True, True])
    index, real = select_tokens(scores, 4, chosen=chosen)
    np.testing.assert_array_equal(index, [0, 1, 3, 4])
    np.testing.assert_array_equal(real, [True, False, True, True])
    index, real = select_tokens(scores, 2, chosen=chosen)
    np.testing.assert_array_equal(index, [3, 4])
    index, real = select_tokens(np.stack([scores, scores]), 3)
    np.testing.assert_array_equal(index, [[1, 2, 3]] * 2)
    assert real.all()
    with pytest.raises(ValueError, match=r"capacity must be in 1\.\.5"):
        select_tokens(scores, 6)


def test_tokens_go_to_experts_and_back():
    x, scores = _random(2, 7, 3), _random(2, 4, 7, seed=1)
    index, chosen = select_tokens(scores, 3, chosen=scores > 0)

    def there_and_back(x):
        taken = take_tokens(x[:, None], index)
        return add_tokens(taken * jnp.arange(1.0, 5).astype(x.dtype)[:, None, None], index, 7, where=chosen)

    want, slope = np.zeros((2, 7, 3)), np.zeros((2, 7, 3))
    for b, e, place in np.ndindex(*index.shape):
        if chosen[b, e, place]:
            want[b, index[b, e, place]] += (e + 1) * np.float64(x[b, index[b, e, place]])
            slope[b, index[b, e, place]] += e + 1
    assert relative_rms(there_and_back(x), want) < 1e-6
    np.testing.assert_allclose(jax.grad(lambda x: there_and_back(x).sum())(x), slope)
    half = there_and_back(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and relative_rms(half, want) < 1e-2
