import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.cli.skeletons.intervention import Skeleton
from attnlab.models.vit import ViT
from attnlab.points import attach


def test_a_factor_of_1_changes_nothing_and_another_does():
    model = ViT((8, 8), 3, patch_size=4, features=8, depth=1, num_heads=2, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    logits = model(images)
    assert jnp.allclose(attach(model, Skeleton(1.0))(images), logits, atol=1e-6)
    assert not jnp.allclose(attach(model, Skeleton(jnp.asarray([1.0, 0.5])))(images), logits, atol=1e-4)
