"""Pooling and resizing against numbers of PyTorch 2.13.

x is `torch.arange(15.).reshape(1, 1, 3, 5) ** 2` in float64, and each expected array is what the call of
`torch.nn.functional` in its comment gave, rounded to 8 places.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.nn import resampling

X = np.arange(15, dtype=np.float32).reshape(1, 3, 5, 1) ** 2

CASES = {
    # adaptive_avg_pool2d(x, (2, 3))
    "adaptive mean": (
        lambda x: resampling.adaptive_avg_pool(x, (2, 3)),
        [[15.5, 27.16666667, 42.5], [70.5, 97.16666667, 127.5]],
    ),
    # adaptive_max_pool2d(x, (2, 3))
    "adaptive max": (lambda x: resampling.adaptive_max_pool(x, (2, 3)), [[36, 64, 81], [121, 169, 196]]),
    # interpolate(x, (4, 7), mode="bilinear")
    "larger": (
        lambda x: resampling.resize_bilinear(x, (4, 7)),
        [
            [0.0, 0.57142857, 1.85714286, 4.0, 7.57142857, 12.0, 16.0],
            [15.625, 19.76785714, 25.51785714, 32.125, 40.16071429, 49.05357143, 56.625],
            [53.125, 61.55357143, 72.66071429, 84.625, 98.01785714, 112.26785714, 124.125],
            [100.0, 112.0, 127.57142857, 144.0, 161.85714286, 180.57142857, 196.0],
        ],
    ),
    # interpolate(x, (2, 2), mode="bilinear")
    "smaller": (lambda x: resampling.resize_bilinear(x, (2, 2)), [[8.875, 25.125], [95.125, 148.875]]),
    # interpolate(x, (2, 3), mode="bilinear", align_corners=True)
    "corners": (
        lambda x: resampling.resize_bilinear(x, (2, 3), align_corners=True),
        [[0, 4, 16], [100, 144, 196]],
    ),
    # interpolate(x, (2, 7))
    "nearest": (
        lambda x: resampling.resize_nearest(x, (2, 7)),
        [[0, 0, 1, 4, 4, 9, 16], [25, 25, 36, 49, 49, 64, 81]],
    ),
    # avg_pool2d(x, 2, 2, 1, ceil_mode=True, count_include_pad=True)
    "mean": (
        lambda x: resampling.avg_pool(x, 2, padding=1, ceil_mode=True),
        [[0, 1.25, 6.25], [31.25, 87.5, 127.5]],
    ),
    # avg_pool2d(x, 2, 2, 1, ceil_mode=True, count_include_pad=False)
    "mean without padding": (
        lambda x: resampling.avg_pool(x, 2, padding=1, ceil_mode=True, count_include_pad=False),
        [[0, 2.5, 12.5], [62.5, 87.5, 127.5]],
    ),
    # avg_pool2d(x, 2, 2, 0, ceil_mode=True)
    "mean of what is left": (
        lambda x: resampling.avg_pool(x, 2, ceil_mode=True),
        [[15.5, 31.5, 48.5], [110.5, 156.5, 196.0]],
    ),
    # max_pool2d(x, 3, 2, 1)
    "max": (lambda x: resampling.max_pool(x, 3, stride=2, padding=1), [[36, 64, 81], [121, 169, 196]]),
}


@pytest.mark.parametrize("call, expected", CASES.values(), ids=CASES)
def test_gives_the_numbers_of_pytorch(call, expected):
    y = call(X)
    np.testing.assert_allclose(y[0, :, :, 0], expected, rtol=1e-6)
    half = call(jnp.asarray(X, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half[0, :, :, 0], np.float32), expected, rtol=8e-3)


def test_padding_never_wins_a_maximum():
    y = resampling.max_pool(-1 - X, 3, stride=2, padding=1)
    assert (np.asarray(y) < 0).all()


def test_cells_may_outnumber_tokens():
    y = resampling.adaptive_avg_pool(X, (3, 10))
    np.testing.assert_array_equal(y, X.repeat(2, axis=2))


def test_one_and_three_axes():
    line = np.arange(6, dtype=np.float32).reshape(1, 6, 1)
    np.testing.assert_array_equal(resampling.avg_pool(line, 3)[0, :, 0], [1, 4])
    np.testing.assert_allclose(resampling.resize_bilinear(line, 3)[0, :, 0], [0.5, 2.5, 4.5], rtol=1e-6)
    cube = np.arange(64, dtype=np.float32).reshape(1, 4, 4, 4, 1)
    blocks = cube.reshape(2, 2, 2, 2, 2, 2).mean((1, 3, 5))
    np.testing.assert_allclose(resampling.adaptive_avg_pool(cube, 2)[0, ..., 0], blocks, rtol=1e-6)
    np.testing.assert_array_equal(resampling.max_pool(cube, 2)[0, -1, -1, -1], [63])


def test_gradients_go_to_what_was_read():
    means = jax.grad(lambda x: resampling.adaptive_avg_pool(x, (2, 3)).sum())(X)
    # Cells of two rows of three overlap in the middle row; columns 1 and 3 of five lie in two cells of three.
    columns = np.array([1 / 2, 1 / 2 + 1 / 3, 1 / 3, 1 / 3 + 1 / 2, 1 / 2])
    np.testing.assert_allclose(means[0, :, :, 0], np.outer([0.5, 1, 0.5], columns), rtol=1e-6)
    maxima = jax.grad(lambda x: resampling.adaptive_max_pool(x, (2, 3)).sum())(X)
    np.testing.assert_array_equal(maxima[0, :, :, 0], [[0, 0, 0, 0, 0], [0, 1, 0, 1, 1], [0, 1, 0, 1, 1]])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: resampling.avg_pool(X, 2, padding=2), "over half"),
        (lambda: resampling.max_pool(X, 4), "exceeds the grid"),
        (lambda: resampling.adaptive_avg_pool(X, (1, 2, 3)), "2 ints"),
        (lambda: resampling.resize_bilinear(X, 0), "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("align_corners", [False, True])
def test_bicubic_is_the_sum_of_keys_kernel_over_repeated_edges(align_corners):
    """Written out for each place, with the kernel as a function of the distance."""

    def kernel(s, a=-0.75):
        s = abs(s)
        if s <= 1:
            return (a + 2) * s**3 - (a + 3) * s**2 + 1
        return a * (s**3 - 5 * s**2 + 8 * s - 4) if s < 2 else 0.0

    x = np.random.default_rng(0).standard_normal((1, 5, 2))
    for target in (3, 5, 8):
        got = resampling.resize_bicubic(x.astype(np.float32), target, align_corners=align_corners)
        for place in range(target):
            at = place * 4 / (target - 1) if align_corners else (place + 0.5) * 5 / target - 0.5
            taps = range(int(np.floor(at)) - 1, int(np.floor(at)) + 3)
            want = sum(kernel(at - tap) * x[0, min(max(tap, 0), 4)] for tap in taps)
            np.testing.assert_allclose(got[0, place], want, atol=1e-5)
    flat = resampling.resize_bicubic(np.ones((1, 4, 3, 1), np.float32), (7, 2))
    np.testing.assert_allclose(flat, np.ones((1, 7, 2, 1)), atol=1e-6)
