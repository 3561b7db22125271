import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.analysis.map_indicators import largest_score, map_indicators

WEIGHTS = np.random.default_rng(0).random((2, 3, 6, 6)) * np.tri(6)
WEIGHTS /= WEIGHTS.sum(-1, keepdims=True)


def test_equals_sums_by_hand():
    rows = np.ones((2, 6), bool)
    rows[1, 4:] = False
    found = map_indicators(WEIGHTS.astype(np.float32), mask=jnp.asarray(rows))
    for b in range(2):
        count = rows[b].sum()
        used = WEIGHTS[b, :, :count]
        np.testing.assert_allclose(found.concentration[b], np.sqrt((used**2).sum((1, 2))), rtol=1e-5)
        np.testing.assert_allclose(found.peak[b], used.max(-1).mean(-1), rtol=1e-5)
        for offset in range(4):
            near = [[used[h, n, n - offset] for n in range(offset, count)] for h in range(3)]
            np.testing.assert_allclose(found.local_focus[b, :, offset], np.mean(near, 1), rtol=1e-5)
        spread = [used[:, n, m].std() for n in range(count) for m in range(n + 1)]
        np.testing.assert_allclose(found.diversity[b], np.sum(spread) * 2 / (count * (count + 1)), rtol=1e-5)


def test_heads_that_agree_have_no_diversity_and_finite_slopes():
    same = jnp.broadcast_to(jnp.eye(4), (1, 2, 4, 4))
    assert map_indicators(same).diversity == 0
    assert jnp.isfinite(jax.grad(lambda w: sum(field.sum() for field in map_indicators(w)))(0 * same)).all()


def test_largest_score_and_refusals():
    scores = jnp.arange(8.0).reshape(1, 2, 2, 2)
    assert largest_score(scores).tolist() == [[3, 7]]
    assert largest_score(scores, jnp.tri(2, dtype=bool) & (jnp.arange(2) < 1)).tolist() == [[2, 6]]
    for options, message in (
        ({"offsets": 0}, "at least 1"),
        ({"mask": jnp.ones((2, 5), bool)}, "mask must be boolean"),
    ):
        with pytest.raises(ValueError, match=message):
            map_indicators(WEIGHTS, **options)
