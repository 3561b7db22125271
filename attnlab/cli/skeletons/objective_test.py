import jax.numpy as jnp

from attnlab.cli.skeletons.objective import skeleton


def test_weighted_mean_of_squared_errors():
    prediction, target = jnp.ones((2, 2, 3)), jnp.zeros((2, 2, 3)).at[0, 1].set(3)
    assert jnp.allclose(skeleton(prediction, target), jnp.asarray([7.5, 3.0]))
    weight = jnp.asarray([[1.0, 0.0], [0.0, 0.0]])
    assert jnp.allclose(skeleton(prediction, target, weight=weight), jnp.asarray([3.0, 0.0]))
