"""Feed-forwards, stochastic depth and layer scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from attnlab.nn.mlp import MLP, DropPath, GatedMLP, LayerScale


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weights(linear):
    bias = 0 if linear.bias is None else np.asarray(linear.bias[...], np.float64)
    return np.asarray(linear.kernel[...], np.float64), bias


def test_mlp_is_two_maps_and_an_exact_gelu():
    mlp = MLP(4, 6, out_features=3, rngs=nnx.Rngs(0))
    mlp.fc1.kernel[...] = 2 * draw(1, 4, 6)
    mlp.fc1.bias[...] = draw(2, 6)
    x = draw(0, 2, 5, 4)
    (w1, b1), (w2, b2) = weights(mlp.fc1), weights(mlp.fc2)
    hidden = x @ w1 + b1
    np.testing.assert_allclose(mlp(x), (hidden * (1 + erf(hidden / np.sqrt(2))) / 2) @ w2 + b2, atol=1e-6)
    assert MLP(4, rngs=nnx.Rngs(0)).fc1.kernel.shape == (4, 16)
    assert mlp.fc1.kernel.get_metadata()["logical_axes"] == ("embed", "mlp")


def test_gated_mlp_is_swiglu():
    mlp = GatedMLP(6, rngs=nnx.Rngs(0))
    x = draw(0, 2, 5, 6)
    (gate, _), (up, _), (down, _) = weights(mlp.gate), weights(mlp.up), weights(mlp.down)
    assert gate.shape == (6, 16)
    z = x @ gate
    np.testing.assert_allclose(mlp(x), (z / (1 + np.exp(-z)) * (x @ up)) @ down, atol=1e-6)
    assert mlp(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", [MLP, GatedMLP])
def test_dropout_acts_in_training_only(kind):
    mlp = kind(4, dropout=0.5, rngs=nnx.Rngs(0, dropout=1))
    x = draw(0, 2, 5, 4)
    np.testing.assert_array_equal(mlp(x), mlp(x))
    assert not np.array_equal(mlp(x, deterministic=False), mlp(x, deterministic=False))


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    drop = DropPath(0.25, rngs=nnx.Rngs(dropout=0))
    x = np.ones((4000, 2, 3), np.float32)
    y = np.asarray(drop(x, deterministic=False))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], y.shape))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(y.mean() - 1) < 0.04
    np.testing.assert_array_equal(drop(x), x)
    again = nnx.jit(lambda drop: drop(x, deterministic=False))
    assert not np.array_equal(again(drop), again(drop))
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match="rate must be"):
            DropPath(rate, rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(DropPath(0.0, rngs=nnx.Rngs(0))))


def test_layer_scale_multiplies_channels():
    scale = LayerScale(3, init=0.1, rngs=nnx.Rngs(0))
    scale.scale[...] = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(scale(np.ones((2, 3), np.float32)), [[1, 2, 3]] * 2)
    assert scale(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16
