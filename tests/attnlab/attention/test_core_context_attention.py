"""Core context attention: cores and tokens tile the past, what exists alone counts, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import UnsupportedArgument
from attnlab.attention.sparse.core_context_attention import CoreContextAttention
from attnlab.nn.core_context import core_context_attention, core_context_weights
from attnlab.nn.softmax import softmax_attention, weighted_values
from tests.attnlab.attention.sparse_cost import check_growth, temporaries, visited_pairs

TOKENS = 41


@pytest.fixture(scope="module")
def heads():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, TOKENS, h, 8)).astype(np.float32) for h in (4, 2, 2)]


@pytest.mark.parametrize(
    ("pooling", "packed"), [("cca", False), ("cca", True), pytest.param("mean", True, marks=pytest.mark.slow)]
)
def test_it_is_the_weighted_sum_of_its_map(heads, pooling, packed):
    """A window that no group divides, tokens that are missing, segments: by blocks and by all scores at once."""
    q, k, v = heads
    given = {}
    if packed:
        given["mask"] = np.random.default_rng(1).random((2, TOKENS)) < 0.8
        given["segment_ids"] = np.repeat([0, 4, 2], [17, 3, 21])[None].repeat(2, 0)
    options = {"group_size": 3, "window": 5, "pooling": pooling, **given}
    weights = jax.jit(functools.partial(core_context_weights, **options))(q, k)
    y = jax.jit(functools.partial(core_context_attention, **options, implementation="xla"))(q, k, v)
    np.testing.assert_allclose(y, weighted_values(weights, jnp.asarray(v)), rtol=1e-4, atol=1e-5)
    seen = np.asarray(weights) > 0
    past = np.tri(TOKENS, dtype=bool)[None]
    if packed:
        ids, real = given["segment_ids"], given["mask"]
        past = past & (ids[:, :, None] == ids[:, None]) & real[:, :, None] & real[:, None]
    np.testing.assert_array_equal(seen, np.broadcast_to(past[:, None], seen.shape), "all of the past, once")
    np.testing.assert_allclose(np.asarray(weights).sum(-1), np.where(seen.any(-1), 1, 0), atol=1e-5)


def test_short_sequences_are_plain_attention(heads):
    q, k, v = heads
    y = core_context_attention(q, k, v, group_size=16, window=TOKENS - 15, implementation="reference")
    np.testing.assert_allclose(y, softmax_attention(q, k, v, causal=True), rtol=1e-5, atol=1e-6)


def test_refusals(heads):
    with pytest.raises(ValueError, match="at least 1"):
        core_context_attention(*heads, group_size=0)
    with pytest.raises(ValueError, match="pooling must be one of cca, mean, max"):
        core_context_attention(*heads, pooling="sum")
    with pytest.raises(ValueError, match="no weights"):
        core_context_weights(*heads[:2], pooling="max")
    with pytest.raises(UnsupportedArgument, match="causal"):
        CoreContextAttention(8, num_heads=2, causal=False, rngs=nnx.Rngs(0))
    mixer = CoreContextAttention(8, num_heads=2, group_size=2, window=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="max_length 4"):
        mixer.prefill(np.zeros((1, 5, 8), np.float32), mixer.init_state(1, 4))


SIZES = {"group_size": 16, "window": 64}


def declared(tokens: int) -> float:
    return tokens * (tokens / SIZES["group_size"] / 2 + SIZES["window"] + SIZES["group_size"])


@pytest.mark.slow
def test_visited_pairs_grow_as_declared():
    """O(N·(N/g + w + g)), in training and in a prefill behind a cache; a step looks at cores and recent tokens."""
    pairs = []
    for tokens in (1024, 4096):
        q = jnp.zeros((1, tokens, 1, 4))
        pairs.append(visited_pairs(functools.partial(core_context_attention, **SIZES), q, q, q))
        assert pairs[-1] <= 2.5 * declared(tokens)
    check_growth(tuple(pairs), (declared(1024), declared(4096)))
    assert pairs[1] <= 4096**2 / 8, "a quarter of causal attention"

    mixer = CoreContextAttention(4, num_heads=1, **SIZES, rngs=nnx.Rngs(0))
    x, state = jnp.zeros((1, 2048, 4)), mixer.init_state(1, 4096)
    _, half = jax.jit(lambda x, state: mixer.prefill(x, state))(x, state)
    assert visited_pairs(mixer.prefill, x, half) <= 2.5 * (declared(4096) - declared(2048))
    assert visited_pairs(mixer.step, x[:, 0], half) <= 2048 / 16 + 64 + 16 + 2 * 128


@pytest.mark.slow
def test_memory_grows_with_the_tokens():
    """O(N·H·(D+E)): four times the tokens, four times the memory of a training step, not sixteen."""
    attend = functools.partial(core_context_attention, **SIZES)
    bytes_of = [temporaries(attend, *(jax.ShapeDtypeStruct((1, n, 2, 16), jnp.float32),) * 3) for n in (1024, 4096)]
    check_growth(tuple(bytes_of), (1024, 4096))
    assert bytes_of[1] <= 64 * 4 * 3 * 4096 * 2 * 16
