"""Tensor attention against its definition, its polynomial, and the task that it is for."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.dense.kronecker_attention import KroneckerAttention, tensor_attention, tensor_attention_poly
from attnlab.interop.official import decode
from attnlab.tasks.match3 import Match3
from tests.accuracy import relative_rms


def draw(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def naive(q, keys, values, seen, scale, polynomial=np.exp):
    """Pairs, heads one to one, in float64."""
    k1, k2, v1, v2 = (np.asarray(a, np.float64) for a in (*keys, *values))
    scores = scale * np.einsum("bnhd,bjhd,bkhd->bhnjk", np.asarray(q, np.float64), k1, k2)
    weights = polynomial(scores) * (seen[..., :, None] & seen[..., None, :])
    total = weights.sum((-1, -2), keepdims=True)
    weights = np.where(total > 0, weights / np.where(total > 0, total, 1), 0)
    return np.einsum("bhnjk,bjhe,bkhe->bnhe", weights, v1, v2)


def test_masks_of_any_kind_and_rows_without_tuples():
    q, mask = draw(2, 5, 2, 3), np.random.default_rng(1).random((2, 2, 5, 6)) < 0.6
    mask[0, 1, 2] = False
    keys, values = ([draw(2, 6, 2, size, seed=seed) for seed in range(2)] for size in (3, 4))
    options = {"scale": 0.7, "block_size": 4}
    got = tensor_attention(q, keys, values, mask=mask, **options)
    assert relative_rms(got, naive(q, keys, values, mask, 0.7)) < 1e-5
    assert not np.any(got[0, 2, 1])
    by_key = mask[:, 0, 0] | np.asarray([True] + [False] * 5)
    want = naive(q, keys, values, np.broadcast_to(by_key[:, None, None], (2, 2, 5, 6)), 0.7)
    assert relative_rms(tensor_attention(q, keys, values, mask=by_key, **options), want) < 1e-5
    with pytest.raises(ValueError, match="as many sets"):
        tensor_attention(q, keys, values[:1])


def test_the_polynomial_comes_near_with_its_degree():
    """Entries up to 0.5 of 4 channels, 64 tokens: errors below 5e-2, 6e-3 and 1e-3 at degrees 2, 3 and 4."""
    random = np.random.default_rng(0)
    q, *sets = (random.uniform(-0.5, 0.5, (1, 64, 1, 4)).astype(np.float32) for _ in range(3))
    values = [draw(1, 64, 1, 4, seed=seed) for seed in (1, 2)]
    exact = naive(q, sets, values, np.ones((1, 1, 64, 64), bool), 1.0)
    errors = [np.abs(tensor_attention_poly(q, sets, values, degree=g, scale=1.0) - exact).max() for g in (1, 2, 3, 4)]
    assert errors[1] < 5e-2 and errors[2] < 6e-3 and errors[3] < 1e-3
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_the_linear_forms_of_the_polynomial_are_those_of_pairs():
    q, ids = draw(2, 7, 2, 3), np.asarray([[4, 4, 4, 1, 1, 1, 1]] * 2)
    keys, values = ([draw(2, 7, 2, size, seed=seed) for seed in range(2)] for size in (3, 4))
    real = np.random.default_rng(1).random((2, 7)) < 0.7
    tri = np.tri(7, dtype=bool)[None, None]

    def polynomial(x):
        return 1 + x + x**2 / 2

    for options, seen in (
        ({"mask": real}, np.broadcast_to(real[:, None, None], (2, 1, 7, 7))),
        ({"mask": real, "causal": True}, tri & real[:, None, None]),
        ({"segment_ids": ids, "causal": True}, tri & (ids[:, None, :, None] == ids[:, None, None, :])),
        ({"mask": np.broadcast_to(real[:, None, None], (2, 1, 7, 7)), "causal": True}, tri & real[:, None, None]),
    ):
        got = tensor_attention_poly(q, keys, values, scale=0.5, **options)
        assert relative_rms(got, naive(q, keys, values, seen, 0.5, polynomial)) < 1e-5, options
    with pytest.raises(ValueError, match="segment_ids"):
        tensor_attention_poly(q, keys, values, segment_ids=ids)


@pytest.mark.parametrize("degree", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_mixers_of_three_sets_decode_pack_and_record(degree):
    options = {"num_kv_heads": 1, "order": 3, "degree": degree, "causal": True}
    mixer = KroneckerAttention(8, num_heads=2, **options, rngs=nnx.Rngs(0))
    graph, state = nnx.split(mixer)
    ids = np.asarray([[3, 3, 1, 1, 1, 1]])

    @jax.jit
    def run(state, x):
        mixer = nnx.merge(graph, state)
        y, recorded = nnx.capture(mixer, nnx.Intermediate)(x)
        return y, decode(mixer, x, 4)[0], mixer(x, segment_ids=ids)[:, 2:], mixer(x[:, 2:]), recorded["attention"][0]

    y, decoded, packed, alone, weights = run(state, draw(1, 6, 8))
    assert relative_rms(decoded, y) < 1e-5
    assert relative_rms(packed, alone) < 1e-5
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert not np.any(np.triu(weights, 1))
    with pytest.raises(ValueError, match="coefficients"):
        KroneckerAttention(8, num_heads=2, coefficients=(1, 1), rngs=nnx.Rngs(0))


def test_match3():
    task = Match3()
    batch = task.sample(np.random.default_rng(0), 64)
    x = batch["inputs"]
    want = [[any((a + b + c) % 11 == 0 for b in row for c in row) for a in row] for row in x]
    np.testing.assert_array_equal(batch["targets"], want)
    assert 0.3 < batch["targets"].mean() < 0.7
    with pytest.raises(ValueError, match="residues"):
        Match3(modulus=3, residues=4)
