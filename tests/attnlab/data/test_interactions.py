"""Histories and the examples that are made of them."""

import numpy as np
import pytest

from attnlab.data.errors import DataError
from attnlab.data.interactions import (
    Histories,
    Masking,
    cloze_example,
    cloze_examples,
    ranking_examples,
    shuffled_windows,
    windows,
)


def random(seed=0):
    return np.random.default_rng(seed)


def test_ids_go_by_frequency_and_are_read_from_lines(tmp_path):
    (tmp_path / "log.txt").write_text("7 30\n7 10\n8 10\n8 20\n7 20\n8 10\n")
    histories = Histories.read(tmp_path / "log.txt")
    assert [items.tolist() for items in histories.users] == [[3, 1, 2], [1, 2, 1]]
    assert (histories.num_items, histories.mask_id, histories.vocab_size) == (3, 4, 5)
    np.testing.assert_array_equal(histories.counts, [0, 3, 2, 1, 0])
    assert [items.tolist() for items in histories.train().users] == [[3, 1], [1, 2]]
    (tmp_path / "log.txt").write_text("7 30 5\n")
    with pytest.raises(DataError, match="7 30 5"):
        Histories.read(tmp_path / "log.txt")


def test_windows_are_counted_from_the_end():
    items = np.arange(1, 12)
    assert [w.tolist() for w in windows(items, 4)] == [
        [1, 2, 3, 4], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9], [8, 9, 10, 11],
    ]  # fmt: skip
    assert [w[0] for w in windows(items, 4, stride=1.0)] == [1, 4, 8]
    assert windows(items, 11)[0] is items
    with pytest.raises(ValueError, match="stride"):
        windows(items, 4, stride=0)


def test_cloze_examples_mask_as_many_as_they_say():
    histories = Histories.of([[5, 6, 7, 8, 9, 5, 6], [8], []])
    made = cloze_examples(histories, 5, random(), masking=Masking(share=0.4, most=3), copies=4)
    assert made["ids"].shape == (2 * 5 + 5, 5)
    assert made["positions"].shape == made["targets"].shape == made["weight"].shape == (15, 3)
    real = made["mask"].sum(1)
    np.testing.assert_array_equal(made["weight"].sum(1), np.where(real == 5, [[2, 2, 2, 2, 1] * 3], 1)[0])
    rows = np.arange(15)[:, None]
    masked = made["ids"] == histories.mask_id
    np.testing.assert_array_equal(masked.sum(1), made["weight"].sum(1))
    assert masked[rows, made["positions"]][made["weight"] > 0].all()
    for row, window in ((4, histories.users[0][:5]), (9, histories.users[0][2:])):
        restored = made["ids"][row].copy()
        restored[made["positions"][row, 0]] = made["targets"][row, 0]
        np.testing.assert_array_equal(restored, window)
    assert made["positions"][9, 0] == 4, "the last copy hides the last item"


def test_items_may_stay_or_change_in_place_of_the_mask():
    items = np.arange(1, 401)
    example = cloze_example(items, np.arange(400), 400, 500, generator=random(), mask_probability=0.5)
    masked, kept = (example["ids"] == 500).mean(), (example["ids"] == items).mean()
    assert abs(masked - 0.5) < 0.1
    assert abs(kept - 0.25) < 0.1
    assert example["ids"].min() >= 1
    with pytest.raises(ValueError, match="generator is needed"):
        cloze_example(items, np.arange(400), 400, 500, mask_probability=0.5)
    with pytest.raises(ValueError, match="at most 1 places"):
        cloze_example(items, np.arange(2), 400, 500, most=1)


@pytest.mark.parametrize("popular", [True, False])
def test_ranking_examples_hide_the_last_item_among_unknown_ones(popular):
    histories = Histories.of([[1, 1, 1, 2, 3], [4, 5, 4], [6], [7, 1, 1, 1, 1, 8, 9]])
    made = ranking_examples(histories, 3, random(), num_negatives=2, popular=popular)
    users = [items for items in histories.users if len(items) > 1]
    for items, ids, candidates, target in zip(users, made["ids"], made["candidates"], made["targets"], strict=True):
        np.testing.assert_array_equal(ids, [*items[-3:-1], histories.mask_id])
        assert candidates[0] == target[0] == items[-1]
        assert not set(candidates[1:]) & set(items)
        assert len(set(candidates)) == 3
    with pytest.raises(ValueError, match="num_negatives must be at most"):
        ranking_examples(histories, 3, random(), num_negatives=9, popular=popular)


def test_shuffled_windows_hold_a_walk():
    for items in shuffled_windows(3, 10, 12, random(), span=4).users:
        (start,) = (s for s in range(10) if {1 + (s + k) % 10 for k in range(4)} == set(items[:4].tolist()))
        for first in range(0, 12, 4):
            assert {1 + (start + first + k) % 10 for k in range(4)} == set(items[first : first + 4].tolist())
