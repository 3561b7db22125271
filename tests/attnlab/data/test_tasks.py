"""Tasks as data sets."""

import dataclasses

import numpy as np
import pytest

import attnlab
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


@pytest.mark.parametrize("name", attnlab.names(kind=attnlab.Kind.TASK))
def test_every_registered_task_opens_as_data(name):
    variant = attnlab.get(name)
    options = tuple(f"{key}={value!r}" for key, value in variant.options.items())
    dataset = data.open("task", task=name, options=options, train_size=5, eval_size=3)
    length = {"sequence_length": variant.cls(**variant.options).length} if dataset.info.kind == "text" else {}
    batch = next(dataset.train(4, seed=0, **length))
    task, info = variant.cls(**variant.options), dataset.info
    if info.kind == "image":
        assert batch["image"].shape == (4, *info.image_shape) and batch["label"].max() < info.num_classes
        np.testing.assert_array_equal(task.oracle(batch["image"]), batch["caption"])
    elif info.kind == "vectors":
        assert batch["inputs"].shape[-1] == info.token_features and batch["targets"].shape == (4, info.responses)
    else:
        assert max(batch["inputs"].max(), batch["targets"].max()) < info.vocab_size
    assert batch["weight"].dtype == np.float32 and dataset.info.train_size >= 5


def test_a_task_of_another_kind_is_refused():
    class Nothing:
        pass

    with pytest.raises(ValueError, match="Nothing must have vocab_size and length, or"):
        open_task(dataclasses.dataclass(frozen=True)(Nothing), TaskData())


def test_a_task_that_there_is_not():
    with pytest.raises(KeyError, match="no task is called 'recal'"):
        data.open("task", task="recal")
