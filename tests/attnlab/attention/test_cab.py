"""The attentions of CAB: what they approximate, when they are exact, and what they refuse."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import UnsupportedArgument
from attnlab.attention.linear.abc import BoundedMemoryAttention
from attnlab.attention.linear.cosformer import CosformerAttention
from attnlab.attention.linear.lara import LinearRandomizedAttention, lara_features
from attnlab.attention.linear.nystrom import nystrom_features
from attnlab.attention.linear.performer import Performer
from attnlab.attention.local.cab_local import LocalAttention
from attnlab.attention.sparse.long_short import BlockHalo, LongShortAttention
from attnlab.attention.sparse.prob_sparse import ProbSparseAttention, choose_queries, prob_sparse_attention
from attnlab.nn.newton_inverse import cubic_newton_inverse
from attnlab.nn.random_features import gaussian_rows, log_features
from attnlab.nn.segment_means import segment_means
from attnlab.nn.softmax import softmax_attention
from tests.accuracy import relative_rms
from tests.attnlab.attention.sparse_cost import check_growth, operations, temporaries, visited_pairs

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 10, 8)).astype(np.float32)
Q, K, V = RANDOM.standard_normal((3, 2, 10, 2, 4)).astype(np.float32)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_random_features_estimate_the_softmax_kernel(orthogonal):
    rows = gaussian_rows(jax.random.key(0), 2, 4096, 4, orthogonal=orthogonal)
    block = np.asarray(rows[0, :4])
    apart = block @ block.T - np.diag(np.square(block).sum(1))
    assert np.allclose(apart, 0, atol=1e-5) == orthogonal
    q, k = Q / 2, K / 2
    features = [np.exp(np.subtract(*log_features(x, rows))) for x in (q, k)]
    estimate = np.einsum("bnhf,bmhf->bhnm", *features) / 4096
    assert relative_rms(estimate, np.exp(np.einsum("bnhd,bmhd->bhnm", q, k) / 2)) < 0.1


def test_segments_are_equal_but_for_the_last_and_hold_real_tokens_alone():
    found = segment_means(10, 4)
    np.testing.assert_allclose(found.weights[0] @ np.arange(10), [0.5, 2.5, 5, 8])
    assert not found.few.any()
    real = np.array([[1, 0, 1, 1, 0, 0, 0, 0, 0, 0], [1] * 7 + [0] * 3], bool)
    found = segment_means(10, 4, real)
    np.testing.assert_allclose(found.weights @ np.arange(10.0), [[0, 0, 2, 3], [0, 1.5, 3.5, 5.5]])
    np.testing.assert_array_equal(found.exist, [[False, True, True, True], [True] * 4])
    np.testing.assert_array_equal(found.few, [True, False])


@pytest.mark.slow
def test_nystrom_is_exact_for_few_tokens_and_near_with_many_landmarks():
    def error(num_landmarks, real=None):
        q, k = nystrom_features(Q, K, num_landmarks=num_landmarks, real=real)
        y = jnp.einsum("bnhr,bmhr,bmhe->bnhe", q, k, V if real is None else jnp.where(real[..., None, None], V, 0))
        return relative_rms(y, softmax_attention(Q, K, V, scale=0.25, mask=real))

    assert error(10) < 1e-6
    assert error(4, np.broadcast_to(np.arange(10) % 3 == 1, (2, 10))) < 1e-6
    assert error(9) < error(2)
    matrix = jax.nn.softmax(jnp.asarray(RANDOM.standard_normal((3, 5, 5)), jnp.float32))
    np.testing.assert_allclose(
        cubic_newton_inverse(matrix, iterations=16) @ matrix, np.eye(5) + np.zeros((3, 5, 5)), atol=2e-3
    )


def test_weights_of_lara_sum_to_one():
    q, k = lara_features(Q, K, num_landmarks=3)
    weights = jnp.einsum("bnhr,bmhr->bhnm", q, k)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert (weights > 0).all()


@pytest.mark.slow
def test_bounded_memory_of_the_last_token_is_that_of_all():
    mixer = BoundedMemoryAttention(8, num_heads=1, num_slots=2, causal=True, rngs=nnx.Rngs(0))
    whole = BoundedMemoryAttention(8, num_heads=1, num_slots=2, rngs=nnx.Rngs(0))
    # The last row of the causal form has seen all that the other form has.
    np.testing.assert_allclose(mixer(X)[:, -1], whole(X)[:, -1], rtol=2e-4, atol=2e-5)
    alone = BoundedMemoryAttention(8, num_heads=1, num_slots=2, causal=True, accumulate=False, rngs=nnx.Rngs(0))
    assert relative_rms(alone(X)[:, 0], mixer(X)[:, 0]) < 1e-5
    assert relative_rms(alone(X)[:, -1], mixer(X)[:, -1]) > 1e-2
    y, state = alone.prefill(X[:, :6], alone.init_state(2))
    np.testing.assert_allclose(
        jnp.concatenate([y, alone.prefill(X[:, 6:], state)[0]], 1), alone(X), rtol=1e-4, atol=1e-5
    )


def test_cosformer_weighs_by_the_cosine_of_the_distance():
    mixer = CosformerAttention(8, num_heads=2, rngs=nnx.Rngs(0))
    q, k, v = jax.nn.relu(mixer.query(X)), jax.nn.relu(mixer.key(X)), mixer.value(X)
    distance = np.arange(10)[:, None] - np.arange(10)
    weights = jnp.einsum("bnhd,bmhd->bhnm", q, k) * np.cos(np.pi / 2 * distance / 10)
    y = jnp.einsum("bhnm,bmhe->bnhe", weights, v) / jnp.maximum(weights.sum(-1), 1e-6).swapaxes(1, 2)[..., None]
    np.testing.assert_allclose(mixer(X), mixer.out(y), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="causal cosFormer attention needs length"):
        CosformerAttention(8, num_heads=2, causal=True, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_the_causal_performer_is_the_other_one_of_the_tokens_so_far():
    # Without ε and the bound the maximum, which alone differs, cancels.
    options = {"num_heads": 2, "eps": 0.0, "least": 1e-30, "num_features": 8}
    causal, whole = (Performer(8, causal=causal, **options, rngs=nnx.Rngs(0)) for causal in (True, False))
    np.testing.assert_allclose(causal(X)[:, -1], whole(X)[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_training_draws_anew():
    for mixer in (
        Performer(8, num_heads=2, rngs=nnx.Rngs(0)),
        LinearRandomizedAttention(8, num_heads=2, num_landmarks=3, rngs=nnx.Rngs(0)),
    ):
        first, second = (mixer(X, deterministic=False) for _ in range(2))
        assert not np.allclose(first, second) and not np.allclose(first, mixer(X))
        np.testing.assert_array_equal(mixer(X), mixer(X))


def test_prob_sparse_attends_for_queries_that_are_far_from_uniform():
    samples = np.broadcast_to(np.arange(10), (10, 10))
    chosen = choose_queries(Q, K, samples, 3)
    scores = np.einsum("bnhd,bmhd->bhnm", Q, K)
    measure = scores.max(-1) - scores.mean(-1)
    np.testing.assert_array_equal(np.sort(chosen), np.sort(np.argsort(-measure)[..., :3]))
    y, full = prob_sparse_attention(Q, K, V, chosen), softmax_attention(Q, K, V)
    row = (np.asarray(chosen)[..., None] == np.arange(10)).any(2).swapaxes(1, 2)[..., None]
    np.testing.assert_allclose(y, np.where(row, full, V.mean(1, keepdims=True)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_window_and_summaries_share_a_softmax():
    rule = BlockHalo(4, 2)
    q, k = np.arange(12)[:, None], np.arange(12)
    np.testing.assert_array_equal(rule.dense(12), (k >= q // 4 * 4 - 2) & (k < q // 4 * 4 + 6))
    mixer = LongShortAttention(8, num_heads=2, num_landmarks=3, window=4, rngs=nnx.Rngs(0))
    _, intermediates = nnx.capture(mixer, nnx.Intermediate)(X)
    np.testing.assert_allclose(intermediates["attention"][0].sum(-1), 1, rtol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UnsupportedArgument, match="no causal cross form"):
        BoundedMemoryAttention(8, num_heads=2, causal=True, context_features=8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="window must be at least 1, got 3 and 0"):
        LongShortAttention(8, num_heads=2, num_landmarks=3, window=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="every head has features of its own"):
        Performer(8, num_heads=2, num_kv_heads=1, rngs=nnx.Rngs(0))


LENGTHS = (1024, 2048)


def tokens_of(length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, length, 8), jnp.float32)


def test_local_attention_visits_a_band():
    mixer = LocalAttention(8, num_heads=2, window=15, rngs=nnx.Rngs(0))
    visited = tuple(visited_pairs(mixer, np.zeros((1, length, 8), np.float32)) for length in LENGTHS)
    check_growth(visited, LENGTHS)
    assert visited[1] < 2 * LENGTHS[1] ** 2 / 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "per_token"),
    [(LocalAttention, lambda n: 1), (LongShortAttention, lambda n: 1), (ProbSparseAttention, math.log)],
    ids=["local", "long_short", "prob_sparse"],
)
def test_memory_and_operations_grow_as_declared(cls, per_token):
    mixer = cls(8, num_heads=2, rngs=nnx.Rngs(0))
    declared = tuple(length * per_token(length) for length in LENGTHS)
    check_growth(tuple(temporaries(mixer, tokens_of(length)) for length in LENGTHS), declared)
    if cls is not LocalAttention:  # the op goes through its tiles in a loop; they are counted above
        check_growth(tuple(operations(mixer, tokens_of(length)) for length in LENGTHS), declared)
