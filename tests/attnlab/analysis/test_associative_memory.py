"""Capacity of a Hebbian memory: the formula, the measure and the simulation are one."""

import numpy as np
import pytest

from attnlab.analysis.associative_memory import (
    accumulated_noise,
    capacity,
    fidelity,
    recall,
    right_signs,
    simulated_signs,
    voted_error,
)


def test_items_whose_signs_survive_grow_like_the_size_of_heads():
    """The most items with 90 % of the bits right, simulated, fit M ~ D^a with a in [0.85, 1.15]."""
    sizes, most = (16, 32, 64, 128), []
    for size in sizes:
        guesses = [max(2, round(share * size)) for share in np.arange(0.3, 1.0, 0.05)]
        most.append(max(m for m in guesses if simulated_signs(size, m, trials=max(4, 256 // size)) >= 0.9))
        assert abs(most[-1] - capacity(size)) <= 0.15 * capacity(size)
    slope = np.polyfit(np.log(sizes), np.log(most), 1)[0]
    assert 0.85 <= slope <= 1.15


def test_recall_of_random_keys_is_as_expected():
    random = np.random.default_rng(0)
    keys = random.standard_normal((8, 40, 2, 64)).astype(np.float32)
    values = random.choice([-1.0, 1.0], size=(8, 40, 2, 32)).astype(np.float32)
    found = recall(keys, values)
    np.testing.assert_allclose(found.error.mean(), found.expected.mean(), rtol=0.05)
    np.testing.assert_allclose(found.signs.mean(), right_signs(64, 40), atol=0.02)
    one = recall(keys[:, :1], values[:, :1])
    assert np.all(one.signs == 1) and np.all(one.expected == 0) and np.all(one.error < 1e-6)


def test_redundancy_and_depth():
    assert voted_error(0.1, 1) == pytest.approx(0.1)
    assert voted_error(0.1, 3) == pytest.approx(3 * 0.01 * 0.9 + 0.001)
    assert voted_error(0.1, 2) == pytest.approx(0.1)  # half of the ties
    assert fidelity(0.1, heads=3, layers=4) == pytest.approx((1 - 0.028) ** 4)
    assert accumulated_noise(0.5, heads=2, layers=6) == 1.5
    with pytest.raises(ValueError, match="share"):
        capacity(8, 0.5)
