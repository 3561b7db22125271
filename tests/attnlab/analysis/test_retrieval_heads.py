import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.analysis.retrieval_heads import decoded_attention, needle_span, recalled, retrieval_scores
from attnlab.measure import watch
from attnlab.models.language_model import LanguageModel


def test_span_is_the_first_window_with_nearly_all_distinct_tokens():
    needle = np.array([7, 8, 7, 9])
    assert needle_span(np.array([1, 7, 8, 7, 9, 2]), needle).tolist() == [1, 5]
    assert needle_span(np.array([1, 9, 8, 3, 7, 2]), needle).tolist() == [1, 5], "order does not count"
    assert needle_span(np.array([1, 7, 8, 2, 9, 2]), needle, overlap=0.6).tolist() == [0, 4]
    assert needle_span(np.array([1, 7, 8, 2, 5, 9]), needle).tolist() == [-1, -1]


def test_recall_counts_each_token_as_often_as_it_is_there():
    needle = np.array([[7, 8, 7, 9]] * 3)
    answer = np.array([[7, 8, 1, 1], [7, 7, 8, 9], [2, 2, 2, 2]])
    np.testing.assert_allclose(recalled(needle, answer), [0.5, 1, 0])


def test_a_hit_is_the_needles_token_that_is_copied():
    prompt, needle = np.array([1, 5, 6, 7, 2]), np.array([5, 6, 7])
    attention = jax.nn.one_hot(
        jnp.asarray([[[[1, 3], [0, 1]], [[2, 2], [2, 1]]]]), 6
    )  # (1, 2 steps, 2 layers, 2 heads)
    found = retrieval_scores(attention, np.array([[5, 6]]), prompt, needle)
    np.testing.assert_allclose(found.score, [[2 / 3, 1 / 3], [1 / 3, 1 / 3]])
    both = retrieval_scores(jnp.tile(attention, (2, 1, 1, 1, 1)), np.array([[5, 6], [-1, -1]]), prompt, needle)
    np.testing.assert_allclose(both.score, found.score / 2)
    counted = retrieval_scores(
        jnp.tile(attention, (2, 1, 1, 1, 1)),
        np.array([[5, 6], [-1, -1]]),
        prompt,
        needle,
        counted=np.array([True, False]),
    )
    np.testing.assert_allclose(counted.score, found.score)
    with pytest.raises(ValueError, match=r"topk must lie in 1\.\.6"):
        retrieval_scores(attention, np.array([[5, 6]]), prompt, needle, topk=7)


def test_decoding_keeps_the_last_rows_of_attention():
    model = LanguageModel(11, features=8, depth=2, num_heads=2, rngs=nnx.Rngs(0))
    prompts = np.random.default_rng(0).integers(0, 11, (2, 5))
    attention, tokens = decoded_attention(model, prompts, steps=3)
    assert attention.shape == (2, 3, 2, 2, 7) and tokens.shape == (2, 3)
    whole = np.concatenate([prompts, tokens[:, :2]], 1)
    logits, seen = watch(model, whole)
    np.testing.assert_array_equal(tokens, logits[:, 4:].argmax(-1))
    for layer in range(2):
        np.testing.assert_allclose(
            attention[:, :, layer], jnp.swapaxes(seen["attention"][layer][:, :, 4:], 1, 2), atol=1e-5
        )
