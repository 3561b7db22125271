"""Dynamic mask attention: the gathered form against all pairs, ties, decoding's choice, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.sparse.dynamic_mask_attention import DynamicMaskAttention
from attnlab.nn.dynamic_mask import dynamic_mask_attention, kept_keys
from attnlab.nn.running_top import running_top
from attnlab.nn.softmax import softmax_attention
from tests.attnlab.attention.sparse_cost import check_growth, temporaries, visited_pairs

TOKENS = 37


@pytest.fixture(scope="module")
def heads():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, TOKENS, h, 8)).astype(np.float32) for h in (4, 2, 2))
    return q, k, v, rng.standard_normal((2, 2, 1, TOKENS)).astype(np.float32)


@pytest.mark.parametrize(
    ("queries", "options"),
    [
        (TOKENS, {"window": 5, "causal": True}),
        pytest.param(11, {"window": 6, "causal": True}, marks=pytest.mark.slow),
        (TOKENS, {"window": 9}),
        pytest.param(TOKENS, {"window": 5, "causal": True, "mask_type": "relu"}, marks=pytest.mark.slow),
    ],
)
def test_gathered_it_is_the_same_as_by_all_pairs(heads, queries, options):
    """Also its gradients, those of the bias among them, and for fewer queries than keys."""
    q, k, v, bias = heads
    q = q[:, -queries:]
    rows = np.broadcast_to(bias, (2, 2, queries, TOKENS))

    def both(bias):
        f = functools.partial(dynamic_mask_attention, **options, implementation="xla")
        cotangent = np.random.default_rng(2).standard_normal(q.shape).astype(np.float32)
        return jax.jit(lambda *a: (lambda y, pull: (y, *pull(cotangent)))(*jax.vjp(f, *a)))(q, k, v, bias)

    *got, of_bias = both(bias)
    *want, of_rows = both(rows)
    for one, other in zip((*got, of_bias), (*want, of_rows.sum(2, keepdims=True)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


def test_what_is_kept():
    bias = np.array([3.0, 1.0, 2.0, 2.0, 0.0, -1.0])[None, None, None]
    causal = np.tri(6, dtype=bool)[None, None]
    kept = np.asarray(kept_keys(bias, causal, 2))[0, 0]
    np.testing.assert_array_equal(kept.sum(1), [1, 2, 2, 2, 2, 2])
    np.testing.assert_array_equal(kept[-1], [1, 0, 0, 1, 0, 0], "of equal ones the later")
    equal = np.asarray(kept_keys(np.zeros((1, 1, 1, 6)), causal, 3))[0, 0]
    np.testing.assert_array_equal(equal, np.tri(6, dtype=bool) & ~np.tri(6, k=-3, dtype=bool), "a sliding window")
    smooth = functools.partial(kept_keys, bias, causal, 2, block_size=2)
    np.testing.assert_array_equal(np.asarray(smooth(whole_blocks=True))[0, 0, :3], [[0] * 6, [1, 1] + [0] * 4, [0] * 6])
    last = np.asarray(kept_keys(bias[..., :5], None, 4, block_size=2))[0, 0, 0]
    np.testing.assert_array_equal(last, [1, 1, 1, 1, 0], "the last block is of one key, which is dropped")
    positive = np.asarray(kept_keys(bias, causal, 1, mask_type="relu"))[0, 0, -1]
    np.testing.assert_array_equal(positive, [1, 1, 1, 1, 0, 0])


@pytest.mark.parametrize("block", [3, 4])
def test_running_top_knows_what_each_prefix_keeps(block):
    """With tokens that do not exist, in segments; values tie."""
    rng = np.random.default_rng(3)
    values = rng.integers(0, 5, (2, 13, 2)).astype(np.float32)
    real, ids = rng.random((2, 13)) < 0.8, np.repeat([0, 1], [6, 7])[None].repeat(2, 0)
    slots = np.broadcast_to(np.arange(13), (2, 13))
    nothing = jnp.full((2, 2, 3), -1, jnp.int32)
    top = jax.jit(functools.partial(running_top, window=3, block=block))(
        values, slots, nothing, jnp.zeros((2, 2, 3)), real=real, segment_ids=ids
    )
    allowed = (np.tri(13, dtype=bool) & (ids[:, :, None] == ids[:, None]) & real[:, None])[:, None]
    want = np.asarray(kept_keys(np.moveaxis(values, 2, 1)[:, :, None], allowed, 3))
    for b, g, i in np.ndindex(2, 2, 13):
        tile, place = divmod(i, block)
        candidates = np.asarray(top.slots[b, tile, g])
        kept = candidates[np.asarray(top.ranks[b, tile, g]) <= np.asarray(top.last[b, tile, g, place])]
        kept = [j for j in kept if j <= i and ids[b, j] == ids[b, i]]
        np.testing.assert_array_equal(np.sort(kept), np.flatnonzero(want[b, g, i]))


def test_a_window_of_all_keys_adds_the_bias_alone(heads):
    q, k, v, bias = heads
    y = dynamic_mask_attention(q, k, v, bias, window=TOKENS, causal=True, implementation="reference")
    want = softmax_attention(q, k, v, bias=np.repeat(bias, 2, axis=1), causal=True)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


def test_refusals(heads):
    with pytest.raises(ValueError, match="window and block_size"):
        dynamic_mask_attention(*heads, window=0)
    with pytest.raises(ValueError, match="mask_type must be one of topk, relu"):
        dynamic_mask_attention(*heads, window=2, mask_type="top")
    with pytest.raises(ValueError, match="bias must be"):
        dynamic_mask_attention(*heads[:3], heads[3][:, :1], window=2)
    with pytest.raises(ValueError, match="variant must be one of exp, linear"):
        DynamicMaskAttention(8, num_heads=2, variant="log", rngs=nnx.Rngs(0))


WINDOW = 64


@pytest.mark.slow
def test_visited_pairs_grow_as_declared():
    """O(N·w): in training, in a prefill behind a cache, and in a step, whatever there is in front of it."""
    attend, pairs = functools.partial(dynamic_mask_attention, window=WINDOW, causal=True), []
    for tokens in (512, 2048):
        q = jnp.zeros((1, tokens, 1, 4))
        bias = jnp.asarray(np.random.default_rng(0).random((1, 1, 1, tokens)), jnp.float32)
        pairs.append(visited_pairs(attend, q, q, q, bias))
        assert pairs[-1] <= 2 * tokens * WINDOW
    check_growth(tuple(pairs), (512, 2048))

    mixer = DynamicMaskAttention(4, num_heads=1, window=WINDOW, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 512, 4)), jnp.float32)
    _, state = jax.jit(lambda x: mixer.prefill(x, mixer.init_state(1, 2048)))(x)
    assert visited_pairs(mixer.prefill, x, state) <= 2 * 512 * WINDOW
    assert visited_pairs(mixer.step, x[:, 0], state) <= WINDOW + 128


@pytest.mark.slow
def test_memory_grows_with_the_tokens():
    """O(N·H·(D+E)) of a training step beside what the window takes: four times the tokens, four times the memory."""
    attend = functools.partial(dynamic_mask_attention, window=WINDOW, causal=True)
    few, many = (
        temporaries(attend, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in (*((1, n, 2, 16),) * 3, (1, 2, 1, n))))
        for n in (1024, 4096)
    )
    check_growth((few, many), (1024, 4096))
    assert many <= 64 * 4 * 4096 * 2 * 16 * 3
