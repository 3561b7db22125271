"""The cache of keys and values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.nn.cache import KVCache
from attnlab.nn.dense_mixer import with_core
from attnlab.nn.softmax_core import SoftmaxCore


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_tokens_fill_slots_in_order_and_padding_none():
    cache = KVCache.create(2, 6, 2, 4, 3)
    keys, values = draw(0, 2, 3, 2, 4), draw(1, 2, 3, 2, 3)
    mask = np.array([[True, True, True], [False, False, True]])
    np.testing.assert_array_equal(cache.positions(3, mask), [[0, 1, 2], [-1, -1, 0]])
    cache = cache.append(keys, values, mask)
    np.testing.assert_array_equal(cache.length, [3, 1])
    np.testing.assert_array_equal(cache.positions(2), [[3, 4], [1, 2]])
    more = draw(2, 2, 2, 2, 4)
    cache = cache.append(more, draw(3, 2, 2, 2, 3))
    np.testing.assert_array_equal(cache.keys[0], np.concatenate([keys[0], more[0], np.zeros((1, 2, 4))]))
    np.testing.assert_array_equal(cache.keys[1], np.concatenate([keys[1, 2:], more[1], np.zeros((3, 2, 4))]))
    np.testing.assert_array_equal(cache.values[1, 0], values[1, 2])


def test_the_dtype_of_the_cache_is_kept():
    cache = KVCache.create(1, 4, 1, 2, 2, dtype=jnp.bfloat16)
    assert cache.append(draw(0, 1, 1, 1, 2), draw(0, 1, 1, 1, 2)).keys.dtype == jnp.bfloat16


def test_what_is_beyond_the_last_slot_is_not_stored_under_jit():
    append = jax.jit(lambda cache, keys: cache.append(keys, keys))
    cache = append(KVCache.create(1, 3, 1, 2, 2), draw(0, 1, 2, 1, 2))
    before = np.asarray(cache.keys)
    cache = append(cache, np.stack([draw(1, 1, 1, 2), draw(2, 1, 1, 2)], 1))
    np.testing.assert_array_equal(cache.keys[:, :2], before[:, :2])
    np.testing.assert_array_equal(cache.keys[0, 2, 0], draw(1, 1, 1, 2)[0, 0])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda cache: cache.append(draw(0, 2, 5, 1, 2), draw(0, 2, 5, 1, 2)), "5 tokens do not fit .* max_length 4"),
        (lambda cache: cache.append(draw(0, 1, 2, 1, 2), draw(0, 1, 2, 1, 2)), "keys must be"),
        (lambda cache: cache.append(draw(0, 2, 2, 1, 2), draw(0, 2, 2, 1, 3)), "values must be"),
        (lambda cache: cache.positions(2, np.ones((2, 3), bool)), "mask must be"),
        (lambda cache: KVCache.create(2, 0, 1, 2, 2), "max_length must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(KVCache.create(2, 4, 1, 2, 2))


def test_keys_alone():
    cache = KVCache.create(1, 3, 1, 4, 0).append(draw(0, 1, 2, 1, 4), np.zeros((1, 2, 1, 0)))
    assert cache.values.shape == (1, 3, 1, 0)
    np.testing.assert_array_equal(cache.keys[0, :2], draw(0, 1, 2, 1, 4)[0])


def test_unrotated_keys_are_rotated_when_read():
    x = draw(0, 2, 6, 8)
    mixer = SoftmaxAttention(8, num_heads=2, num_kv_heads=1, causal=True, rotary=100.0, rngs=nnx.Rngs(0))
    read = with_core(mixer, SoftmaxCore(2, rotary=100.0, cache_rotated=False))
    positions = np.array([[0, 2, 3, 5, 6, 9]])
    want = mixer(x, positions=positions)
    state = read.init_state(2, 6)
    first, state = read.prefill(x[:, :4], state, positions=positions[:, :4])
    np.testing.assert_array_equal(state.keys[:, :4], mixer.key(x[:, :4]))
    rest, _ = read.prefill(x[:, 4:], state, positions=positions[:, 4:])
    np.testing.assert_allclose(np.concatenate([first, rest], 1), want, atol=1e-6)
