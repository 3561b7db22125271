"""LS-attention: short heads against a dense softmax under a window, with and without the op of windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.dense.ls_attention import LongShortAttention, long_short_attention
from attnlab.nn.softmax import attention_scores
from tests.accuracy import relative_rms


def dense(q, k, v, short_heads, window, causal):
    q, k, v = (np.asarray(part, np.float64) for part in (q, k, v))
    shared = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, shared, axis=2), np.repeat(v, shared, axis=2)
    behind = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])
    y = np.zeros((*q.shape[:3], v.shape[3]))
    for head in range(q.shape[2]):
        scores = np.einsum("bnd,bmd->bnm", q[:, :, head], k[:, :, head]) / q.shape[3] ** 0.5
        seen = behind >= 0 if causal else np.ones_like(behind, bool)
        seen = seen & (np.abs(behind) < window) if head < short_heads else seen
        weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        y[:, :, head] = weights / weights.sum(-1, keepdims=True) @ v[:, :, head]
    return y


@pytest.mark.parametrize("causal", [True, False])
def test_short_heads_are_a_softmax_under_a_window(causal):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 11, heads, 4)).astype(np.float32) for heads in (6, 3, 3))
    options = {"short_heads": 4, "window": 3, "causal": causal}
    want = dense(q, k, v, **options)
    plain = jax.jit(lambda *heads: long_short_attention(*heads, **options))
    masked = jax.jit(lambda *heads: long_short_attention(*heads, **options, mask=jnp.ones((1, 1, 11, 11), bool)))
    assert relative_rms(plain(q, k, v), want) < 1e-6
    assert relative_rms(masked(q, k, v), want) < 1e-6, "all scores under a mask give the same"


def test_scores_are_recorded_for_the_measure_of_instability():
    mixer = LongShortAttention(8, num_heads=4, window=2, rngs=nnx.Rngs(0))
    assert mixer.core.short_heads == 3, "a quarter of the heads is long"
    x = jax.random.normal(jax.random.key(1), (1, 5, 8))
    _, recorded = nnx.capture(mixer, nnx.Intermediate)(x)
    want = attention_scores(mixer.query(x), mixer.key(x))
    np.testing.assert_allclose(recorded["scores"][0], want, rtol=1e-6)
    weights = recorded["attention"][0]
    assert not np.any(np.tril(weights, -2)[:, :3]), "short heads see two tokens"
    assert np.all(np.tril(weights[:, 3])[0, np.tri(5, dtype=bool)] > 0), "the long one sees all before"


def test_state_of_short_heads_does_not_grow():
    mixer = LongShortAttention(8, num_heads=4, window=2, rngs=nnx.Rngs(0))
    state = jax.eval_shape(lambda: mixer.init_state(1, 50))
    assert state.short.keys.shape == (1, 2, 3, 2)
    assert state.long.keys.shape == (1, 50, 1, 2)


def test_heads_that_do_not_fit():
    with pytest.raises(ValueError, match="share a key head"):
        LongShortAttention(8, num_heads=4, num_kv_heads=2, long_heads=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="short_heads below num_heads"):
        LongShortAttention(8, num_heads=4, long_heads=0, rngs=nnx.Rngs(0))
