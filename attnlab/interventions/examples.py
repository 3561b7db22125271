"""Small models that the registered interventions are shown on; imported only where an example is made."""

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.models.language_model import LanguageModel
from attnlab.models.vit import ViT


def small_vit() -> tuple[jax.Array, ViT]:
    """Two images `(2, 8, 8, 3)` and a ViT of two layers with two heads on 4 x 4 patches."""
    model = ViT((8, 8), 5, patch_size=2, features=8, depth=2, num_heads=2, rngs=nnx.Rngs(0))
    return jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), model


def small_language_model() -> tuple[jax.Array, LanguageModel]:
    """Token ids `(2, 7)` and a language model of two layers with two heads."""
    model = LanguageModel(11, features=8, depth=2, num_heads=2, rngs=nnx.Rngs(0))
    return jnp.arange(14).reshape(2, 7) % 11, model
