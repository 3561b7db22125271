import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.interventions.attention_edits import RowChoice, TokenScaling
from attnlab.interventions.attention_override import AttentionOverride
from attnlab.measure import watch
from attnlab.models.language_model import LanguageModel
from attnlab.points import attach

IDS = np.random.default_rng(0).integers(0, 11, (2, 6))
MODEL = LanguageModel(11, features=8, depth=1, num_heads=2, rngs=nnx.Rngs(0))


def test_rows_attend_to_one_token_each_or_to_none():
    places = jnp.asarray([[0, 0, 1, -1, 3], [0, 1, 2, 3, 4]])
    chosen = jnp.asarray([[True, False, True, True, True]])
    edited = attach(MODEL, RowChoice(places, chosen), heads=jnp.asarray([False, True]))
    logits, seen = watch(edited, IDS)
    weights, before = seen["attention"][0], watch(MODEL, IDS)[1]["attention"][0]
    np.testing.assert_array_equal(weights[:, 0], before[:, 0])
    want = np.array(before[:, 1])
    for b, n in np.ndindex(2, 5):
        if n != 1:
            want[b, n] = np.arange(6) == places[b, n]
    np.testing.assert_allclose(weights[:, 1], want, atol=1e-6)
    # In decoding too, where keys stand in a cache.
    first, state = edited.prefill(IDS[:, :3], edited.init_state(2, 6))
    np.testing.assert_allclose(first, logits[:, :3], atol=1e-5)
    for n in range(3, 6):
        step, state = edited.step(IDS[:, n], state)
        np.testing.assert_allclose(step, logits[:, n], atol=1e-5)


def test_values_and_feed_forwards_are_scaled():
    first = jnp.arange(6)[None] < 1
    mixed = watch(attach(MODEL, TokenScaling(first, values=0.0)), IDS)[1]
    assert not mixed["qkv"][0].v[:, 0].any() and not mixed["heads"][0][:, 0].any()
    fed = watch(attach(MODEL, TokenScaling(first, mlp=2.0)), IDS)[1]["mlp"][0]
    plain = watch(MODEL, IDS)[1]["mlp"][0]
    np.testing.assert_allclose(fed, plain.at[:, 0].multiply(2), rtol=1e-6)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="places must be integers"):
        RowChoice(jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"chosen must be boolean \(B, 3\)"):
        RowChoice(jnp.zeros((1, 3), int), jnp.ones((1, 4), bool))
    with pytest.raises(ValueError, match="tokens must be boolean"):
        TokenScaling(jnp.ones((1, 3)))


def test_the_last_rows_attention_is_put_on_given_tokens():
    tokens = jnp.asarray([[False, True, False, True, False, False], [False] * 6])
    edited = attach(MODEL, AttentionOverride(tokens, share=0.5), heads=jnp.asarray([False, True]))
    weights, before = (watch(model, IDS)[1]["attention"][0] for model in (edited, MODEL))
    want = before.at[0, 1, -1].set(0.5 * before[0, 1, -1] + 0.25 * tokens[0])
    np.testing.assert_allclose(weights, want, atol=1e-6)
