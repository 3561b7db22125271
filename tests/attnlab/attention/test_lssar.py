"""Softplus attention: the equations for any mask, what a large power needs, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.dense.lssar import SoftplusAttention, softplus_attention
from tests.accuracy import relative_rms

POSITIVE = {
    "softplus": lambda z: np.log1p(np.exp(z)),
    "exp": np.exp,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "relu": lambda z: np.maximum(z, 0),
}


def expected(q, k, v, visible, power, positive="softplus", eps=1e-8):
    """In float64, a row at a time."""
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q.astype(np.float64), k.astype(np.float64)))
    y = np.zeros((*q.shape[:-1], v.shape[-1]))
    for b, n, h in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(visible[b, n])
        count = len(seen)
        if not count:
            continue
        a = POSITIVE[positive](np.log(q.shape[-1]) * np.log(count) * (k[b, seen, h] @ q[b, n, h]))
        a /= a.sum() + eps
        w = np.maximum(count * a - (count > 3), 0) ** power
        y[b, n, h] = w @ v[b, seen, h] / (w.sum() + eps)
    return y


@pytest.mark.parametrize("positive", POSITIVE)
def test_equations_with_the_number_of_visible_keys(positive):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 9, 2, size)).astype(np.float32) for size in (6, 6, 5))
    visible = rng.random((2, 9, 9)) < 0.7
    visible[0, 4] = False
    visible[1, 5] = np.arange(9) == 2  # a single key has the whole weight
    y, weights = softplus_attention(q, k, v, mask=visible[:, None], causal=False, power=2.5, positive=positive)
    assert relative_rms(y, expected(q, k, v, visible, 2.5, positive)) < 1e-5
    assert not weights[0, :, 4].any() and np.allclose(weights[1, :, 5, 2], positive != "relu")  # ln 1 = 0


def test_a_row_of_one_key_in_many_stays_finite():
    """400^15 is beyond float32; the weights and their gradients are not."""
    q = k = np.concatenate([np.eye(64, dtype=np.float32)[:1], np.tile(-np.eye(64, dtype=np.float32)[:1], (399, 1))])
    q, k, v = q[None, :1, None], k[None, :, None], np.arange(400, dtype=np.float32)[None, :, None, None]
    _, weights = softplus_attention(q, k, v, causal=False)
    np.testing.assert_allclose(weights[0, 0, 0, 0], 1, rtol=1e-6)
    gradients = jax.grad(lambda *a: softplus_attention(*a, causal=False)[0].sum(), (0, 1, 2))(q, k, v)
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)


def test_refusals():
    for options in ({"positive": "tanh"}, {"power": 0.5}, {"free_keys": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SoftplusAttention(8, num_heads=2, **options, rngs=nnx.Rngs(0))
