import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.analysis.extreme_tokens import extreme_tokens


def test_equals_means_by_hand():
    random = np.random.default_rng(0)
    scores = random.standard_normal((2, 3, 6, 6)).astype(np.float32)
    weights = np.exp(scores) * np.tri(6)
    values, stream = random.standard_normal((2, 6, 3, 4)), random.standard_normal((2, 6, 8))
    active = np.array([[0, 0, 1, 0, 1, 1], [0, 1, 0, 0, 0, 0]], bool)
    found = extreme_tokens(weights, values, stream, active=jnp.asarray(active), scores=scores, renormalize=True)
    weights /= weights.sum(-1, keepdims=True)
    for b in range(2):
        dormant, busy = ([n for n in range(1, 6) if active[b, n] == flag] for flag in (False, True))
        np.testing.assert_allclose(found.dormant_sink[b], weights[b][:, dormant, 0].mean(-1), rtol=1e-5)
        np.testing.assert_allclose(found.active_sink[b], weights[b][:, busy, 0].mean(-1), rtol=1e-5)
        np.testing.assert_allclose(found.active_back[b], np.mean([weights[b, :, n, n - 1] for n in busy], 0), rtol=1e-5)
        size = np.linalg.norm(values[b], axis=-1)
        np.testing.assert_allclose(found.drain[b], size[0] / size[1:].mean(0), rtol=1e-5)
        size = np.linalg.norm(stream[b], axis=-1)
        np.testing.assert_allclose(found.peak[b], size[0] / size[1:].mean(), rtol=1e-5)
        gaps = [[scores[b, h, n, 0] - scores[b, h, n, 1:n].mean() for n in dormant if n > 1] for h in range(3)]
        np.testing.assert_allclose(found.dormant_gap[b], np.mean(gaps, 1), rtol=1e-4)
    assert not found.active_gap[1].any()
    with pytest.raises(ValueError, match="active must be boolean"):
        extreme_tokens(weights, values, stream, active=jnp.ones((2, 5), bool))
    assert jnp.isfinite(jax.grad(lambda v: extreme_tokens(weights, v, stream).drain.sum())(0 * values)).all()
