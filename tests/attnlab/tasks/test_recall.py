import numpy as np
import pytest

from attnlab.tasks.copying import Induction, SelectiveCopying
from attnlab.tasks.recall import MultiQueryRecall, Needle, PassKey

RANDOM = np.random.default_rng(0)


def test_keys_are_answered_by_their_values():
    task = MultiQueryRecall(length=40, vocab_size=40, pairs=5)
    batch = task.sample(RANDOM, 20)
    assert (batch["weight"].sum(1) == 5).all() and not batch["weight"][:, :10].any()
    for row, targets, weight in zip(batch["inputs"], batch["targets"], batch["weight"], strict=True):
        pairs = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        assert len(pairs) == 5 and max(pairs) < 20 <= min(pairs.values())
        assert {int(key): int(value) for key, value in zip(row[weight > 0], targets[weight > 0], strict=True)} == pairs


@pytest.mark.parametrize("task", [Needle(length=30, vocab_size=12, needle_length=4), PassKey(length=40, digits=3)])
def test_what_is_behind_the_marker_is_repeated_behind_the_question(task):
    batch = task.sample(RANDOM, 20)
    needle = task.needle(batch["inputs"])
    run = needle.shape[1]
    np.testing.assert_array_equal(batch["targets"][:, -run:], needle)
    prompt = task.prompt(batch["inputs"])
    assert (prompt[:, -1] == task.QUESTION).all() and ((prompt == task.MARKER).sum(1) == 1).all()
    np.testing.assert_array_equal(task.needle(prompt), needle)
    places = (prompt == task.MARKER).argmax(1)
    assert places.std() > 1, "the depth is drawn"


def test_depth_can_be_fixed():
    for depth, place in ((0.0, 0), (1.0, 30 - 2 * 4 - 1)):
        inputs = Needle(length=30, vocab_size=12, needle_length=4, depth=depth).sample(RANDOM, 3)["inputs"]
        assert (inputs[:, place] == 0).all()


def test_copies():
    batch = SelectiveCopying(length=20, vocab_size=9, count=4).sample(RANDOM, 10)
    for row, targets in zip(batch["inputs"], batch["targets"], strict=True):
        assert targets[-4:].tolist() == [token for token in row if token > 1] and (row[-4:] == 1).all()
    batch = Induction(length=20, vocab_size=9).sample(RANDOM, 50)
    for row, targets in zip(batch["inputs"], batch["targets"], strict=True):
        first = row.tolist().index(0)
        assert targets[-1] == row[first + 1] and first < 18 and row[-1] == 0 and (row == 0).sum() == 2
    assert batch["weight"][:, -1].all() and batch["weight"].sum() == 50


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MultiQueryRecall(length=10, pairs=4), "at least 4"),
        (lambda: MultiQueryRecall(vocab_size=9, pairs=8), "has 4 keys"),
        (lambda: Needle(length=5, needle_length=3), "at least 7 for a run of 3"),
        (lambda: Needle(depth=1.5), "depth in 0"),
        (lambda: SelectiveCopying(length=10, count=6), "at least 2"),
        (lambda: Induction(length=2), "at least 3"),
    ],
)
def test_refuses_what_does_not_fit(build, message):
    with pytest.raises(ValueError, match=message):
        build()
