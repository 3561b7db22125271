"""Landmark attention: the form in memory and the one without, retrieval, and what a memory costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.sparse.landmark_attention import LandmarkAttention, Landmarks
from attnlab.contract import Given, UnsupportedArgument, View
from attnlab.models.landmark_gpt import LandmarkGPT, with_landmarks
from attnlab.nn.landmarks import landmark_attention, landmark_grouped_softmax
from attnlab.nn.softmax import attention_scores, softmax_attention, weighted_values
from pallas_kernels.masks import Causal, SlidingWindow
from tests.attnlab.attention.sparse_cost import check_growth, temporaries, visited_pairs

TOKENS = 30


@pytest.fixture(scope="module")
def heads():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, TOKENS, h, 8)).astype(np.float32) for h in (4, 2, 2)]


@pytest.mark.parametrize("packed", [False, True])
def test_without_weights_in_memory_it_is_the_same(heads, packed):
    """Landmarks in front, behind each other and none for long; with tokens that are missing, in segments."""
    q, k, v = heads
    flags = np.zeros((2, TOKENS), bool)
    flags[0, [0, 4, 5, 6, 20]] = flags[1, [7, 8, 28, 29]] = True
    given, mask, real = {}, np.tri(TOKENS, dtype=bool)[None], np.ones((2, TOKENS), bool)
    if packed:
        given["mask"] = real = np.random.default_rng(1).random((2, TOKENS)) < 0.8
        given["segment_ids"] = ids = np.repeat([0, 4, 2], [9, 3, 18])[None].repeat(2, 0)
        mask, flags = mask & (ids[:, :, None] == ids[:, None]) & real[:, None], flags & real

    def dense(q, k, v):
        y = weighted_values(landmark_grouped_softmax(attention_scores(q, k), flags, mask=mask[:, None]), v)
        return y * real[..., None, None]  # what a token that is missing sees is not said

    def sparse(q, k, v):
        y = landmark_attention(q, k, v, flags, max_landmarks=5, implementation="xla", **given)
        return y * real[..., None, None]

    def both(f):
        cotangent = np.random.default_rng(2).standard_normal(q.shape).astype(np.float32)
        return jax.jit(lambda *heads: (lambda y, pull: (y, *pull(cotangent)))(*jax.vjp(f, *heads)))(q, k, v)

    for got, want in zip(both(sparse), both(dense), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


def test_rows_sum_to_what_blocks_without_tokens_leave(heads):
    scores = attention_scores(*heads[:2])
    weights = landmark_grouped_softmax(scores, np.arange(TOKENS)[None] % 5 == 4)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert not np.any(weights[..., 4::5]), "values of landmarks never count"
    weights = landmark_grouped_softmax(scores, np.isin(np.arange(TOKENS), [0, 9, 10])[None])
    assert not np.any(weights[:, :, 0]), "a landmark in front sees nothing"
    assert np.all(np.asarray(weights[:, :, 12]).sum(-1) < 0.999), "the block of a landmark alone takes its weight"


MODEL = {"features": 8, "depth": 1, "num_heads": 2, "frequency": 3, "mlp_features": 8, "landmark_id": 6}


@pytest.mark.slow
def test_a_memory_of_all_blocks_is_the_whole_text():
    """While every block is retrieved they stand where they stood, and runs of any lengths give the whole's logits."""
    ids = np.random.default_rng(0).integers(0, 6, (2, 10))
    graph, weights = nnx.split(LandmarkGPT(7, **MODEL, memory_blocks=3, topk=2, rngs=nnx.Rngs(0)))
    text = with_landmarks(ids, 3, 6)
    ordinary = np.arange(text.shape[1]) % 4 < 3
    np.testing.assert_array_equal(text[:, 3::4], 6)
    np.testing.assert_array_equal(np.asarray(text)[:, ordinary], ids)

    @jax.jit
    def read(weights):
        model, memory, found = nnx.merge(graph, weights), None, []
        for first, last in ((0, 4), (4, 10)):
            logits, memory = model.extend(ids[:, first:last], memory)
            found.append(logits)
        _, state = model.prefill(text[:, :5], model.init_state(2, 8))
        return model(text), jnp.concatenate(found, 1), memory, model.step(text[:, 5], state)[0]

    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(read, weights)
    want, found, (memory,), step = read(weights)
    np.testing.assert_allclose(found, want[:, ordinary], rtol=1e-4, atol=1e-5)
    assert int(memory.blocks) == 3 and memory.open_keys.shape[1] == 1 and int(memory.length[0]) == 13
    np.testing.assert_allclose(step, want[:, 5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("topk", [0, 1])
def test_what_is_retrieved_is_seen_and_nothing_else(topk):
    """Without retrieval a complete block is gone; with it the block that a query weighs most is found."""
    mixer = LandmarkAttention(4, num_heads=1, block_length=3, topk=topk, rngs=nnx.Rngs(0))
    for name in ("query", "key", "value"):
        getattr(mixer, name).kernel[...] = jnp.eye(4)[:, None]
    mixer.out.kernel[...] = jnp.eye(4)[None]
    x = np.zeros((1, 13, 4), np.float32)
    for block in range(4):
        x[0, 3 * block + 2, block] = 30.0  # its landmark, that channel `block` finds
        x[0, 3 * block : 3 * block + 2, 3] = block + 1.0
    x[0, 12, 1] = 4.0

    @jax.jit
    def last(x):
        _, memory = mixer.prefill(x[:, :12], mixer.init_memory(1, 4))
        return mixer.prefill(x[:, 12:], memory)[0]

    np.testing.assert_allclose(last(x)[0, 0, 3], 2.0 * topk, atol=1e-3)


def test_refusals(heads):
    with pytest.raises(ValueError, match="at least 2"):
        landmark_attention(*heads, 1)
    with pytest.raises(ValueError, match="softmax must be one of"):
        landmark_attention(*heads, 3, softmax="soft")
    mixer = LandmarkAttention(8, num_heads=2, block_length=3, rngs=nnx.Rngs(0))
    x = np.zeros((1, 4, 8), np.float32)
    with pytest.raises(UnsupportedArgument, match="rule"):
        mixer(x, mask=View(rule=SlidingWindow(2, 0)))
    with pytest.raises(ValueError, match="q_labels"):
        mixer(x, mask=View(rule=Landmarks()))
    with pytest.raises(UnsupportedArgument, match="positions"):
        mixer.prefill(x, mixer.init_memory(1, 2), positions=np.zeros((1, 4), np.int32))
    with pytest.raises(ValueError, match="selection must be one of"):
        LandmarkAttention(8, num_heads=2, selection="random", rngs=nnx.Rngs(0))
    model = nnx.eval_shape(lambda: LandmarkGPT(7, **MODEL, rngs=nnx.Rngs(0)))
    with pytest.raises(UnsupportedArgument, match="mask"):
        model(np.zeros((1, 4), int), mask=View(rule=Causal()))
    with pytest.raises(UnsupportedArgument, match="embeddings"):
        model(embeddings=np.zeros((1, 4, 8)))


def test_visited_pairs_grow_as_declared():
    """In a call half of N²; behind a memory K blocks and the run for each token, however many blocks there are."""
    training = []
    for tokens in (512, 1024):
        q = jnp.zeros((1, tokens, 1, 4))
        training.append(visited_pairs(functools.partial(landmark_attention, landmarks=16), q, q, q))
    check_growth(tuple(training), (512**2, 1024**2))
    assert training[1] <= 1.3 * 1024**2 / 2
    mixer = LandmarkAttention(4, num_heads=1, block_length=16, topk=2, rngs=nnx.Rngs(0))
    run, behind = jnp.zeros((1, 16, 4)), []
    for blocks in (8, 64):
        memory = dataclasses.replace(mixer.init_memory(1, blocks), blocks=jnp.asarray(blocks, jnp.int32))
        behind.append(visited_pairs(mixer.prefill, run, memory))
    assert behind[0] == behind[1] <= 16 * (2 * 15 + 16)


@pytest.mark.slow
@pytest.mark.parametrize("softmax", ["plain", "tokens"])
def test_other_softmaxes(heads, softmax):
    """What they see, and that regular landmarks and those of an array are the same."""
    q, k, v = heads
    flags = np.arange(TOKENS)[None] % 7 == 6
    unseen = flags[:, None] & (np.eye(TOKENS, dtype=bool) if softmax == "plain" else True)
    want = softmax_attention(q, k, v, mask=(np.tri(TOKENS, dtype=bool) & ~unseen)[:, None])
    for landmarks in (7, np.repeat(flags, 2, axis=0)):
        y = landmark_attention(q, k, v, landmarks, softmax=softmax)
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    y = landmark_attention(q[:, 10:], k, v, 7, index=10, softmax=softmax)
    np.testing.assert_allclose(y, want[:, 10:], rtol=1e-4, atol=1e-5)
    mixer = LandmarkAttention(8, num_heads=2, block_length=7, softmax=softmax, rngs=nnx.Rngs(0))
    x = np.random.default_rng(4).standard_normal((1, 16, 8)).astype(np.float32)
    view = mixer._view((16,), None, Given())
    weights = mixer.core.attention(mixer.project(x, x, Given()), view)
    dense = mixer.merge(weighted_values(weights, mixer.value(x)), x)
    np.testing.assert_allclose(mixer(x), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_more_landmarks_than_were_said_are_nan(heads):
    flags = np.arange(TOKENS) % [[9], [3]] == 2
    y = landmark_attention(*heads, flags, max_landmarks=4)
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()


@pytest.mark.slow
def test_memory_grows_as_declared():
    """A step behind a memory takes O(Z) beside it for the landmarks, not O(Z·F); a call's table is O(N²/F)."""
    mixer = LandmarkAttention(32, num_heads=2, block_length=33, topk=2, rngs=nnx.Rngs(0))
    x, needed = jax.ShapeDtypeStruct((1, 1, 32), jnp.float32), []
    for blocks in (64, 1024):
        memory = jax.eval_shape(functools.partial(mixer.init_memory, 1, blocks))
        step = jax.jit(lambda x, memory: mixer.prefill(x, memory)[0]).lower(x, memory).compile()
        needed.append(step.memory_analysis().temp_size_in_bytes)
    assert needed[1] - needed[0] <= 16 * 4 * 1024 * 32, "of landmarks, not of blocks"

    attend = functools.partial(landmark_attention, landmarks=32)
    few, many = (temporaries(attend, *(jax.ShapeDtypeStruct((1, n, 2, 16), jnp.float32),) * 3) for n in (1024, 2048))
    check_growth((few, many), (1024**2, 2048**2))
    assert many <= 16 * 4 * 2 * (2048**2 / 32 + 2048 * 512), "of tables and of the scores of 512 keys together"
