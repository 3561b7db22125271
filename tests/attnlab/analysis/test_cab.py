import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.analysis.cab import STUDIES, Study, compositional_index, efficiency_length, study

LENGTHS = np.array([256.0, 512, 1024, 2048, 4096, 8192])


def test_the_mean_of_a_study_is_zero_and_a_deviation_is_one():
    for pattern, of in STUDIES.items():
        mean, deviation, sign = (np.asarray(part) for part in (of.mean, of.deviation, of.sign))
        rows = np.stack([mean, mean + sign * deviation]).astype(np.float32)
        found = compositional_index(rows, pattern=pattern)
        np.testing.assert_allclose(found.total, [0, 1], atol=1e-4)
        assert found.tasks.shape == (2, len(of.tasks))


def test_a_study_of_ones_own():
    table = np.random.default_rng(0).random((6, 3))
    own = study(table, (1, -1, 1), {"first": 2, "second": 1})
    found = compositional_index(table.astype(np.float32), pattern=own)
    np.testing.assert_allclose(found.tasks.mean(0), 0, atol=1e-5)
    z = (table - table.mean(0)) / table.std(0) * [1, -1, 1]
    np.testing.assert_allclose(found.total, (z[:, :2].mean(1) + z[:, 2]) / 2, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="deviations must be above 0"):
        study(np.ones((3, 1)), (1,), {"first": 1})
    with pytest.raises(ValueError, match="a study needs mean, deviation, sign and a task for each metric"):
        Study((0.0,), (1.0,), (1,), (("first", 2),))
    with pytest.raises(ValueError, match="no study is called 'causal'"):
        compositional_index(jnp.ones(5), pattern="causal")


def test_where_a_parabola_and_a_line_cross():
    vanilla, other = 2e-6 * LENGTHS**2 + 1e-4 * LENGTHS + 5, 3e-3 * LENGTHS + 6
    found = efficiency_length(vanilla.astype(np.float32), other.astype(np.float32), lengths=LENGTHS)
    np.testing.assert_allclose(found.length, np.roots([2e-6, 1e-4 - 3e-3, -1]).max(), rtol=1e-3)
    np.testing.assert_allclose(found.vanilla, [5, 1e-4, 2e-6], rtol=2e-2)
    np.testing.assert_allclose(found.other, [6, 3e-3], rtol=1e-3)
    np.testing.assert_allclose(found.fit, 1, atol=1e-4)
    other[0] = 100  # overhead of a first call
    skipped = efficiency_length(vanilla.astype(np.float32), other.astype(np.float32), lengths=LENGTHS, skip=1)
    np.testing.assert_allclose(skipped.length, found.length, rtol=1e-3)


def test_costs_that_do_not_cross():
    vanilla = (1e-6 * LENGTHS**2 + 10).astype(np.float32)
    always = efficiency_length(vanilla, np.full(6, 1, np.float32), lengths=LENGTHS)
    never = efficiency_length(-vanilla, vanilla, lengths=LENGTHS)
    assert always.length == 0 and np.isinf(never.length)
    with pytest.raises(ValueError, match=r"vanilla and other must be \(..., L\) for lengths \(L,\)"):
        efficiency_length(vanilla, vanilla[:5], lengths=LENGTHS)
