import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.analysis.secondary_sinks import detect_sinks, sink_score
from attnlab.interventions.norm_clamp import clamp_norm


def planted(depth=12, tokens=8, channels=32):
    """The first token is massive in layers 2..9; token 4 points its way in 4..8, token 6 against it in 3..4."""
    hidden = 0.1 * np.random.default_rng(0).standard_normal((depth, tokens, channels)).astype(np.float32)
    u = np.ones(channels, np.float32) / np.sqrt(channels)
    hidden[2:10, 0] += 50 * u
    hidden[4:9, 4] += 20 * u
    hidden[3:5, 6] -= 20 * u
    return hidden


def test_planted_sinks_are_recovered():
    hidden = planted()
    found = detect_sinks(jnp.stack([hidden, hidden[:, [1, 0, 2, 3, 4, 5, 6, 7]]]), long_margin=5, min_layers=2)
    assert found.primary.tolist() == [0, 1] and found.layers.tolist() == [[2, 10]] * 2
    assert found.creation[0].tolist() == [2, -1, -1, -1, 4, -1, 3, -1]
    assert found.lifetime[0].tolist() == [8, 0, 0, 0, 5, 0, 2, 0]
    assert found.type[0].tolist() == [3, 0, 0, 0, 2, 0, 1, 0] and found.has_secondary.all()
    assert found.type[1].tolist() == [0, 3, 0, 0, 2, 0, 1, 0]
    mask = jnp.arange(8)[None] < 4
    assert not detect_sinks(hidden[None], long_margin=5, min_layers=2, mask=mask).has_secondary.any()
    whole = detect_sinks(hidden[None], clip=False)
    assert whole.lifetime[0, 0] == 12


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="candidates must be places below 8"):
        detect_sinks(planted()[None], candidates=(9,))
    with pytest.raises(ValueError, match=r"hidden must be \(B, L, N, C\)"):
        detect_sinks(planted())


def test_score_is_the_mean_over_heads_and_later_queries():
    weights = jax.nn.softmax(
        jnp.where(jnp.tri(5, dtype=bool), jax.random.normal(jax.random.key(0), (2, 3, 5, 5)), -jnp.inf)
    )
    mask = np.ones((2, 5), bool)
    mask[1, 4] = False
    for given, rows in ((None, np.ones((2, 5), bool)), (jnp.asarray(mask), mask)):
        score = sink_score(weights, mask=given)
        for b in range(2):
            for p in range(5):
                later = [weights[b, :, i, p].mean() for i in range(p + 1, 5) if rows[b, i]]
                np.testing.assert_allclose(score[b, p], np.mean(later) if later else 0, rtol=1e-5)


def test_clamp_changes_the_norm_of_aligned_rows_alone():
    u = jnp.asarray([1.0, 0, 0])
    y = jnp.asarray([[[4.0, 0, 0], [4, 0.1, 0], [4, 4, 0], [-4, 0, 0], [0, 0, 0]]])
    got = clamp_norm(y, u, jnp.arange(5)[None] > 0, norm=10.0, threshold=0.98)
    np.testing.assert_allclose(jnp.linalg.norm(got[0], axis=-1), [4, 10, 4 * 2**0.5, 4, 0], rtol=1e-6)
    np.testing.assert_allclose(got[0, 1] / 10, y[0, 1] / jnp.linalg.norm(y[0, 1]), rtol=1e-6)
