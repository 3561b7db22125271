import numpy as np
import pytest

from attnlab.data.tasks import TaskData
from attnlab.tasks.cab import AlignedCopying, Forecasting, MaskedTokens, PointCompletion

RANDOM = np.random.default_rng(0)


def test_hidden_tokens_stand_elsewhere():
    task = MaskedTokens(length=20, vocab_size=9, period=6, rate=0.8)
    batch = task.sample(RANDOM, 50)
    hidden = batch["weight"] > 0
    assert hidden.any(1).all() and (batch["inputs"][hidden] == 0).all()
    np.testing.assert_array_equal(batch["inputs"][~hidden], batch["targets"][~hidden])
    np.testing.assert_array_equal(batch["targets"][:, 6:], batch["targets"][:, :-6])


def test_speech_follows_its_source():
    task = AlignedCopying(length=12, vocab_size=7, source=4, longest=3)
    source = np.array([[1, 2, 3, 5]])
    inputs = np.concatenate([source, np.zeros((1, 8), int)], 1)
    np.testing.assert_array_equal(task.oracle(inputs), [[0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 5, 5]])
    batch = task.sample(RANDOM, 5)
    np.testing.assert_array_equal(batch["inputs"][:, 5:], batch["targets"][:, 4:-1])


def test_waves_and_gaps_are_what_the_oracle_says_in_full_size():
    for task in (Forecasting(), PointCompletion()):
        batch = task.sample(RANDOM, 20)
        np.testing.assert_allclose(task.oracle(batch["inputs"]), batch["targets"], rtol=1e-3, atol=1e-4)
        assert batch["targets"].shape == (20, task.responses)
        assert batch["inputs"].shape == (20, task.length, task.token_features)


def test_they_open_as_data():
    info = TaskData("cab.point_completion", ("missing=3",), train_size=4, eval_size=2).open().info
    assert (info.kind, info.token_features, info.responses) == ("vectors", 4, 9)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="length must be at least 2 · period"):
        MaskedTokens(length=10, period=6)
    with pytest.raises(ValueError, match="length must be at least missing \\+ 3"):
        PointCompletion(length=5, missing=3)
