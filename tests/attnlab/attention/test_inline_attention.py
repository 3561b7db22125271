import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import UnsupportedArgument
from attnlab.attention.linear.inline_attention import InlineAttention, inline_attention, inline_scores


@pytest.fixture
def qkv():
    return [jax.random.normal(key, (2, 30, 2, 8)) for key in jax.random.split(jax.random.key(0), 3)]


def divided(q, k, v):
    """Linear attention normalised by division."""
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k)
    return jnp.einsum("bhnm,bmhe->bnhe", scores / scores.sum(-1, keepdims=True), v)


def test_subtraction_tells_scaled_queries_apart_and_division_does_not(qkv):
    q, k, v = (jnp.abs(a) for a in qkv)  # what ReLU gives, kept off zero
    k = k + 0.1
    assert jnp.abs(divided(3 * q, k, v) - divided(q, k, v)).max() < 1e-6
    assert jnp.abs(inline_attention(3 * q, k, v) - inline_attention(q, k, v)).max() > 1e-2


def test_scores_sum_to_one_and_give_the_output(qkv):
    q, k, v = qkv
    scores = inline_scores(q, k)
    assert jnp.abs(scores.sum(-1) - 1).max() < 1e-6
    assert scores.min() < 0
    np.testing.assert_allclose(inline_attention(q, k, v), jnp.einsum("bhnm,bmhe->bnhe", scores, v), atol=1e-6)


def test_keys_shifted_by_a_constant_change_nothing(qkv):
    q, k, v = qkv
    np.testing.assert_allclose(inline_attention(q, k + 5, v), inline_attention(q, k, v), atol=1e-5)


def test_refuses(qkv):
    q, k, v = qkv
    with pytest.raises(ValueError, match="as many keys as queries"):
        inline_attention(q[:, :7], k, v)
    build = lambda **options: InlineAttention(8, **({"num_heads": 2, "rngs": nnx.Rngs(0)} | options))  # noqa: E731
    with pytest.raises(ValueError, match="feature_map must be one of identity, relu, leaky_relu, exp, got 'elu'"):
        build(feature_map="elu", grid=(4, 4))
    with pytest.raises(ValueError, match="needs the grid"):
        build()
    with pytest.raises(UnsupportedArgument, match="no windows with tokens in front"):
        build(prefix=1, grid=(4, 4), window=2)
    with pytest.raises(ValueError, match="without a window"):
        build(shift=1, grid=(4, 4))
    with pytest.raises(ValueError, match=r"windows of \(4, 4\)|does not divide|do not tile"):
        build(window=4)(jnp.ones((1, 6, 6, 8)))
