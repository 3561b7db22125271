"""Windows, neighbourhoods and depthwise convolutions, against loops over the grid."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.nn import grids
from attnlab.nn.depthwise import DepthwiseConv, depthwise_conv, on_tokens
from pallas_kernels import dispatch


def numbered(*grid, batch=2, channels=3):
    """A grid whose entries tell where they come from."""
    size = batch * int(np.prod(grid)) * channels
    return np.arange(size, dtype=np.float32).reshape(batch, *grid, channels)


CASES = [
    ((6, 8), (3, 4), (0, 0)),
    ((6, 8), (3, 4), (1, 2)),
    ((6, 8), (6, 2), (0, 1)),
    ((4, 6, 8), (2, 3, 4), (1, 0, 3)),
]


@pytest.mark.parametrize("grid, window, shift", [*CASES, ((9,), (3,), (2,))])
def test_windows_hold_neighbours_and_merge_back(grid, window, shift):
    x = numbered(*grid)
    windows = np.asarray(grids.window_partition(x, window, shift=shift))
    counts = [n // w for n, w in zip(grid, window, strict=True)]
    assert windows.shape == (2, np.prod(counts), np.prod(window), 3)
    for w, place in enumerate(np.ndindex(*counts)):
        for p, inner in enumerate(np.ndindex(*window)):
            where = [(c * k + i + s) % n for c, k, i, s, n in zip(place, window, inner, shift, grid, strict=True)]
            np.testing.assert_array_equal(windows[:, w, p], x[(slice(None), *where)])
    np.testing.assert_array_equal(grids.window_merge(windows, window, grid, shift=shift), x)


@pytest.mark.parametrize("grid, size", [((6, 8), (3, 4)), ((4, 6, 8), (2, 3, 2))])
def test_dilated_groups_stand_over_the_whole_grid(grid, size):
    x = numbered(*grid)
    groups = np.asarray(grids.dilated_partition(x, size))
    steps = [n // s for n, s in zip(grid, size, strict=True)]
    for g, first in enumerate(np.ndindex(*steps)):
        for p, inner in enumerate(np.ndindex(*size)):
            where = [i * step + f for i, step, f in zip(inner, steps, first, strict=True)]
            np.testing.assert_array_equal(groups[:, g, p], x[(slice(None), *where)])
    np.testing.assert_array_equal(grids.dilated_merge(groups, size, grid), x)


@pytest.mark.parametrize("grid, window, shift", CASES)
def test_shift_mask_joins_true_neighbours_only(grid, window, shift):
    mask = grids.shift_mask(grid, window, shift)
    coordinates = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1)
    where = np.asarray(grids.window_partition(coordinates[None], window, shift=shift))[0]
    for w in range(len(where)):
        apart = abs(where[w][:, None] - where[w][None])
        np.testing.assert_array_equal(mask[w], (apart < np.array(window)).all(-1))


def test_padding_and_cropping():
    x = numbered(5, 6)
    padded, real = grids.pad_to_multiple(x, (4, 3))
    assert padded.shape == (2, 8, 6, 3) and real.shape == (8, 6)
    assert real[:5].all() and not real[5:].any() and not np.asarray(padded[:, 5:]).any()
    np.testing.assert_array_equal(grids.crop(padded, (5, 6)), x)
    same, none = grids.pad_to_multiple(x, (5, 2))
    assert none is None and same.shape == x.shape
    np.testing.assert_array_equal(grids.to_grid(grids.to_tokens(x), (5, 6)), x)


@pytest.mark.parametrize("size, stride, dilation, padding", [*itertools.product([2, 3], [1, 2], [1, 2], [0, 1])])
def test_unfold_takes_patches(size, stride, dilation, padding):
    x = numbered(6, 7)
    options = {"stride": stride, "dilation": dilation, "padding": padding}
    patches = np.asarray(grids.unfold(x, size, **options, fill=-1))
    index = grids.unfold_index((6, 7), size, **options)
    padded = np.pad(x, [(0, 0), (padding,) * 2, (padding,) * 2, (0, 0)], constant_values=-1)
    assert patches.shape[1:3] == tuple((n - dilation * (size - 1) - 1) // stride + 1 for n in padded.shape[1:3])
    for i, j in np.ndindex(*patches.shape[1:3]):
        taps = [slice(s * stride, s * stride + dilation * (size - 1) + 1, dilation) for s in (i, j)]
        np.testing.assert_array_equal(patches[:, i, j], padded[:, taps[0], taps[1]].reshape(2, -1, 3))
    inside = grids.unfold_mask((6, 7), size, **options)
    np.testing.assert_array_equal(inside, index >= 0)
    np.testing.assert_array_equal(
        patches[inside[None].repeat(2, 0)], x.reshape(2, -1, 3)[:, index[inside]].reshape(-1, 3)
    )
    assert (patches[:, ~inside] == -1).all()


def test_halo_windows_are_unfolded():
    x = numbered(6, 6)
    halo = grids.unfold(x, 3 + 2, stride=3, padding=1)
    assert halo.shape == (2, 2, 2, 25, 3)
    inner = np.asarray(halo).reshape(2, 2, 2, 5, 5, 3)[:, :, :, 1:4, 1:4].reshape(2, 4, 9, 3)
    np.testing.assert_array_equal(inner, grids.window_partition(x, 3))


@pytest.mark.parametrize("size", [(3, 3), (5, 1)])
def test_depthwise_convolution_is_a_sum_over_the_patch(size):
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.normal(size=(2, 5, 6, 3)), rng.normal(size=(2, *size, 3)), rng.normal(size=(2, 3))
    patches = np.asarray(grids.unfold(x.astype(np.float32), size, padding=[s // 2 for s in size]), np.float64)
    expected = np.einsum("bhwkc,bkc->bhwc", patches, kernel.reshape(2, -1, 3))
    own = depthwise_conv(x.astype(np.float32), kernel, bias)
    np.testing.assert_allclose(own, expected + bias[:, None, None], atol=1e-5)
    shared = depthwise_conv(x.astype(np.float32), kernel[0], bias[0])
    np.testing.assert_allclose(shared[0], own[0], atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "kernel_shape", "channel_axes"),
    [
        ((2, 5, 3), (3, 3), 1),
        ((2, 4, 5, 3), (3, 5, 3), 1),
        ((3, 2, 3, 2, 2), (3, 3, 3, 2, 2), 2),
        ((1, 1, 2), (7, 2), 1),
    ],
)
def test_the_backward_pass_by_hand_is_the_derivative(shape, kernel_shape, channel_axes):
    """Of every rank, for one kernel and for one of each example; of the second order, and as forward mode has it."""
    rng = np.random.default_rng(0)
    x, kernel, dx, dkernel = (rng.normal(size=s).astype(np.float32) for s in (shape, kernel_shape, shape, kernel_shape))

    def loss(x, kernel):
        return jnp.sum(jnp.sin(depthwise_conv(x, kernel, channel_axes=channel_axes)))

    def along(x, kernel):
        by_x, by_kernel = jax.grad(loss, (0, 1))(x, kernel)
        return jnp.vdot(by_x, dx) + jnp.vdot(by_kernel, dkernel)

    def everything(x, kernel):
        return jax.grad(loss, (0, 1))(x, kernel), jax.grad(along, (0, 1))(x, kernel)

    by_hand = jax.jit(everything)(x, kernel)
    assert "custom_vjp" in str(jax.make_jaxpr(loss)(x, kernel))
    with dispatch.forward_mode():
        plain = jax.jit(lambda *a: everything(*a))(x, kernel)
        assert "custom_vjp" not in str(jax.make_jaxpr(lambda *a: loss(*a))(x, kernel))
        _, change = jax.jvp(lambda *a: loss(*a), (x, kernel), (dx, dkernel))
    for got, want in zip(jax.tree.leaves(by_hand), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(change, jnp.vdot(by_hand[0][0], dx) + jnp.vdot(by_hand[0][1], dkernel), rtol=1e-4)


def test_depthwise_module_equals_a_grouped_convolution_with_gradients():
    module = DepthwiseConv((2, 4), (3, 5), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 2, 4))
    weights = jax.random.normal(jax.random.key(1), x.shape)

    def grouped(x, kernel, bias):
        image, kernel = x.reshape(2, 6, 7, 8), kernel.reshape(3, 5, 1, 8)
        options = {"padding": [(1, 1), (2, 2)], "dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 8}
        y = jax.lax.conv_general_dilated(image, kernel, (1, 1), **options).reshape(x.shape)
        return jnp.sum((y + bias) * weights), y + bias

    def own(x, kernel, bias):
        y = depthwise_conv(x, kernel, bias, channel_axes=2)
        return jnp.sum(y * weights), y

    arguments = (x, module.kernel[...], module.bias[...])
    (_, want), gradients = jax.value_and_grad(grouped, (0, 1, 2), has_aux=True)(*arguments)
    (_, got), again = jax.value_and_grad(own, (0, 1, 2), has_aux=True)(*arguments)
    for one, other in zip((got, module(x), *again), (want, want, *gradients), strict=True):
        assert np.sqrt(np.mean((one - other) ** 2) / np.mean(other**2)) < 4e-7
    tokens = jnp.concatenate([jnp.ones((2, 3, 2, 4)), x.reshape(2, 42, 2, 4)], 1)
    np.testing.assert_allclose(on_tokens(module, tokens, (6, 7))[:, 3:], want.reshape(2, 42, 2, 4), atol=1e-6)
    assert not on_tokens(module, tokens, (6, 7))[:, :3].any()


def test_windows_trace_and_differentiate():
    x = numbered(4, 4)
    sums = jax.jit(jax.grad(lambda x: (grids.window_partition(x, 2, shift=1) ** 2).sum()))(x)
    np.testing.assert_array_equal(sums, 2 * x)
    counts = jax.grad(lambda x: grids.unfold(x, 3, padding=1).sum())(numbered(3, 3, batch=1, channels=1))
    np.testing.assert_array_equal(counts[0, :, :, 0], [[4, 6, 4], [6, 9, 6], [4, 6, 4]])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: grids.window_partition(x, 4), r"window \(4, 4\) does not divide the grid \(5, 6\)"),
        (lambda x: grids.window_partition(x, (5, 6, 1)), "window must be an int or 2 ints"),
        (lambda x: grids.dilated_partition(x, 4), "size"),
        (lambda x: grids.unfold(x, 7), "exceeds the grid"),
        (lambda x: grids.to_grid(grids.to_tokens(x), (5, 5)), "holds 25 tokens, got 30"),
        (lambda x: depthwise_conv(x, np.ones((2, 2, 3))), "odd sides"),
        (lambda x: depthwise_conv(x, np.ones((3, 3))), "kernel must be"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(numbered(5, 6))
