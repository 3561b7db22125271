import jax
import jax.numpy as jnp

from attnlab.cli.skeletons.pooling import skeleton


def test_a_query_finds_its_token():
    x = 20 * jnp.eye(6)[None]
    y, weights = skeleton(x, 20 * jnp.eye(6)[2])
    assert jnp.allclose(weights, jax.nn.one_hot(jnp.asarray([2]), 6)) and jnp.allclose(y, x[:, 2])


def test_tokens_that_do_not_exist_are_not_read():
    x = jax.random.normal(jax.random.key(0), (2, 6, 4))
    y, weights = skeleton(x, x[0, 4], jnp.arange(6) < jnp.asarray([[3], [0]]))
    assert (weights[0, 3:] == 0).all() and jnp.allclose(y[0], weights[0] @ x[0], atol=1e-6) and (y[1] == 0).all()
