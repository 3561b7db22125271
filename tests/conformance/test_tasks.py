"""Properties of every registered task."""

import dataclasses

import numpy as np
import pytest

import attnlab
from attnlab import Kind
from tests.toy_task import GreatestSoFar

TASKS = {"a task of the tests": (GreatestSoFar, {"length": 6, "vocab_size": 9})} | {
    variant.name: (variant.cls, dict(variant.options)) for variant in attnlab.variants(kind=Kind.TASK)
}


@pytest.mark.parametrize("subject", sorted(TASKS))
def test_tasks_are_values_that_draw_what_their_oracle_solves(subject):
    cls, options = TASKS[subject]
    task = cls(**options)
    assert task == cls(**options) and hash(task) == hash(cls(**options))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(task, dataclasses.fields(task)[0].name, None)
    batch, again = (task.sample(np.random.default_rng(3), 5) for _ in range(2))
    assert {"inputs", "targets", "weight"} <= batch.keys()
    for name, array in batch.items():
        assert array.shape[0] == 5, name
        np.testing.assert_array_equal(array, again[name], err_msg=name)
    other = task.sample(np.random.default_rng(4), 5)
    assert any(not np.array_equal(batch[name], other[name]) for name in batch)
    assert batch["weight"].dtype == np.float32 and batch["weight"].sum() > 0
    counted = batch["weight"] > 0
    answers, targets = task.oracle(batch["inputs"])[counted], batch["targets"][counted]
    if np.issubdtype(targets.dtype, np.floating):
        np.testing.assert_allclose(answers, targets, rtol=1e-4, atol=1e-4)
    else:
        np.testing.assert_array_equal(answers, targets)
