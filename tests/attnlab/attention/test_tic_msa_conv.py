"""MSA-Conv: what stands beyond the map counts, windows are local, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.local.tic_msa_conv import MSAConv, directional_shift, msa_conv
from attnlab.nn.grids import unfold
from tests.accuracy import relative_rms


def test_it_is_softmax_over_the_unfolded_map_with_its_zeros():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 6, 1, 4)).astype(np.float32)
    options = {"size": (3, 5), "dilation": (2, 1), "padding": (2, 2)}
    keys, values = (unfold(part[..., 0, :], **options) for part in (k, v))
    scores = jnp.einsum("byxc,byxtc->byxt", q[..., 0, :], keys)
    want = jnp.einsum("byxt,byxtc->byxc", jax.nn.softmax(scores), values)
    sums = msa_conv(q, k, v, kernel_size=(3, 5), dilation=(2, 1))
    assert relative_rms(sums.scores[..., 0, :], scores) < 1e-6 and relative_rms(sums.y[..., 0, :], want) < 1e-6
    assert not sums.scores[0, 0, 0, 0, 0], "a tap beyond the map has the score 0"


def test_a_token_sees_its_window_and_the_convolution_behind_it_alone():
    layer = MSAConv(4, 4, 3, dilation=2, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 11, 11, 4)), jnp.float32)
    seen = np.asarray(jax.grad(lambda x: layer(x)[0, 5, 5].sum())(x))[0].any(-1)
    assert seen[2:9, 2:9].any() and not seen[:2].any() and not seen[9:].any() and not seen[:, :2].any()


def test_directions():
    x = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    y = directional_shift(x, 1)
    np.testing.assert_array_equal(y[..., 0], x[..., 0])
    np.testing.assert_array_equal(y[..., 1], np.roll(x[..., 1], 1, 1))
    np.testing.assert_array_equal(y[..., 4], np.roll(x[..., 4], -1, 2))


def test_refusals():
    with pytest.raises(ValueError, match="odd"):
        MSAConv(4, 4, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="divide"):
        MSAConv(4, 4, num_heads=3, rngs=nnx.Rngs(0))
