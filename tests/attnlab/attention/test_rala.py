"""Rank-augmented linear attention: the claim of its paper."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.attention.linear.rala import RankAugmentedLinearAttention
from attnlab.nn.feature_maps import elu1
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.linear import trunc_normal
from pallas_kernels.linear_attention import linear_attention


def rank(tokens):
    values = np.linalg.svd(np.asarray(tokens, np.float64).reshape(256, -1), compute_uv=False)
    return (values > 1e-3 * values[0]).sum()


def test_the_result_is_of_higher_rank_than_that_of_linear_attention():
    """In front of the last map, of 256 tokens and one head of 64 channels, as models start: above 1.5 times."""
    mixer = RankAugmentedLinearAttention(64, num_heads=1, rngs=nnx.Rngs(0))
    redraw_kernels(mixer, trunc_normal, convolutions=True, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 64))
    tokens = x.reshape(1, 256, 64)
    plain = linear_attention(
        elu1(mixer.query(tokens)), elu1(mixer.key(tokens)), mixer.value(tokens), causal=False, normalize=True
    )
    mixer.out.kernel[...] = jnp.eye(64).reshape(1, 64, 64)
    augmented = mixer(x)
    assert rank(augmented) > 1.5 * rank(plain), (rank(augmented), rank(plain))
