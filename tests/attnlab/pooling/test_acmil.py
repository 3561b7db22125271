"""ACMIL: which favourites are masked, bags of unequal size, branches, the losses."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.models.mil import ACMIL
from attnlab.objectives.attention_diversity import attention_diversity
from attnlab.pooling.acmil import MASKED, MultiBranchHeadsPooling, MultiBranchPooling, mask_top_instances


def bags(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_the_ranks_that_are_masked_follow_the_draws():
    scores, draws = np.asarray([0.0, 5, 1, 4, 3, 2], np.float32), np.asarray([0.9, 0.1, 0.5, 0.3], np.float32)
    got = mask_top_instances(scores, draws, share=0.6)  # two of four: ranks 1 and 3, of scores 4 and 2
    np.testing.assert_array_equal(got, [0, 5, 1, MASKED, 3, MASKED])
    np.testing.assert_array_equal(mask_top_instances(scores, draws, share=0.0), scores)
    assert (np.asarray(mask_top_instances(scores, np.ones(9), share=1.0)) == MASKED).all()
    with pytest.raises(ValueError, match="share must lie"):
        mask_top_instances(scores, draws, share=1.5)


def test_in_a_bag_of_fewer_the_share_is_of_those():
    scores, draws = np.asarray([[3.0, 2, 1, 9, 9]], np.float32), np.asarray([[0.5, 0.2, 0.9, 0.1]], np.float32)
    there = np.asarray([[True, True, True, False, False]])
    got = np.asarray(mask_top_instances(scores, draws, share=0.5, mask=there))[0]
    assert (got[:3] == MASKED).sum() == 1 and got[1] == MASKED and (got[3:] == 9).all()


@pytest.mark.parametrize("heads", [False, True])
def test_absent_instances_change_nothing_and_the_mean_of_weights_is_the_bag(heads):
    options = {"num_branches": 2, "rngs": nnx.Rngs(0)}
    if heads:
        pooling = MultiBranchHeadsPooling(8, num_heads=2, auxiliary=True, **options)
    else:
        pooling = MultiBranchPooling(8, hidden_features=4, **options)
    x, mask = bags(1, 6, 8), np.arange(6) < np.full((1, 1), 4)
    np.testing.assert_allclose(pooling(x, mask=mask), pooling(x[:, :4]), atol=1e-5)
    np.testing.assert_allclose(pooling.branches(x, mask=mask), pooling.branches(x[:, :4]), atol=1e-5)
    if not heads:
        np.testing.assert_allclose(pooling(x), pooling.branches(x).mean(1), atol=1e-5)


def test_masking_acts_in_training_alone_and_is_drawn_anew():
    pooling = MultiBranchPooling(8, num_branches=3, hidden_features=4, masked=4, share=0.5, rngs=nnx.Rngs(0))
    x = jnp.asarray(bags(2, 9, 8))
    assert not (pooling.scores(x) == MASKED).any()
    one, other = (np.asarray(pooling.scores(x, deterministic=False) == MASKED) for _ in range(2))
    assert (one.sum(-1) == 2).all() and (one != other).any()


def test_branches_without_vectors_are_refused():
    with pytest.raises(ValueError, match="auxiliary is False"):
        MultiBranchHeadsPooling(8, num_heads=2, rngs=nnx.Rngs(0)).branches(bags(1, 3, 8))
    with pytest.raises(ValueError, match="attention must be one of gated, heads"):
        ACMIL(4, 8, 2, attention="soft", rngs=nnx.Rngs(0))


def test_the_losses():
    alike = np.broadcast_to(bags(1, 1, 5), (2, 3, 5))
    np.testing.assert_allclose(attention_diversity(alike), 1, atol=1e-6)
    apart = 100 * np.eye(3, dtype=np.float32)[None]
    np.testing.assert_allclose(attention_diversity(apart), 0, atol=1e-6)
    assert not attention_diversity(bags(2, 1, 5)).any()
    logits = ACMIL(4, 8, 3, num_branches=2, hidden_features=4, rngs=nnx.Rngs(0))(bags(2, 5, 4))
    entropy = -np.log(np.asarray(np.exp(logits.bag) / np.exp(logits.bag).sum(-1, keepdims=True)))[[0, 1], [2, 0]]
    each = -np.log(np.exp(logits.branches) / np.exp(logits.branches).sum(-1, keepdims=True))[[0, 1], :, [2, 0]].mean(1)
    want = entropy + each + attention_diversity(logits.scores)
    np.testing.assert_allclose(logits.loss(np.asarray([2, 0])), want, rtol=1e-5)
