"""Tables that are added to tokens."""

import numpy as np
import pytest
from flax import nnx

from attnlab.nn import positions as p


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


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
    resized = p.PositionTable((4, 6), 3, resize="bilinear", rngs=nnx.Rngs(0))(draw(5, 2, 2, 3, 3))
    pairs = np.asarray(table.table[...]).reshape(2, 2, 3, 2, 3)
    np.testing.assert_allclose(resized, pairs.mean((1, 3)), atol=1e-6)


def test_sines_leave_a_prefix_alone():
    table = p.SinePositions((2, 3), prefix=2)(draw(5, 1, 8, 4))
    np.testing.assert_array_equal(table[:2], np.zeros((2, 4)))
    np.testing.assert_array_equal(table[2:], p.sincos_table((2, 3), 4).reshape(6, 4))


def test_sine_positions_have_a_block_for_each_axis():
    where, features, theta = np.random.default_rng(0).uniform(0, 9, (2, 5, 3)), 16, 100.0
    pairs = 3
    want = np.zeros((2, 5, 18))
    for axis, i in np.ndindex(3, pairs):
        angle = where[..., axis] * theta ** (-2 * i / (2 * pairs))
        want[..., 6 * axis + 2 * i], want[..., 6 * axis + 2 * i + 1] = np.sin(angle), np.cos(angle)
    np.testing.assert_allclose(p.sine_positions(where, features, theta=theta), want[..., :16], atol=2e-6)
    line = p.sincos_table(7, 6, interleaved=True)
    np.testing.assert_allclose(p.sine_positions(np.arange(7)[:, None], 6), line, atol=1e-6)
    apart = p.sine_positions(np.arange(7)[:, None], 6, interleaved=False)
    np.testing.assert_allclose(apart, p.sincos_table(7, 6), atol=1e-6)


def test_positions_of_images_with_padding_span_the_real_part():
    real = np.zeros((2, 4, 5), bool)
    real[0, :3, :2], real[1] = True, True
    features, theta = 12, 50.0
    want = np.zeros((2, 4, 5, features))
    for b, row, column in np.ndindex(2, 4, 5):
        places = [
            (real[b, : row + 1, column].sum(), real[b, :, column].sum()),
            (real[b, row, : column + 1].sum(), real[b, row].sum()),
        ]
        for axis, (up_to, whole) in enumerate(places):
            coordinate = up_to / (whole + 1e-6) * 2 * np.pi
            for i in range(features // 2):
                angle = coordinate / theta ** (2 * (i // 2) / (features // 2))
                want[b, row, column, axis * features // 2 + i] = np.cos(angle) if i % 2 else np.sin(angle)
    np.testing.assert_allclose(p.masked_grid_positions(real, features, theta=theta), want, atol=2e-6)
    with pytest.raises(ValueError, match="multiple of 4 for 2 axes, got 6"):
        p.masked_grid_positions(real, 6)
