import jax
import jax.numpy as jnp

from attnlab.cli.skeletons.mixer import skeleton


def test_mean_of_the_tokens_that_exist():
    values = jax.random.normal(jax.random.key(0), (2, 5, 2, 4))
    mask = jnp.arange(5) < jnp.asarray([[3], [0]])
    y = skeleton(values, mask)
    assert jnp.allclose(y[0, 0], values[0, :3].mean(0), atol=1e-6) and (y[1] == 0).all()
    assert jnp.allclose(skeleton(values)[:, 0], values.mean(1), atol=1e-6)
