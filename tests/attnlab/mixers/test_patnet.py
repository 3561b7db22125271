"""PATNet: what is convolved, gated and attended, the buckets of distances, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.mixers.patnet import (
    DistanceBiasAttention,
    GaussianChannelGate,
    PartialChannelAttention,
    PartialConv,
    PartialSpatialAttention,
)
from attnlab.models.patnet import PATNet
from attnlab.nn.positions import euclidean_buckets
from attnlab.nn.softmax import softmax_attention
from tests.accuracy import relative_rms


def image(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_buckets_are_rounded_distances_near_and_logarithms_far():
    near = euclidean_buckets((4, 5), 20).reshape(4, 5, 4, 5)
    assert near[0, 0, 0, 0] == 40 and near[0, 0, 3, 4] == 45 and near[0, 0, 1, 1] == 41 and near.max() == 45
    far = euclidean_buckets((1, 200), 2.5)[0] - 5
    np.testing.assert_array_equal(far[:3], [0, 1, 2])
    assert far.max() == 5 and (np.diff(far) >= 0).all() and far[100:].min() == 5
    assert euclidean_buckets((1, 40), 1.9)[0].max() == 3 + 3, "the bound 3.8 is cut to 3, and so is the shift"


def test_the_gate_is_that_of_mean_and_deviation():
    gate, x = GaussianChannelGate(3, rngs=nnx.Rngs(0)), image(2, 4, 5, 3)
    moments = np.concatenate([np.asarray(x).mean((1, 2)), np.asarray(x).reshape(2, -1, 3).std(1, ddof=1)], -1)
    z = moments @ np.asarray(gate.mix.kernel[...]) / np.sqrt(1 + 1e-5)
    want = x * (np.clip(z + 3, 0, 6) / 6)[:, None, None]
    assert relative_rms(gate(x), want) < 1e-6
    alone = jax.grad(lambda x: gate(x).sum())(image(1, 1, 1, 3))
    assert np.isfinite(alone).all()


def test_each_kind_leaves_the_other_channels_to_the_convolution():
    x = image(1, 5, 6, 8)
    plain, channel = PartialConv(8, rngs=nnx.Rngs(0)), PartialChannelAttention(8, rngs=nnx.Rngs(0))
    channel.conv = nnx.clone(plain.conv)
    np.testing.assert_array_equal(plain(x)[..., 2:], x[..., 2:])
    np.testing.assert_array_equal(plain(x)[..., :2], channel(x)[..., :2])
    spatial = PartialSpatialAttention(5, rngs=nnx.Rngs(0))
    assert spatial.gated == 3 and spatial.map.kernel.shape == (2, 2)


def test_the_bias_of_a_distance_is_that_of_its_bucket():
    layer, x = DistanceBiasAttention(8, num_heads=2, ratio=2, rngs=nnx.Rngs(0)), image(1, 3, 4, 8)
    layer.bias[...] = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9)), jnp.float32)
    bias = layer.bias[...][:, euclidean_buckets((3, 4), 2)]
    tokens = x.reshape(1, 12, 8)
    y = layer.out(softmax_attention(layer.query(tokens), layer.key(tokens), layer.value(tokens), bias=bias[None]))
    assert relative_rms(layer(x), y.reshape(x.shape)) < 1e-6


def test_refusals():
    with pytest.raises(ValueError, match="leave some of 3 channels"):
        PartialConv(3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="leave some of 4 channels"):
        PartialSpatialAttention(4, partial=1.0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="kinds must have one entry"):
        PATNet(kinds=("self",), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="activation must be one of relu, gelu"):
        PATNet(activation="silu", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="ratio positive"):
        euclidean_buckets((2, 2), 0)


def test_the_defaults_are_those_of_t2():
    model = nnx.eval_shape(lambda: PATNet(rngs=nnx.Rngs(0)))
    assert [block.mixer.features for block in model.blocks] == [64] * 2 + [128] * 2 + [256] * 6 + [512] * 4
    assert model.blocks[-1].mixer.attend.num_heads == 4 and not model.blocks[-1].one_residual
    # Of the authors' class under their configuration of T2.
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 12_269_816
