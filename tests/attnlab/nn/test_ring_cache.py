"""Caches of part of the tokens against lists of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.nn.ring_cache import BlockMeans, RingCache


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def kept(place, size, sinks):
    """Tokens that a head holds after token `place`, in order."""
    sinks = min(sinks, size)
    return [t for t in range(place + 1) if t < sinks or place - t < size - sinks]


@pytest.mark.parametrize("runs", [(12,), (1,) * 12, (5, 1, 4, 2)])
def test_heads_see_their_sinks_and_their_newest_tokens(runs):
    sizes, sinks = (3, 6, 2), (1, 2, 5)
    keys, values = draw(0, 2, 12, 3, 4), draw(1, 2, 12, 3, 2)
    real = np.ones((2, 12), bool)
    real[1, [0, 1, 7]] = False
    cache = RingCache.create(2, sizes, 3, 4, 2, sinks=sinks)
    look, start = jax.jit(lambda cache, *new: cache.look(*new)), 0
    for run in runs:
        now = slice(start, start + run)
        held, cache = look(cache, keys[:, now], values[:, now], real[:, now])
        for b, n, g in np.ndindex(2, run, 3):
            if not real[b, start + n]:
                continue
            tokens = np.flatnonzero(real[b])
            place = int(real[b, : start + n + 1].sum()) - 1
            seen = np.flatnonzero(held.visible[b, g, n])
            seen = seen[np.argsort(held.order[b, seen, g])]
            want = kept(place, sizes[g], sinks[g])
            np.testing.assert_array_equal(held.order[b, seen, g], want)
            np.testing.assert_array_equal(held.at[b, seen, g], want)
            np.testing.assert_array_equal(held.keys[b, seen, g], keys[b, tokens[want], g])
            np.testing.assert_array_equal(held.values[b, seen, g], values[b, tokens[want], g])
        start += run
    np.testing.assert_array_equal(cache.length, real.sum(1))
    assert cache.keys.shape == (2, 6, 3, 4)
    for b, g in np.ndindex(2, 3):
        order = np.asarray(cache.order())[b, :, g]
        assert sorted(order[order >= 0]) == kept(real[b].sum() - 1, sizes[g], sinks[g])


def test_positions_are_those_given_and_the_dtype_is_kept():
    cache = RingCache.create(1, 2, 1, 2, 2, dtype=jnp.bfloat16)
    _, cache = cache.look(draw(0, 1, 3, 1, 2), draw(1, 1, 3, 1, 2), at=np.array([[4, 7, 8]]))
    held, cache = cache.look(draw(0, 1, 1, 1, 2), draw(1, 1, 1, 1, 2))
    assert cache.keys.dtype == held.values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.sort(held.at[0, :, 0]), [7, 8, 9])
    np.testing.assert_array_equal(cache.next_at, [10])
    for call, words in (
        (lambda: RingCache.create(1, (2, 3), 3, 2, 2), "sizes must be a number, or 3"),
        (lambda: RingCache.create(1, 2, 3, 2, 2, sinks=-1), "sinks must be"),
        (lambda: RingCache.create(1, 2, 0, 2, 2), "num_heads must be at least 1"),
        (lambda: cache.look(draw(0, 1, 1, 2, 2), draw(0, 1, 1, 1, 2)), "keys must be"),
        (lambda: cache.look(draw(0, 1, 1, 1, 2), draw(0, 1, 1, 1, 2), np.ones((1, 2), bool)), "mask must be"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_means_of_blocks_grow_with_the_tokens():
    keys, real = draw(0, 2, 7, 2, 3), np.ones((2, 7), bool)
    real[1, [0, 4]] = False
    means = BlockMeans.create(2, 9, 3, 2, 3)
    for now in (slice(0, 4), slice(4, 5), slice(5, 7)):
        means = means.append(jnp.asarray(keys[:, now], jnp.float32), real[:, now])
    got = np.asarray(means.means())
    for b in range(2):
        tokens = np.float64(keys[b, real[b]])
        for block in range(3):
            part = tokens[3 * block : 3 * block + 3]
            np.testing.assert_allclose(got[b, block], part.mean(0) if len(part) else 0 * tokens[0], atol=1e-6)
    np.testing.assert_array_equal(means.counts(), [[3, 3, 1], [3, 2, 0]])
