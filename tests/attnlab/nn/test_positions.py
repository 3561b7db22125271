"""Rotary embedding, tables, relative biases and ALiBi."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.nn import positions as p
from attnlab.nn.feature_maps import FEATURE_MAPS, elu1, feature_map


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


def test_sincos_table_is_the_formula_on_each_axis():
    line = np.asarray(p.sincos_table(7, 6))
    angles = np.arange(7)[:, None] * 10000.0 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(line, np.concatenate([np.sin(angles), np.cos(angles)], -1), atol=1e-7)
    plane = np.asarray(p.sincos_table((4, 7), 12))
    np.testing.assert_array_equal(plane[2, :, 6:], line)
    np.testing.assert_array_equal(plane[:, 5, :6], line[:4])
    assert p.sincos_table((2, 3, 4), 10).shape == (2, 3, 4, 10)
    with pytest.raises(ValueError, match="even"):
        p.sincos_table(4, 5)


def test_a_table_of_positions_has_the_grid_of_the_tokens():
    table = p.PositionTable((4, 6), 3, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(table(draw(5, 2, 4, 6, 3)), table.table[...])
    with pytest.raises(ValueError, match=r"tokens must be \(B, 4, 6, 3\), got \(2, 2, 3, 3\)"):
        table(draw(5, 2, 2, 3, 3))
    resized = p.PositionTable((4, 6), 3, resize=True, rngs=nnx.Rngs(0))(draw(5, 2, 2, 3, 3))
    pairs = np.asarray(table.table[...]).reshape(2, 2, 3, 2, 3)
    np.testing.assert_allclose(resized, pairs.mean((1, 3)), atol=1e-6)


def test_sines_leave_a_prefix_alone():
    table = p.SinePositions((2, 3), prefix=2)(draw(5, 1, 8, 4))
    np.testing.assert_array_equal(table[:2], np.zeros((2, 4)))
    np.testing.assert_array_equal(table[2:], p.sincos_table((2, 3), 4).reshape(6, 4))


@pytest.mark.parametrize("window", [(4,), (2, 3), (2, 3, 2)])
def test_relative_bias_is_a_function_of_the_offset(window):
    index = p.relative_position_index(window)
    where = p.grid_positions(window)[0]
    offset = [tuple(row) for row in (where[:, None] - where[None]).reshape(-1, len(window))]
    rows = dict(zip(offset, index.ravel(), strict=True))
    assert len(rows) == np.prod([2 * w - 1 for w in window]) == len(set(rows.values()))
    np.testing.assert_array_equal([rows[o] for o in offset], index.ravel())
    assert sorted(rows) == sorted(rows, key=rows.get)
    bias = p.RelativePositionBias(window, 3, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(bias()[1, 0, -1], bias.table[...][index[0, -1], 1])
    assert bias().shape == (3, *index.shape)


def test_t5_buckets():
    # Buckets of 32 up to 128, from the definition in section 2.1: exact to 7, then logarithmic in (8, 128).
    distances = np.array([0, 1, 7, 8, 11, 12, 17, 23, 33, 65, 91, 127, 128, 5000])
    buckets = [0, 1, 7, 8, 8, 9, 10, 11, 12, 14, 15, 15, 15, 15]
    np.testing.assert_array_equal(p.t5_bucket(-distances), buckets)
    np.testing.assert_array_equal(p.t5_bucket(distances[1:]), np.array(buckets[1:]) + 16)
    one_way = p.t5_bucket(np.array([5, 0, -15, -16, -500]), bidirectional=False)
    np.testing.assert_array_equal(one_way, [0, 0, 15, 16, 31])
    bias = p.BucketedBias(2, rngs=nnx.Rngs(0))
    b = bias(np.arange(3), np.arange(4))
    assert b.shape == (2, 3, 4)
    np.testing.assert_array_equal(b[:, 2, 0], bias.table[...][2])
    np.testing.assert_array_equal(b[:, 0, 2], bias.table[...][18])


def test_alibi_slopes_and_bias():
    np.testing.assert_array_equal(p.alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    six = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    np.testing.assert_array_equal(p.alibi_slopes(6), np.float32(six))
    bias = p.alibi_bias([1.0, 0.5], np.array([[4, 0]]), np.arange(3))
    np.testing.assert_array_equal(bias, [[[[-4, -3, -2], [0, -1, -2]], [[-2, -1.5, -1], [0, -0.5, -1]]]])
    with pytest.raises(ValueError, match="num_heads"):
        p.alibi_slopes(0)


@pytest.mark.parametrize("name", [name for name in FEATURE_MAPS if name != "identity"])
def test_feature_maps_are_non_negative_and_never_overflow(name):
    x = np.array([[-1e4, -3.0, 0.0, 2.0, 1e4], [-2.0, -1.0, 0.0, 1.0, 2.0]], np.float32)
    y = feature_map(name)(x)
    assert (np.asarray(y) >= 0).all() and np.isfinite(y).all()
    assert feature_map(name)(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_feature_maps_by_name_and_value():
    x = np.array([-20.0, -1.0, 0.0, 2.0], np.float32)
    np.testing.assert_allclose(elu1(x), [np.exp(-20), np.exp(-1), 1, 3], rtol=1e-6)
    np.testing.assert_allclose(feature_map("exp")(x), np.exp(x - 2), rtol=1e-6)
    with pytest.raises(ValueError, match="did you mean softmax"):
        feature_map("sofmax")
    with pytest.raises(ValueError, match="there are identity, relu"):
        feature_map("taylor")


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
        p.lrpe(draw(0, 1, 4, 2, 8), draw(1, 2, 3), p.grid_positions((2, 2)))
    with pytest.raises(ValueError, match="multiple of 4 for 2 axes"):
        p.lrpe_rotation(draw(0, 1, 4, 2, 6), draw(1, 2, 3), p.grid_positions((2, 2)))
