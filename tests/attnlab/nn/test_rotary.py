"""Rotary embedding and its learned kin."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.nn import rotary as p
from attnlab.nn.positions import grid_positions


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_pairs_of_channels(interleaved):
    x = draw(0, 1, 3, 2, 6)
    where = np.array([0, 5, 9])
    y = np.asarray(p.rotary(x, where, theta=100.0, interleaved=interleaved))
    pairs = [(0, 1), (2, 3), (4, 5)] if interleaved else [(0, 3), (1, 4), (2, 5)]
    for i, pair in enumerate(pairs):
        angle = where * 100.0 ** (-i / 3)
        turned = (x[..., pair[0]] + 1j * x[..., pair[1]]) * np.exp(1j * angle)[None, :, None]
        np.testing.assert_allclose(y[..., pair[0]] + 1j * y[..., pair[1]], turned, atol=1e-5)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_products_depend_on_differences_alone(axes, interleaved):
    rng = np.random.default_rng(1)
    q, k = draw(2, 1, 5, 2, 14), draw(3, 1, 5, 2, 14)
    at_q, at_k, move = (rng.integers(0, 50, size) for size in ((1, 5, axes), (1, 5, axes), (1, 1, axes)))

    def scores(at_q, at_k):
        turned = (p.rotary(a, at, interleaved=interleaved) for a, at in ((q, at_q), (k, at_k)))
        return np.einsum("bnhd,bmhd->bhnm", *turned)

    here = scores(at_q, at_k)
    np.testing.assert_allclose(scores(at_q + move, at_k + move), here, atol=2e-4)
    for axis in range(axes):
        one = np.eye(axes, dtype=int)[axis] * 3
        assert np.abs(scores(at_q + one, at_k) - here).max() > 0.1
    norms = np.linalg.norm(p.rotary(q, at_q, interleaved=interleaved), axis=-1)
    np.testing.assert_allclose(norms, np.linalg.norm(q, axis=-1), rtol=1e-5)


def test_pairs_are_divided_among_the_axes():
    x = draw(4, 1, 1, 1, 10)
    turned = np.asarray(p.rotary(x, np.array([[[0, 7]]])))[0, 0, 0]
    # Five pairs: three for the first axis, at 0 here, and two for the second.
    np.testing.assert_array_equal(turned[[0, 1, 2, 5, 6, 7]], x[0, 0, 0, [0, 1, 2, 5, 6, 7]])
    assert (turned[[3, 4, 8, 9]] != x[0, 0, 0, [3, 4, 8, 9]]).all()
    second = np.asarray(p.rotary(x, np.array([[[7, 0]]]), split=(1, 4)))[0, 0, 0]
    assert (second != x[0, 0, 0]).sum() == 2
    line, plane = p.rotary(x, [[4]]), p.rotary(x, [[[4]]])
    np.testing.assert_array_equal(line, plane)


@pytest.mark.parametrize(
    "size, where, split, words",
    [
        (5, [0], None, "must be even"),
        (4, [0], (1,), "2 pairs in sum"),
        (4, [[[0, 0]]], (2,), "give 2 axes"),
        (4, 0, None, "positions must be"),
    ],
)
def test_rotary_refuses_what_does_not_fit(size, where, split, words):
    with pytest.raises(ValueError, match=words):
        p.rotary(np.ones((1, 1, 1, size), np.float32), where, split=split)


def test_rotated_neighbours_come_out_apart():
    x, where = draw(0, 1, 3, 2, 6), np.array([0, 5, 9])
    together, apart = (p.Rotary(interleaved=True, regroup=regroup)(x, where) for regroup in (False, True))
    np.testing.assert_array_equal(apart, np.concatenate([together[..., 0::2], together[..., 1::2]], -1))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("turn", [p.lrpe, p.lrpe_rotation])
def test_lrpe_depends_on_differences_of_positions(turn, axes):
    rng = np.random.default_rng(1)
    q, k, theta = draw(2, 1, 5, 2, 12), draw(3, 1, 5, 2, 12), draw(4, 2, 12)
    at_q, at_k, move = (rng.integers(0, 9, size) for size in ((1, 5, axes), (1, 5, axes), (1, 1, axes)))

    def scores(at_q, at_k):
        return np.einsum("bnhd,bmhd->bhnm", turn(q, theta, at_q), turn(k, theta, at_k))

    np.testing.assert_allclose(scores(at_q + move, at_k + move), scores(at_q, at_k), atol=1e-4)
    np.testing.assert_allclose(scores(0 * at_q, 0 * at_k), np.einsum("bnhd,bmhd->bhnm", q, k), atol=1e-5)
    assert not np.allclose(scores(at_q, at_k), scores(0 * at_q, 0 * at_k), atol=1e-2)


def test_lrpe_refuses_too_few_angles():
    with pytest.raises(ValueError, match="too few angles for 2 axes and 8 channels"):
        p.lrpe(draw(0, 1, 4, 2, 8), draw(1, 2, 3), grid_positions((2, 2)))
    with pytest.raises(ValueError, match="multiple of 4 for 2 axes"):
        p.lrpe_rotation(draw(0, 1, 4, 2, 6), draw(1, 2, 3), grid_positions((2, 2)))


def test_some_channels_turn_by_inclusive_frequencies():
    x, where = draw(0, 1, 3, 2, 7), np.array([0, 5, 9])
    y = np.asarray(p.Rotary(100.0, channels=4, inclusive=True)(x, where))
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    for pair, frequency in (((0, 2), 1.0), ((1, 3), 0.01)):
        turned = (x[..., pair[0]] + 1j * x[..., pair[1]]) * np.exp(1j * where * frequency)[None, :, None]
        np.testing.assert_allclose(y[..., pair[0]] + 1j * y[..., pair[1]], turned, atol=1e-5)
    alone = p.rotary(x[..., :2], where, inclusive=True)
    np.testing.assert_array_equal(alone, p.rotary(x[..., :2], where))
    half = p.rotary(jnp.asarray(x, jnp.bfloat16), where, channels=4)
    assert half.dtype == jnp.bfloat16 and half.shape == x.shape
    p.Rotary(channels=4).check(7, 1)
    with pytest.raises(ValueError, match=r"channels must be in 2\.\.7"):
        p.Rotary(channels=8).check(7, 1)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_slows_down_what_turns_seldom(truncate):
    size, theta, factor, length = 16, 10000.0, 4.0, 64
    yarn = p.Yarn(factor, length, beta_fast=8.0, beta_slow=0.5, truncate=truncate)
    got = p.rotary_angles(np.array([1]), size, theta=theta, yarn=yarn)[0, 0]

    def dimension(turns):
        return size * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(theta))

    low, high = dimension(8.0), dimension(0.5)
    low, high = (np.floor(low), np.ceil(high)) if truncate else (low, high)
    for i in range(size // 2):
        plain = theta ** (-2 * i / size)
        kept = 1 - min(max((i - low) / (high - low), 0), 1)
        assert float(got[i]) == pytest.approx(plain / factor * (1 - kept) + plain * kept, rel=1e-6)
    assert float(got[0]) == 1 and float(got[-1]) == pytest.approx(theta ** (-14 / 16) / factor, rel=1e-6)
    x = draw(0, 1, 1, 1, size)
    longer = p.Rotary(theta, yarn=yarn)(x, np.array([0])) / x
    np.testing.assert_allclose(longer, 0.1 * np.log(4) + 1, rtol=1e-6)
    np.testing.assert_allclose(p.Rotary(yarn=p.Yarn(factor, length, magnitude=1.0))(x, np.array([0])), x, rtol=1e-6)
    with pytest.raises(ValueError, match="factor and original_length"):
        p.Yarn(0.5, length)
