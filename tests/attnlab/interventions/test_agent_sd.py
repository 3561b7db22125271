import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.contract import Given
from attnlab.interventions.agent_sd import AgentSD, agent_sd_attention, match_tokens
from attnlab.models.language_model import LanguageModel
from attnlab.models.vit import ViT
from attnlab.nn.softmax import softmax_attention
from attnlab.points import Edits, attach


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
    rows, columns = np.divmod(np.asarray(merging.tokens.destinations), 7)
    assert sorted(zip(rows // 2, columns // 2, strict=True)) == [(r, c) for r in range(4) for c in range(3)]
    corners = match_tokens(tokens, (9, 7), merged=1, agent_merged=1).tokens.destinations
    rows, columns = np.divmod(np.asarray(corners), 7)
    assert not (rows % 2).any() and not (columns % 2).any()


def test_merges_the_most_similar_first():
    x = np.eye(16, dtype=np.float32)[None]
    x[0, 5] = 3 * x[0, 0]  # token 5 is a source in the direction of token 0, a destination
    merging = match_tokens(x, (4, 4), merged=1, agent_merged=0)
    np.testing.assert_array_equal(merging.tokens.sources[0, 0], 5)
    merged, agents = merging.merge(x)
    assert agents is None
    np.testing.assert_allclose(merging.unmerge(merged)[0, 5], 2 * x[0, 0])


def test_zero_features_are_finite():
    merging = match_tokens(jnp.zeros((1, 16, 3)), (4, 4), merged=8, agent_merged=13)
    assert jnp.isfinite(merging.unmerge(merging.merge(jnp.ones((1, 16, 3)))[0])).all()


def test_too_many_agents_mean_plain_attention(tokens):
    heads = jax.random.normal(jax.random.key(1), (3, 2, 63, 2, 4))
    plain = softmax_attention(*heads)
    np.testing.assert_array_equal(agent_sd_attention(*heads, heads[0, :, :32]), plain)
    np.testing.assert_array_equal(agent_sd_attention(*heads, None), plain)
    assert not np.allclose(agent_sd_attention(*heads, heads[0, :, :31]), plain)


def test_refuses_masks_and_shortcuts_that_have_no_meaning(tokens):
    q, k = jnp.ones((2, 63, 2, 4)), jnp.ones((2, 7, 2, 4))
    with pytest.raises(ValueError, match="mask is not supported through agents"):
        agent_sd_attention(q, q, q, q[:, :9], mask=jnp.ones((2, 63), bool))
    with pytest.raises(ValueError, match=r"shortcut 0.075 .*got 7 and 63"):
        agent_sd_attention(q, k, k, q[:, :9])
    with pytest.raises(ValueError, match=r"grid \(4, 4\) holds 16 tokens, got 63"):
        match_tokens(tokens, (4, 4), merged=1, agent_merged=1)


def vit(**options) -> ViT:
    return ViT((16, 16), 3, patch_size=2, features=8, depth=2, num_heads=2, rngs=nnx.Rngs(0), **options)


def images(batch=2) -> jax.Array:
    return jax.random.normal(jax.random.key(2), (batch, 16, 16, 3))


def test_the_edit_is_attention_of_merged_tokens_through_merged_agents():
    """As the authors' block has it: x + unmerge(attention(merge(norm(x)), agents))."""
    model = vit()
    block = model.blocks[0]
    x = jax.random.normal(jax.random.key(3), (2, 8, 8, 8))

    def edited(x):
        attachment = attach(model, AgentSD((8, 8), ratio=0.25)).interventions[0]
        return block(x, edits=Edits([attachment], 0))

    def by_hand(x):
        tokens = x.reshape(2, 64, 8)
        merging = match_tokens(tokens, (8, 8), merged=16, agent_merged=48)
        merged, agents = merging.merge(block.norm1(tokens))
        mixer = block.mixer
        y = agent_sd_attention(*mixer.project(merged, merged, Given())[:3], mixer.query(agents))
        tokens = tokens + merging.unmerge(mixer.merge(y, merged))
        return (tokens + block.mlp(block.norm2(tokens))).reshape(x.shape)

    got, want, plain = jax.jit(lambda x: (edited(x), by_hand(x), block(x)))(x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert not np.allclose(got, plain, atol=1e-3)


@pytest.mark.slow
def test_layers_on_small_grids_are_left_alone_and_an_odd_batch_takes_no_key():
    model, key = vit(), jax.random.key(0)
    larger = attach(model, AgentSD((16, 16)))  # than the model's tokens: a layer of half its side
    keyed, plain = (attach(model, AgentSD((8, 8), key=k)) for k in (key, None))

    @jax.jit
    def logits(x):
        return [m(part) for part in (x, x[:1]) for m in (model, larger, keyed, plain)]

    whole, left, drawn, fixed, _, _, odd_drawn, odd_fixed = logits(images())
    np.testing.assert_allclose(left, whole, atol=1e-6)
    np.testing.assert_allclose(odd_drawn, odd_fixed, atol=1e-6)
    assert not np.allclose(drawn, fixed, atol=1e-4) and not np.allclose(fixed, whole, atol=1e-4)


def test_is_refused_where_there_is_no_image():
    model = LanguageModel(5, features=8, depth=1, num_heads=2, rngs=nnx.Rngs(0))
    edited = attach(model, AgentSD((2, 2)))
    with pytest.raises(ValueError, match="AgentSD merges the tokens of an image all at once: there is no prefill"):
        edited.prefill(jnp.zeros((1, 4), int), edited.init_state(1, 4))
