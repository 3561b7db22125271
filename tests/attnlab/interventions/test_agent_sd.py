import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.interventions.agent_sd import AgentSD, AgentSDAttention, match_tokens


@pytest.fixture
def tokens():
    return jax.random.normal(jax.random.key(0), (2, 63, 5))


@pytest.mark.parametrize("key", [None, 3])
def test_merging_keeps_the_mean_of_groups_and_unmerging_copies_it_back(tokens, key):
    key = None if key is None else jax.random.key(key)
    merging = match_tokens(tokens, (9, 7), merged=30, agent_merged=50, key=key)
    merged, agents = merging.merge(tokens)
    assert merged.shape == (2, 33, 5) and agents.shape == (2, 63 - 50 + 0, 5)
    whole = np.asarray(merging.unmerge(merged))
    assert whole.shape == tokens.shape
    for example, original in zip(whole, np.asarray(tokens), strict=True):
        values, group, count = np.unique(example, axis=0, return_inverse=True, return_counts=True)
        assert len(values) == 33 and count.sum() == 63
        for index, value in enumerate(values):
            np.testing.assert_allclose(original[group.ravel() == index].mean(0), value, atol=1e-6)


def test_one_destination_in_each_cell(tokens):
    merging = match_tokens(tokens, (9, 7), merged=1, agent_merged=1, key=jax.random.key(0))
    rows, columns = np.divmod(np.asarray(merging.destinations), 7)
    assert sorted(zip(rows // 2, columns // 2, strict=True)) == [(r, c) for r in range(4) for c in range(3)]
    corners = match_tokens(tokens, (9, 7), merged=1, agent_merged=1).destinations
    rows, columns = np.divmod(np.asarray(corners), 7)
    assert not (rows % 2).any() and not (columns % 2).any()


def test_merges_the_most_similar_first():
    x = np.eye(16, dtype=np.float32)[None]
    x[0, 5] = 3 * x[0, 0]  # token 5 is a source in the direction of token 0, a destination
    merging = match_tokens(x, (4, 4), merged=1, agent_merged=0)
    np.testing.assert_array_equal(merging.sources[0, 0], 5)
    merged, agents = merging.merge(x)
    assert agents is None
    np.testing.assert_allclose(merging.unmerge(merged)[0, 5], 2 * x[0, 0])


def test_match_leaves_small_grids_alone_and_takes_no_key_with_an_odd_batch(tokens):
    settings = AgentSD()
    assert settings.match(tokens[:, :16], (8, 8)) is None
    merging = settings.match(tokens, (9, 7))
    assert (merging.merged, merging.agent_merged) == (31, 50)
    odd = settings.match(tokens[:1], (9, 7), key=jax.random.key(0))
    np.testing.assert_array_equal(odd.destinations, merging.destinations)


def test_zero_features_are_finite():
    merging = match_tokens(jnp.zeros((1, 16, 3)), (4, 4), merged=8, agent_merged=13)
    assert jnp.isfinite(merging.unmerge(merging.merge(jnp.ones((1, 16, 3)))[0])).all()


def test_too_many_agents_mean_plain_attention(tokens):
    attention = AgentSDAttention(5, num_heads=2, head_size=4, rngs=nnx.Rngs(0))
    plain = attention(tokens)
    np.testing.assert_array_equal(attention(tokens, agents=tokens[:, :32]), plain)
    assert not np.allclose(attention(tokens, agents=tokens[:, :31]), plain)


def test_refuses_masks_and_shortcuts_that_have_no_meaning(tokens):
    attention = AgentSDAttention(5, num_heads=2, head_size=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="mask is not supported through agents"):
        attention(tokens, agents=tokens[:, :9], mask=jnp.ones((2, 63), bool))
    with pytest.raises(ValueError, match=r"shortcut 0.075 .*got 7 and 63"):
        attention(tokens, tokens[:, :7], agents=tokens[:, :9])
    with pytest.raises(ValueError, match=r"grid \(4, 4\) holds 16 tokens, got 63"):
        match_tokens(tokens, (4, 4), merged=1, agent_merged=1)
