"""Token-aware pooling, and the loss that makes rows of attention different."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.mixers.tap import TokenAwarePooling, pools
from attnlab.objectives.attention_diversification import attention_diversification, mean_similarity


def test_pools_count_the_zeros_around_the_image():
    x = np.random.default_rng(0).standard_normal((1, 5, 6, 2)).astype(np.float32)
    got = pools(x, 3)
    np.testing.assert_array_equal(got[..., 0, :], x)
    for dilation in (1, 2):
        around = np.pad(x, [(0, 0), (dilation, dilation), (dilation, dilation), (0, 0)])
        shifts = [around[:, i * dilation :][:, :5, j * dilation :][:, :, :6] for i in range(3) for j in range(3)]
        np.testing.assert_allclose(got[..., dilation, :], sum(shifts) / 9, atol=1e-6)


def test_one_scale_leaves_tokens_as_they_are():
    x = jax.random.normal(jax.random.key(0), (2, 4, 3, 8))
    np.testing.assert_allclose(TokenAwarePooling(8, num_scales=1, rngs=nnx.Rngs(0))(x), x, atol=1e-6)
    with pytest.raises(ValueError, match="num_scales must be at least 1"):
        TokenAwarePooling(8, num_scales=0, rngs=nnx.Rngs(0))


def test_loss_of_rows_that_are_alike_and_of_rows_that_share_nothing():
    alike = jnp.tile(jnp.asarray([0.9, 0.1, 0, 0]), (1, 2, 4, 1))
    np.testing.assert_allclose(attention_diversification([alike, alike]), 2 / (2 + 1e-6), rtol=1e-6)
    np.testing.assert_allclose(mean_similarity(jnp.eye(4)[None, None], threshold=0.5), 0.5, rtol=1e-6)
    uniform = jnp.full((1, 1, 4, 4), 0.25)
    assert mean_similarity(uniform)[0] == 0 and np.isfinite(jax.grad(lambda a: mean_similarity(a).sum())(uniform)).all()


def test_descent_makes_rows_less_alike():
    noise = jax.random.normal(jax.random.key(1), (1, 2, 8, 8))

    def cosine(logits):
        rows = jax.nn.softmax(logits).mean(1)[0]
        unit = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
        return float((unit @ unit.T)[~np.eye(8, dtype=bool)].mean())

    def loss(logits):
        return attention_diversification([jax.nn.softmax(logits)], threshold=0.5).sum()

    start = noise + 2 * jax.nn.one_hot(2, 8)
    end = jax.jit(lambda z: jax.lax.fori_loop(0, 40, lambda _, z: z - 50 * jax.grad(loss)(z), z))(start)
    assert cosine(end) < 0.5 * cosine(start)
