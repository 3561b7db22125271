import numpy as np
import pytest

from attnlab.tasks.captioned_shapes import CaptionedShapes
from attnlab.tasks.colored_objects import ColoredObjects
from attnlab.tasks.ioi import IndirectObject
from attnlab.tasks.linear_regression import InContextRegression

RANDOM = np.random.default_rng(0)


def test_something_is_given_to_the_name_that_stands_once():
    task = IndirectObject(length=16)
    inputs = task.sample(RANDOM, 30)["inputs"]
    for row, (right, wrong), other in zip(inputs, task.answers(inputs), task.corrupted(inputs), strict=True):
        assert (row == right).sum() == 1 and (row == wrong).sum() == 2 and not row[:2].any()
        assert (other == right).sum() == 2 and (other == wrong).sum() == 1 and (row != other).sum() == 1
    words = task.text(inputs[0]).split()
    assert words[0] == "When" and words[-1] == "to" and len(words) == 14


def test_the_colour_of_the_object_that_is_asked_for():
    task = ColoredObjects()
    batch = task.sample(RANDOM, 30)
    answers, other = task.answers(batch["inputs"]), task.corrupted(batch["inputs"])
    np.testing.assert_array_equal(answers[:, 0], batch["targets"][:, -1])
    for row, found in zip(batch["inputs"], answers, strict=True):
        words = task.text(row).split()
        asked, scene = words[-4], words[30:]
        assert task.text(found[:1]).lower() == scene[scene.index(asked) - 1]
        assert all(scene[i - 1] == ("an" if scene[i][0] in "aeiou" else "a") for i in (9, 13, 18))
    assert ((other != batch["inputs"]).sum(1) == 1).all()
    assert (task.answers(other)[:, 0] != answers[:, 0]).all()
    assert (np.sort(task.answers(other), 1) == np.sort(answers, 1)).all()


def test_captions_name_the_first_object_and_labels_its_kind():
    task = CaptionedShapes(size=20, objects=2)
    batch = task.sample(RANDOM, 20)
    for caption, label, image in zip(batch["targets"], batch["label"], batch["inputs"], strict=True):
        words = task.text(caption).split()
        assert " ".join(words[1:3]) == task.class_names[label] and words[3] in ("left", "above")
        half = image[:10] if words[3] == "left" else image[:, :10]
        assert half.sum() == image.sum()
    assert len({task.text(caption) for caption in batch["targets"]}) > 10


def test_lines_are_recovered_and_responses_look_at_their_own_covariates():
    task = InContextRegression(length=30, covariates=6, responses=2, used=4, variance=0.0)
    batch = task.sample(RANDOM, 8)
    assert batch["inputs"].shape == (8, 31, 8) and not batch["inputs"][:, -1, 6:].any()
    np.testing.assert_allclose(task.oracle(batch["inputs"]), batch["targets"], atol=1e-4)
    changed = batch["inputs"].copy()
    changed[:, -1, 4:6] = 9
    answers = task.oracle(changed)
    np.testing.assert_allclose(answers[:, 0], batch["targets"][:, 0], atol=1e-4)
    assert np.abs(answers[:, 1] - batch["targets"][:, 1]).min() > 0.01
    x = InContextRegression(correlation=0.5).sample(RANDOM, 500)["inputs"][:, :-1, :5].reshape(-1, 5)
    np.testing.assert_allclose(np.cov(x.T), 0.5 ** np.abs(np.arange(5)[:, None] - np.arange(5)), atol=0.04)
    noisy = InContextRegression().sample(RANDOM, 2000)
    error = np.mean((InContextRegression().oracle(noisy["inputs"]) - noisy["targets"]) ** 2)
    assert 0.1 < error < 0.13, "ridge regression's risk with noise of variance 0.1"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: IndirectObject(length=13), "at least 14"),
        (lambda: ColoredObjects(length=58), "at least 59"),
        (lambda: CaptionedShapes(size=15), "even and at least 16"),
        (lambda: CaptionedShapes(objects=3), "objects must be"),
        (lambda: InContextRegression(used=2), "used goes with two responses"),
        (lambda: InContextRegression(responses=3), "responses must be 1 or 2"),
        (lambda: InContextRegression(correlation=1.0), "correlation must lie in"),
    ],
)
def test_refuses_what_does_not_fit(build, message):
    with pytest.raises(ValueError, match=message):
        build()
