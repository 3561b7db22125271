import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.cli.skeletons.module import Skeleton


def test_a_stream_without_tokens_moves_nothing():
    a, b = jax.random.normal(jax.random.key(0), (2, 5, 8)), jax.random.normal(jax.random.key(1), (2, 3, 8))
    moved, other = Skeleton(8, rngs=nnx.Rngs(0))(a, b, masks=(None, jnp.zeros((2, 3), bool)))
    assert (moved == a).all() and (other != b).any()
