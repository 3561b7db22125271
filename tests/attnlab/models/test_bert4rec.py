"""BERT4Rec: what conformance and goldens do not say of network, loss and ranking."""

import jax
import numpy as np
import pytest
from flax import nnx

from attnlab.analysis.ranking import ranking_metrics
from attnlab.models.bert4rec import BERT4Rec
from attnlab.objectives.cloze import batch_cloze_loss, cloze_loss


def small(**options):
    return BERT4Rec(9, features=8, depth=1, hidden_features=8, max_length=6, **options, rngs=nnx.Rngs(0))


def run(model, ids, mask, positions):
    """All that a model gives, in one program."""
    graph, state = nnx.split(model)

    def all_of_it(state, ids, mask, positions):
        its = nnx.merge(graph, state)
        at = its(ids, mask=mask, positions=positions)
        return its(ids, mask=mask), at, its.tokens(ids, mask=mask), its.pooled(ids, mask=mask)

    return jax.jit(all_of_it)(state, ids, mask, positions)


def test_padding_is_not_seen_and_causal_sees_nothing_behind():
    ids, places = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]]), np.array([[2, 0], [4, 1]])
    real = ids > 0
    model = small()
    y, at, tokens, pooled = run(model, ids, real, places)
    other = run(model, np.where(real, ids, 6), real, places)
    np.testing.assert_allclose(other[0][0, :3], y[0, :3], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(at, np.stack([y[0, [2, 0]], y[1, [4, 1]]]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pooled, np.stack([tokens[0, :3].mean(0), tokens[1].mean(0)]), rtol=1e-5, atol=1e-6)
    causal = small(causal=True)
    changed = np.where(np.arange(5) < 3, ids, 1)
    one, two = (run(causal, given, np.ones_like(real), places)[0] for given in (ids, changed))
    np.testing.assert_allclose(one[:, :3], two[:, :3], rtol=1e-5, atol=1e-6)
    assert np.abs(one[:, 3:] - two[:, 3:]).max() > 1e-3
    with pytest.raises(ValueError, match="N at most 6"):
        model(np.zeros((1, 7), np.int32))
    with pytest.raises(ValueError, match=r"positions must be \(B, P\)"):
        model.logits(tokens, np.array([1, 2]))


def test_dropout_falls_on_embeddings_weights_and_branches():
    model = small(dropout=0.5)
    ids = np.array([[1, 2, 3]])
    one, two = (np.asarray(model(ids, deterministic=False)) for _ in range(2))
    assert np.any(one != two)
    names = {type(part).__name__ for _, part in nnx.iter_modules(model)}
    assert "_BranchMLP" in names


def test_the_small_configuration_has_its_parameters():
    """For MovieLens-1M, 3416 items: 64 channels, 2 layers, 2 heads."""
    shapes = nnx.eval_shape(lambda: nnx.state(BERT4Rec(3420, rngs=nnx.Rngs(0)), nnx.Param))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    layer = 4 * (64 * 64 + 64) + 2 * 128 + 64 * 256 + 256 + 256 * 64 + 64
    assert count == (3420 + 200 + 2) * 64 + 128 + 2 * layer + 64 * 64 + 64 + 128 + 3420


def test_loss_of_a_batch_is_over_all_masked_places():
    random = np.random.default_rng(0)
    logits, target = random.standard_normal((2, 3, 7)).astype(np.float32), random.integers(7, size=(2, 3))
    weight = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
    each = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, target[..., None], 2)[..., 0]
    np.testing.assert_allclose(batch_cloze_loss(logits, target, weight=weight, eps=0), (each * weight).sum() / 3, 1e-5)
    np.testing.assert_allclose(batch_cloze_loss(logits, target, weight=weight), (each * weight).sum() / 3.00001, 1e-5)
    np.testing.assert_allclose(cloze_loss(logits, target, eps=0), each.mean(1), 1e-5)
    none = cloze_loss(logits, target, weight=np.zeros((2, 3)), eps=0)
    np.testing.assert_array_equal(none, 0)
    with pytest.raises(ValueError, match="weight must be"):
        cloze_loss(logits, target, weight=weight[:, :2])


def test_ranking():
    scores = np.array([[3.0, 1, 2, 3], [1, 1, 4, 1], [0, 5, 6, 7]])
    rank, hit, ndcg, mrr = ranking_metrics(scores, cutoffs=(1, 2, 4))
    np.testing.assert_array_equal(rank, [0, 1, 3])
    np.testing.assert_array_equal(hit, [[1, 1, 1], [0, 1, 1], [0, 0, 1]])
    np.testing.assert_allclose(ndcg[:, 2], [1, 1 / np.log2(3), 1 / np.log2(5)], rtol=1e-6)
    np.testing.assert_allclose(mrr, [1, 1 / 2, 1 / 4])
    np.testing.assert_array_equal(ranking_metrics(scores, np.array([3, 3, 1])).rank, [1, 3, 2])
    there = np.array([[True, True, True, True], [True, True, False, True], [True, False, True, False]])
    np.testing.assert_array_equal(ranking_metrics(scores, mask=there).rank, [0, 0, 1])
    with pytest.raises(ValueError, match="cutoffs"):
        ranking_metrics(scores, cutoffs=(0,))
