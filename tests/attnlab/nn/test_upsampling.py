"""Transposed convolutions, pixel shuffle, squeeze-and-excitation, group norm and blur against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.interop.names import resolve
from attnlab.nn.conv import SqueezeExcite
from attnlab.nn.norms import GroupNorm, group_norm
from attnlab.nn.resampling import gaussian_blur
from attnlab.nn.upsampling import ConvTranspose, pixel_shuffle, pixel_unshuffle
from tests.accuracy import relative_rms


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "more"),
    [((2, 2), 2, 0, 0), ((3, 3), 2, 0, 0), ((5, 3), (2, 1), (2, 1), (1, 0)), ((4,), 3, 1, 2), ((1, 1, 2), 1, 0, 0)],
)
def test_transposed_convolution(size, stride, padding, more):
    axes = len(size)
    module = ConvTranspose(3, 2, size, stride=stride, padding=padding, output_padding=more, rngs=nnx.Rngs(0))
    grid = (4, 3, 2)[:axes]
    x, kernel = draw(0, 2, *grid, 3), np.float64(module.kernel[...])
    s, p, o = (np.broadcast_to(value, axes) for value in (stride, padding, more))
    sides = (np.asarray(grid) - 1) * s + size - 2 * p + o
    want = np.zeros((2, *sides, 2))
    for at in np.ndindex(*grid):
        for tap in np.ndindex(*size):
            to = np.asarray(at) * s + tap - p
            if (to >= 0).all() and (to < sides).all():
                want[(slice(None), *to)] += x[(slice(None), *at)] @ kernel[tap]
    want += np.float64(module.bias[...])
    assert relative_rms(module(x), want) < 1e-6
    half = module(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and relative_rms(half, want) < 2e-2
    official = resolve(module, {}).dump()
    assert official["weight"].shape == (3, 2, *size) and official["bias"].shape == (2,)
    np.testing.assert_array_equal(official["weight"][1, 0], module.kernel[..., 1, 0])


def test_transposed_convolution_is_the_gradient_of_one():
    module = ConvTranspose(2, 3, (3, 3), stride=2, padding=1, use_bias=False, rngs=nnx.Rngs(0))
    x, y = draw(0, 1, 3, 4, 2), draw(1, 1, 5, 7, 3)
    kernel = module.kernel[...].swapaxes(2, 3)
    back = jax.lax.conv_general_dilated(y, kernel, (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert float((back * x).sum()) == pytest.approx(float((module(x) * y).sum()), rel=1e-5)
    with pytest.raises(ValueError, match="padding must be below"):
        ConvTranspose(2, 3, (2, 2), padding=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="output_padding must be below the stride"):
        ConvTranspose(2, 3, (2, 2), output_padding=1, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_channels_become_places(axes):
    f, grid = 2, (2, 3, 2)[:axes]
    x = draw(0, 2, *grid, 3 * f**axes)
    y = np.asarray(pixel_shuffle(x, f))
    for at in np.ndindex(*y.shape[1:-1]):
        token, inside = np.asarray(at) // f, np.ravel_multi_index(np.asarray(at) % f, (f,) * axes)
        np.testing.assert_array_equal(y[(slice(None), *at)], x[(slice(None), *token)][:, inside :: f**axes])
    np.testing.assert_array_equal(pixel_unshuffle(y, f), x)
    with pytest.raises(ValueError, match="channels must be a multiple"):
        pixel_shuffle(x[..., :-1], f)
    with pytest.raises(ValueError, match="factor must divide"):
        pixel_unshuffle(x, 5)


def test_squeeze_and_excitation():
    module = SqueezeExcite(4, 3, rngs=nnx.Rngs(0))
    module.fc1.bias[...], module.fc2.bias[...] = draw(1, 3), draw(2, 4)
    x = draw(0, 2, 3, 5, 4)
    hidden = np.maximum(np.float64(x).mean((1, 2)) @ module.fc1.kernel[...] + module.fc1.bias[...], 0)
    gate = 1 / (1 + np.exp(-(hidden @ np.float64(module.fc2.kernel[...]) + module.fc2.bias[...])))
    assert relative_rms(module(x), x * gate[:, None, None]) < 1e-6
    assert module(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    open_ = SqueezeExcite(4, 3, gate=lambda x: jnp.ones_like(x), use_bias=False, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(open_(x), x)


@pytest.mark.parametrize("groups", [1, 2, None])
def test_group_norm(groups):
    x = 3 + draw(0, 2, 3, 5, 4) * np.array([1, 10, 0.1, 1], np.float32)
    module = GroupNorm(4, groups, eps=1e-3, rngs=nnx.Rngs(0))
    module.scale[...], module.bias[...] = draw(1, 4), draw(2, 4)
    count = 4 if groups is None else groups
    split = np.float64(x).reshape(2, 15, count, -1)
    want = (split - split.mean((1, 3), keepdims=True)) / np.sqrt(split.var((1, 3), keepdims=True) + 1e-3)
    want = want.reshape(x.shape) * module.scale[...] + module.bias[...]
    assert relative_rms(module(x), want) < 2e-6
    half = module(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and relative_rms(half, want) < 3e-2
    assert set(resolve(module, {}).names()) == {"weight", "bias"}
    constant = jnp.ones((1, 3, 3, 4))
    gradient = jax.grad(lambda x: (group_norm(x, groups=count) ** 2).sum())(constant)
    assert np.isfinite(gradient).all()
    with pytest.raises(ValueError, match="groups must divide the 4 channels, got 3"):
        GroupNorm(4, 3, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("edge", "mode"), [("reflect", "reflect"), ("repeat", "edge"), ("zero", "constant")])
@pytest.mark.parametrize(("sigma", "radius"), [(0.8, None), (2.0, 9)])
def test_blur(edge, mode, sigma, radius):
    x = draw(0, 2, 5, 7, 3)
    reach = int(np.ceil(3 * sigma)) if radius is None else radius
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    want = np.pad(np.float64(x), [(0, 0), (reach, reach), (reach, reach), (0, 0)], mode=mode)
    for axis in (1, 2):
        want = sum(w * np.take(want, np.arange(x.shape[axis]) + tap, axis) for tap, w in enumerate(weights))
    assert relative_rms(gaussian_blur(x, sigma, radius=radius, edge=edge), want) < 1e-6


def test_blur_of_nothing_and_by_nothing():
    x = draw(0, 1, 1, 4, 2)
    np.testing.assert_array_equal(gaussian_blur(x, 0.0), x)
    assert np.isfinite(gaussian_blur(x, 1.0)).all()
    assert gaussian_blur(jnp.asarray(x, jnp.bfloat16), 1.0).dtype == jnp.bfloat16
    for call, words in (
        (lambda: gaussian_blur(x, -1.0), "at least 0"),
        (lambda: gaussian_blur(x, 1, edge="wrap"), "edge must"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
