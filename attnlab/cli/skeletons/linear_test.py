import jax.numpy as jnp

from attnlab.cli.skeletons.linear import skeleton


def test_features_are_positive_and_nearly_linear_above():
    y = skeleton(jnp.asarray([-20.0, 0.0, 20.0]))
    assert (y > 0).all() and jnp.allclose(y[1:], jnp.asarray([jnp.log(2.0), 20.0]))
