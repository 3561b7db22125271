import numpy as np
import pytest

from attnlab.tasks.bigram_backcopy import START, BigramBackcopy, shakespeare


def test_triggers_copy_and_all_else_follows_the_bigrams():
    task = BigramBackcopy(length=40, k=5)
    batch = task.sample(np.random.default_rng(0), 30)
    tokens = np.concatenate([batch["inputs"], batch["targets"][:, -1:]], 1)
    it = shakespeare(5)
    assert (tokens[:, 0] == START).all() and not np.isin(tokens[:, 1], it.triggers).any()
    triggered = task.triggered(batch["inputs"])
    assert 0.2 < triggered.mean() < 0.7
    np.testing.assert_array_equal(tokens[:, 2:][triggered[:, 1:]], tokens[:, :-2][triggered[:, 1:]])
    free = ~triggered[:, 1:]
    assert (it.bigrams[tokens[:, 1:-1][free], tokens[:, 2:][free]] > 0).all()
    assert batch["weight"].all() and BigramBackcopy(length=40, weigh="copies").sample(np.random.default_rng(0), 4)
    # The first token of a long sample has its own distribution.
    first = task.sample(np.random.default_rng(1), 4000)["inputs"][:, 1]
    assert np.abs(np.bincount(first, minlength=67) / 4000 - it.first).max() < 0.03


def test_refuses_what_does_not_fit():
    for options, message in (({"k": 0}, "k must lie in 1..65"), ({"weigh": "none"}, "weigh must be")):
        with pytest.raises(ValueError, match=message):
            BigramBackcopy(**options)
