"""Convolutions with a norm, patches, and the merging of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.nn.activations import gelu
from attnlab.nn.chain import Chain
from attnlab.nn.conv import ConvNorm, ConvStem, PatchEmbed, PatchMerging, folded
from attnlab.nn.mlp import MLP
from attnlab.nn.norms import BatchNorm, LayerNorm


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("grid, patch", [((4, 6), 2), ((4, 6), (2, 3)), ((2, 4, 6), (1, 2, 3))])
def test_patches_are_mapped_linearly(grid, patch):
    embed = PatchEmbed(3, 5, patch, rngs=nnx.Rngs(0))
    x = draw(0, 2, *grid, 3)
    kernel, bias = np.asarray(embed.conv.kernel[...]), np.asarray(embed.conv.bias[...])
    sides = kernel.shape[: len(grid)]
    y = np.asarray(embed(x))
    assert y.shape == (2, *(n // s for n, s in zip(grid, sides, strict=True)), 5)
    last = x[(slice(None), *(slice(-s, None) for s in sides))]
    expected = last.reshape(2, -1) @ kernel.reshape(-1, 5) + bias
    np.testing.assert_allclose(y[(slice(None), *[-1] * len(grid))], expected, atol=1e-6)
    with pytest.raises(ValueError, match="multiples of"):
        embed(x[:, :, :-1])


def test_a_norm_stands_in_front_of_the_convolution_or_behind_it():
    x = draw(1, 2, 5, 6, 3)
    behind = ConvNorm(3, 4, 3, stride=2, activation=jax.nn.relu, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(behind(x), jax.nn.relu(behind.norm(behind.conv(x))))
    front = ConvNorm(3, 4, 2, stride=2, padding="SAME", norm_first=True, rngs=nnx.Rngs(0))
    padded = jnp.pad(front.norm(x), ((0, 0), (0, 1), (0, 0), (0, 0)))
    np.testing.assert_allclose(front(x), front.conv(padded), atol=1e-6)


def test_parts_of_a_chain_are_told_whether_this_is_training():
    x = draw(2, 4, 4, 4, 3)
    chain = Chain(ConvNorm(3, 4, 3, rngs=nnx.Rngs(0)), ConvNorm(4, 4, 3, norm=BatchNorm, rngs=nnx.Rngs(0)))
    trained = chain(x, deterministic=False)
    np.testing.assert_allclose(trained.mean((0, 1, 2)), 0, atol=1e-5)
    assert not np.allclose(trained, chain(x), atol=1e-2)


def test_merging_puts_four_tokens_side_by_side():
    merging = PatchMerging(2, norm=lambda features, **_: lambda x: x, rngs=nnx.Rngs(0))
    x = draw(3, 1, 4, 2, 2)
    tokens = np.concatenate([x[0, 2, 0], x[0, 3, 0], x[0, 2, 1], x[0, 3, 1]])
    np.testing.assert_allclose(merging(x)[0, 1, 0], tokens @ merging.reduction.kernel[...], atol=1e-6)
    with pytest.raises(ValueError, match="even sides"):
        merging(x[:, :3])


def test_a_feed_forward_of_images_has_a_convolution_of_its_hidden_channels():
    mlp, x = MLP(3, 5, depthwise=3, rngs=nnx.Rngs(0)), draw(4, 2, 4, 4, 3)
    np.testing.assert_allclose(mlp(x), mlp.fc2(mlp.activation(mlp.conv(mlp.fc1(x)))), atol=1e-6)
    alone = mlp.conv(jnp.zeros((1, 4, 4, 5)).at[0, 1, 1, 2].set(1.0)) - mlp.conv.bias[...]
    assert not alone[..., :2].any() and not alone[..., 3:].any() and alone[0, :3, :3, 2].all()


def test_sides_are_filled_up_behind_the_norm():
    x = draw(2, 2, 5, 7, 3) + 2
    front = ConvNorm(3, 4, 2, stride=2, padding="VALID", norm_first=True, filled=True, rngs=nnx.Rngs(0))
    want = front.conv(jnp.pad(front.norm(x), ((0, 0), (0, 1), (0, 1), (0, 0))))
    np.testing.assert_allclose(front(x), want, atol=1e-6)
    assert front(x).shape == (2, 3, 4, 4)


def unit(**options):
    """One whose statistics and factors are none of the usual."""
    made = ConvNorm(6, 6, 3, norm=BatchNorm, rngs=nnx.Rngs(0), **options)
    for seed, variable in enumerate((made.norm.mean, made.norm.var, made.norm.scale, made.norm.bias)):
        variable[...] = jnp.abs(draw(seed, 6)) + 0.5
    return made


@pytest.mark.parametrize("options", [{}, {"groups": 6}, {"groups": 2, "stride": 2}, {"use_bias": False, "dilation": 2}])
def test_a_batch_norm_behind_a_convolution_is_made_part_of_it(options):
    chain, x = Chain(unit(**options), unit(norm_first=True)), draw(5, 2, 7, 6, 6)
    plain = folded(chain)
    np.testing.assert_allclose(plain(x), chain(x), atol=1e-5)
    assert plain.parts[0].norm is None and chain.parts[0].norm is not None
    assert plain.parts[1].norm is not None, "zeros around a map are not shifted by a norm in front"


@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2)])
def test_a_kernel_for_each_channel(stride, dilation):
    conv, x = (
        ConvNorm(3, 3, 3, norm=None, groups=3, stride=stride, dilation=dilation, rngs=nnx.Rngs(0)),
        draw(6, 1, 8, 9, 3),
    )
    y, kernel = conv(x), np.asarray(conv.conv.kernel[...]).reshape(3, 3, 3)
    assert y.shape == (1, -(-8 // stride), -(-9 // stride), 3)
    taps = x[0, 4 - dilation : 5 + dilation : dilation, 4 - dilation : 5 + dilation : dilation]
    at = 4 // stride
    np.testing.assert_allclose(y[0, at, at], (taps * kernel).sum((0, 1)) + conv.conv.bias[...], atol=1e-6)


def test_a_stem_is_a_row_of_convolutions():
    stem = ConvStem(
        3, (4, 4, 6), strides=(2, 1, 2), kernel_size=(7, 3, 3), use_bias=(False, True, True), rngs=nnx.Rngs(0)
    )
    x = draw(7, 2, 8, 12, 3)
    y = x
    for part, activation in zip(stem.parts, (gelu, gelu, lambda x: x), strict=True):
        y = activation(part.norm(part.conv(y), deterministic=True))
    np.testing.assert_allclose(stem(x), y, atol=1e-6)
    assert y.shape == (2, 2, 3, 6) and stem.parts[0].conv.bias is None and stem.parts[1].conv.bias is not None
    with pytest.raises(ValueError, match="stride must have one entry for each of 3"):
        ConvStem(3, (4, 4, 6), strides=(2, 2), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("places", [("sum",), ("map",), ("map", "conv"), ()])
def test_where_the_activation_of_a_feed_forward_with_a_convolution_stands(places, residual):
    mlp = MLP(3, 5, depthwise=3, residual=residual, activation_at=places, norm=LayerNorm, rngs=nnx.Rngs(0))
    x = 3 * draw(8, 2, 4, 4, 3)
    place = {name: gelu if name in places else lambda x: x for name in ("map", "conv", "sum")}
    hidden = place["map"](mlp.fc1(x))
    local = place["conv"](mlp.conv(hidden))
    expected = mlp.fc2(mlp.norm(place["sum"](hidden + local if residual else local)))
    np.testing.assert_allclose(mlp(x), expected, atol=1e-6)


def test_a_feed_forward_takes_any_module_for_its_convolution():
    mlp = MLP(
        3, 5, depthwise=lambda hidden, **_: Chain(ConvNorm(hidden, hidden, 3, rngs=nnx.Rngs(1))), rngs=nnx.Rngs(0)
    )
    assert mlp(draw(9, 1, 3, 3, 3)).shape == (1, 3, 3, 3)
    with pytest.raises(ValueError, match="activation_at must be some of"):
        MLP(3, depthwise=3, activation_at=("before",), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="there is none"):
        MLP(3, residual=True, rngs=nnx.Rngs(0))
