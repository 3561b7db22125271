import jax.numpy as jnp

from attnlab.cli.skeletons.function import skeleton


def test_values_come_nearer_to_zero():
    y = skeleton(jnp.asarray([-2.0, -0.1, 0.0, 0.4, 1.0]), threshold=0.4)
    assert jnp.allclose(y, jnp.asarray([-1.6, 0.0, 0.0, 0.0, 0.6]))
