import jax.numpy as jnp

from attnlab.cli.skeletons.analysis import skeleton


def test_entropy_of_even_and_of_certain_attention():
    attention = jnp.stack([jnp.full((4, 4), 0.25), jnp.eye(4)])[None]
    assert jnp.allclose(skeleton(attention).entropy, jnp.asarray([[jnp.log(4.0), 0.0]]))
