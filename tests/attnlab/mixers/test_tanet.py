"""TANet: what its parts see, and that the whole keeps the image where nothing is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.mixers.tanet import HalfInstanceNormBlock, LocalPixelMap, StripGate
from attnlab.models.tanet import TANet


def image(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_pixels_give_a_map_between_0_and_1_that_does_not_follow_the_order_of_channels():
    layer, x = LocalPixelMap(rngs=nnx.Rngs(0)), image(1, 6, 5, 4)
    y = np.asarray(layer(x))
    assert (y > 0).all() and (y < 1).all() and (y == y[..., :1]).all()
    np.testing.assert_allclose(layer(x[..., ::-1]), y, atol=1e-6)


def test_a_strip_reaches_the_whole_image():
    layer, x = StripGate(4, rngs=nnx.Rngs(0)), image(1, 9, 9, 4)
    seen = np.asarray(jax.grad(lambda x: layer(x)[0, 4, 4].sum())(x))[0].any(-1)
    rows = np.arange(9)[:, None] + np.zeros((9, 9), int)
    near = (abs(rows - 4) <= 1) | (abs(rows.T - 4) <= 1)  # a row, a column, and those beside them
    np.testing.assert_array_equal(seen, near)


def test_half_of_the_channels_forget_contrast():
    layer, x = HalfInstanceNormBlock(4, rngs=nnx.Rngs(0)), image(1, 8, 8, 4)
    layer.conv1.bias[...] = jnp.zeros(4)
    layer.conv2.kernel[...] = layer.conv2.kernel[...].at[:, :, 2:].set(0)  # the other half is not read
    np.testing.assert_allclose(layer(7 * x) - 7 * x, layer(x) - x, atol=1e-4)
    with pytest.raises(ValueError, match="even"):
        HalfInstanceNormBlock(3, rngs=nnx.Rngs(0))


def test_sides_of_images_are_multiples_of_four():
    model = TANet(4, depth=1, residual_depth=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="multiples of 4"):
        model(image(1, 6, 8, 3))


@pytest.mark.slow
def test_the_defaults_are_the_authors_widths():
    model = nnx.eval_shape(lambda: TANet(rngs=nnx.Rngs(0)))
    assert [conv.out_features for conv in model.downs] == [64, 128] and len(model.attention) == 10
    # Of the authors' class, without convolutions that stand in it and are never called.
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 9_880_545 - 912_928
