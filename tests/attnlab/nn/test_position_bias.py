"""Biases of scores by offset, and ALiBi."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.nn import position_bias as p
from attnlab.nn.linear import Linear
from attnlab.nn.positions import grid_positions
from tests.accuracy import relative_rms


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("window", [(4,), (2, 3), (2, 3, 2)])
def test_relative_bias_is_a_function_of_the_offset(window):
    index = p.relative_position_index(window)
    where = grid_positions(window)[0]
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
    np.testing.assert_array_equal(p.T5Buckets()(-distances), buckets)
    np.testing.assert_array_equal(p.T5Buckets()(distances[1:]), np.array(buckets[1:]) + 16)
    one_way = p.T5Buckets(bidirectional=False)(np.array([5, 0, -15, -16, -500]))
    np.testing.assert_array_equal(one_way, [0, 0, 15, 16, 31])
    bias = p.OffsetTable(2, p.T5Buckets(), rngs=nnx.Rngs(0))
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


def test_a_row_for_each_offset():
    table = p.OffsetTable(2, p.EachOffset(4), init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0))
    rows = np.asarray(table.table[...])
    assert rows.shape == (7, 2)
    bias = np.asarray(table(np.array([[0, 1, 9]]), np.array([[0, 3]])))
    assert bias.shape == (1, 2, 3, 2)
    np.testing.assert_array_equal(bias[0, 1], [[rows[3, 1], rows[6, 1]], [rows[2, 1], rows[5, 1]], [rows[0, 1]] * 2])


@pytest.mark.parametrize("log_spaced", [False, True])
def test_a_network_makes_the_table_of_any_window(log_spaced):
    window, network = (3, 2), Linear(2, 4, rngs=nnx.Rngs(0))
    bias = p.NetworkBias(window, network, log_spaced=log_spaced, bound=16.0)
    kernel, shift = np.float64(network.kernel[...]), np.float64(network.bias[...])

    def want(window):
        tokens, of = grid_positions(window)[0], np.zeros((4, np.prod(window), np.prod(window)))
        for i, j in np.ndindex(*of.shape[1:]):
            offset = np.float64(tokens[i] - tokens[j])
            if log_spaced:
                spaced = offset / (np.array([3, 2]) - 1) * 8
                offset = np.sign(spaced) * np.log2(np.abs(spaced) + 1) / np.log2(8)
            of[:, i, j] = 16 / (1 + np.exp(-(offset @ kernel + shift)))
        return of

    assert relative_rms(bias(), want(window)) < 1e-6
    assert relative_rms(bias((2, 4)), want((2, 4))) < 1e-6
    gradient = nnx.grad(lambda b: (b() ** 2).sum())(bias)
    assert np.abs(gradient["network"]["kernel"][...]).min() > 0


@pytest.mark.parametrize(
    ("queries", "keys", "rows", "zero"),
    [(4, 6, 12, 5), (5, 3, 4, 1), (1, 7, 9, 0), (3, 3, 2, 9), (3, 1, 4, -7), (4, 4, 4, 3)],
)
@pytest.mark.parametrize("per_head", [False, True])
def test_relative_logits_against_a_loop(queries, keys, rows, zero, per_head):
    q, table = draw(0, 2, queries, 3, 4), draw(1, *((rows, 3, 4) if per_head else (rows, 4)))
    want = np.zeros((2, 3, queries, keys))
    for h, i, j in np.ndindex(*want.shape[1:]):
        if 0 <= (row := zero + j - i) < rows:
            want[:, h, i, j] = np.float64(q[:, i, h]) @ (table[row, h] if per_head else table[row])
    got = p.relative_logits(q, table, keys, zero=zero)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-5)
    at = p.relative_logits_at(q, table, 5 + np.arange(queries), 5 + np.arange(keys)[None], zero=zero)
    np.testing.assert_allclose(at, want, atol=1e-5)


def test_gradients_of_relative_logits_reach_the_rows_that_are_used():
    q, table = draw(0, 1, 3, 2, 4), draw(1, 9, 4)

    def total(q, table, logits):
        return jnp.square(logits(q, table)).sum()

    by_shift, by_gather = (
        jax.grad(total, (0, 1))(q, table, logits)
        for logits in (
            lambda q, table: p.relative_logits(q, table, 4, zero=3),
            lambda q, table: p.relative_logits_at(q, table, np.arange(3), np.arange(4), zero=3),
        )
    )
    for one, other in zip(by_shift, by_gather, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert (np.abs(by_shift[1]).sum(1) > 0).tolist() == [False] + [True] * 6 + [False] * 2
    assert p.relative_logits(jnp.asarray(q, jnp.bfloat16), table, 4, zero=3).dtype == jnp.float32
    with pytest.raises(ValueError, match="3 queries and 4 keys have 6 offsets, got 5"):
        p.relative_shift(draw(2, 3, 5), 4)
