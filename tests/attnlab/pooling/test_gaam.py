import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.pooling.gaam import GaussianPooling, gaussian_pooling
from tests.accuracy import relative_rms
from tests.attnlab.mixers.test_gaam import by_the_equations


def test_channels_are_averaged_with_the_weights_of_their_head():
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 9, 5)).astype(np.float32)
    offsets, widths = random.standard_normal((2, 3)), np.exp(random.standard_normal((2, 3)))
    mask = np.arange(9) < np.array([[9], [6]])
    y, weights = gaussian_pooling(x, offsets, widths, mask=mask)
    for example, real in ((0, 9), (1, 6)):
        for head, channels in ((0, slice(0, 2)), (1, slice(2, 5))):
            part = x[example : example + 1, :real, channels]
            want = by_the_equations(part, offsets[head : head + 1], widths[head : head + 1], 1e-30)
            assert relative_rms(weights[example : example + 1, :real, channels], want) < 1e-5
            assert relative_rms(y[example, channels], (want * part).sum(1)[0]) < 1e-5
    assert not weights[1, 6:].any()


def test_offsets_far_away_still_sum_to_one():
    x = jax.random.normal(jax.random.key(0), (2, 9, 5))
    offsets, widths = jnp.full((1, 2), 300.0), jnp.full((1, 2), 0.1)
    np.testing.assert_allclose(gaussian_pooling(x, offsets, widths)[1].sum(1), 1, rtol=1e-6)
    equal = jnp.ones((2, 9, 5))
    np.testing.assert_allclose(gaussian_pooling(equal, offsets, widths)[0], 1, rtol=1e-6)


def test_refuses_more_heads_than_channels():
    with pytest.raises(ValueError, match="num_heads"):
        GaussianPooling(4, num_heads=5, rngs=nnx.Rngs(0))
