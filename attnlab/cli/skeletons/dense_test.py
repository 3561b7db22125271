import jax
import jax.numpy as jnp

from attnlab.cli.skeletons.dense import skeleton


def test_queries_are_scaled_for_each_head():
    q = jax.random.normal(jax.random.key(0), (2, 5, 2, 4))
    y = skeleton(q, jnp.log(jnp.asarray([1.0, 3.0])))
    assert jnp.allclose(y[:, :, 0], q[:, :, 0]) and jnp.allclose(y[:, :, 1], 3 * q[:, :, 1])
