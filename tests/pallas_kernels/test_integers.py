"""Ids and positions lose no bit, and say so where they would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.integers import integers, runs, segments


def test_integers_fit_or_are_refused():
    assert integers("positions", np.array([0, 2**31 - 1])).tolist() == [0, 2**31 - 1]
    assert integers("positions", jnp.arange(3, dtype=jnp.int8)).dtype == jnp.int8
    with pytest.raises(ValueError, match="positions must fit int32"):
        integers("positions", np.array([0, 2**32]))
    with pytest.raises(TypeError, match="positions must be integers, got float32"):
        integers("positions", np.zeros(3, np.float32))
    with jax.enable_x64(True):
        assert integers("positions", np.array([2**40])).tolist() == [2**40]


def test_segments_stay_apart():
    (ids,) = segments(np.array([[0, 2**32, 2**32, -1, -1 + 2**32]]))
    assert len(set(ids[0].tolist())) == 4
    assert ids[0, 1] == ids[0, 2]
    queries, keys = segments(np.array([[7, 2**40]]), np.array([[2**40, 7, 2**63]], np.uint64))
    assert (queries[0, 0] == keys[0, 1]) & (queries[0, 1] == keys[0, 0])
    assert int(keys[0, 2]) not in queries[0].tolist()
    assert segments(np.array([[5, 9]]))[0].tolist() == [[5, 9]], "ids that fit are as they were"


def test_runs():
    assert runs(jnp.array([[1, 1, 2, 2, 1, 1], [4, 4, 4, 4, 4, 0]])).tolist() == [
        [0, 0, 1, 1, 2, 2],
        [0, 0, 0, 0, 0, 1],
    ]
