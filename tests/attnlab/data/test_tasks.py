"""Tasks as data sets."""

import numpy as np
import pytest

from attnlab import data
from attnlab.data.tasks import TaskData, open_task
from tests.toy_task import GreatestSoFar


def test_examples_are_those_of_the_task_and_the_splits_share_none():
    source = TaskData(options=("vocab_size=9", "length=5"), train_size=6, eval_size=4)
    dataset = open_task(GreatestSoFar, source)
    assert (dataset.info.kind, dataset.info.vocab_size, dataset.info.train_size) == ("text", 9, 30)
    task = GreatestSoFar(length=7, vocab_size=9)
    (batch,) = dataset.eval(4, sequence_length=7)
    assert batch["inputs"].shape == (4, 7) and batch["weight"].all()
    np.testing.assert_array_equal(batch["targets"], task.oracle(batch["inputs"]))
    again = next(open_task(GreatestSoFar, source).eval(4, sequence_length=7))
    np.testing.assert_array_equal(again["inputs"], batch["inputs"])
    trained = next(dataset.train(6, seed=0, sequence_length=7))["inputs"]
    assert not {row.tobytes() for row in trained} & {row.tobytes() for row in batch["inputs"]}
    other = open_task(GreatestSoFar, TaskData(options=source.options, train_size=6, eval_size=4, seed=1))
    assert other.info.digest != dataset.info.digest
    assert not np.array_equal(next(other.eval(4, sequence_length=7))["inputs"], batch["inputs"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options": ("length",)}, "options are name=value, got 'length'"),
        ({"options": ("lenght=3",)}, "GreatestSoFar has no setting 'lenght': did you mean length"),
        ({"eval_size": 0}, "eval_size must be at least 1"),
        ({"seed": -1}, "seed must lie"),
    ],
)
def test_what_does_not_fit_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        open_task(GreatestSoFar, TaskData(**settings))


def test_a_task_that_there_is_not():
    with pytest.raises(KeyError, match="no task is called 'recal'"):
        data.open("task", task="recal")
