"""What users did with items, in order: histories, and the examples of sequential recommendation.

The protocol is that of BERT4Rec (Sun et al., 2019, arXiv:1904.06690; code: FeiSun/BERT4Rec). Ids of items go by
frequency, the most frequent is 1; 0 is padding, at the end, and the id behind the last item's is the mask's. Of each
user the last item is for the test, and all before it are trained on:

    windows         a history longer than N falls into windows of N items, one every `stride · N` from its end on
    cloze examples  of each window `copies` with other items masked, round(share · length) of them, and one whose last
                    item alone is masked, as in the test
    test examples   the items before the last, then the mask; the last item is ranked among others that the user does
                    not know, drawn by popularity or evenly

The authors' code means to keep what the user knows out of these others, and under Python 3 does not, beyond the last
window: here it is kept out.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from attnlab.data.errors import data_error, existing

PAD = 0
_HELP = {
    "expected": "a text file with a user and an item in each line, in the order in which a user took them",
    "get_it": "the repository FeiSun/BERT4Rec holds such files (ml-1m.txt, beauty.txt, steam.txt)",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Histories:
    """Items of users in order.

    Attributes:
      users: of each user the ids of the items, int32, each 1 to `num_items`.
      num_items: number of different items.
    """

    users: tuple[np.ndarray, ...]
    num_items: int

    @classmethod
    def of(cls, users: Iterable[Sequence[int]]) -> Self:
        """From numbers of items as they are: ids go by frequency, equally frequent ones by their numbers.

        Raises:
          ValueError: if there is no item.
        """
        lists = [list(items) for items in users]
        counts = Counter(item for items in lists for item in items)
        if not counts:
            raise ValueError("users must have at least one item among them, got none")
        order = sorted(counts, key=lambda item: (-counts[item], item))
        ids = {item: i for i, item in enumerate(order, start=1)}
        return cls(tuple(np.array([ids[item] for item in items], np.int32) for items in lists), len(ids))

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """From a text file of lines `user item`, numbers, a user's lines in order.

        Raises:
          DataError: if the file is missing, or a line is no two numbers.
        """
        file = existing(str(path), "file", **_HELP)
        users: dict[int, list[int]] = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                user, item = map(int, line.split())
            except ValueError as error:
                raise data_error(file, f"holds the line {line!r}", **_HELP) from error
            users.setdefault(user, []).append(item)
        if not users:
            raise data_error(file, "is empty", **_HELP)
        return cls.of(users.values())

    @property
    def mask_id(self) -> int:
        """The id of the mask."""
        return self.num_items + 1

    @property
    def vocab_size(self) -> int:
        """Number of ids, padding and mask included."""
        return self.num_items + 2

    @property
    def counts(self) -> np.ndarray:
        """How often each id occurs, int64 `(vocab_size,)`."""
        return np.bincount(np.concatenate(self.users), minlength=self.vocab_size)

    def train(self) -> "Histories":
        """Without the last item of each user, under the same ids."""
        return Histories(tuple(items[:-1] for items in self.users), self.num_items)


def windows(items: np.ndarray, length: int, *, stride: float = 0.5) -> list[np.ndarray]:
    """Windows of a history, the first one first.

    Args:
      items: ids in order.
      length: most items N of a window.
      stride: from window to window over N, above 0 and at most 1.

    Raises:
      ValueError: for a length or stride out of range.
    """
    if length < 1 or not 0 < stride <= 1:
        raise ValueError(f"length must be at least 1 and stride in (0, 1], got {length} and {stride}")
    if len(items) <= length:
        return [items]
    starts = [*range(len(items) - length, 0, -max(1, int(stride * length))), 0]
    return [items[start : start + length] for start in reversed(starts)]


@dataclasses.dataclass(frozen=True)
class Masking:
    """Which items are masked, and what stands in their place; by default as for MovieLens.

    Attributes:
      share: of a window's items that are masked; the authors have 0.6 for Beauty, 0.4 for Steam, 0.2 for MovieLens.
      most: items that are masked at most; places P of an example.
      mask_probability: of the mask in the place of such an item; else it stays, or becomes a random item, evenly.
    """

    share: float = 0.2
    most: int = 40
    mask_probability: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.most < 1 or not 0 <= self.mask_probability <= 1:
            raise ValueError(f"share must be in (0, 1], most at least 1, mask_probability in 0..1, got {self}")

    def count(self, length: int) -> int:
        """Items to be masked of so many."""
        return min(self.most, max(1, round(length * self.share)), length)


def cloze_example(
    items: np.ndarray,
    places: np.ndarray,
    length: int,
    mask_id: int,
    *,
    most: int | None = None,
    generator: np.random.Generator | None = None,
    mask_probability: float = 1.0,
) -> dict[str, np.ndarray]:
    """A window with some items masked, as arrays of fixed sizes.

    Args:
      items: ids of the window, at most N.
      places: of the masked items, rising.
      length: N.
      mask_id: of the mask; items are 1 to mask_id - 1.
      most: places P of the example; as many as are masked when None.
      generator: draws what stands in the place of a masked item; needed below a `mask_probability` of 1.
      mask_probability: see `Masking`.

    Returns:
      `ids` int32 (N,), `mask` bool (N,) True for real tokens, `positions` int32 (P,), `targets` int32 (P,) and `weight`
      float32 (P,), 0 for places that only fill.

    Raises:
      ValueError: for an empty window, or sizes that do not fit.
    """
    most = len(places) if most is None else most
    if not 0 < len(items) <= length or len(places) > most or (len(places) and not 0 <= places[-1] < len(items)):
        raise ValueError(
            f"a window has 1 to {length} items and at most {most} places among them, got {items}, {places}"
        )
    ids = np.full(length, PAD, np.int32)
    ids[: len(items)] = items
    for place in places:
        if mask_probability >= 1 or (generator is not None and generator.random() < mask_probability):
            ids[place] = mask_id
        elif generator is None:
            raise ValueError(f"generator is needed for a mask_probability of {mask_probability}")
        elif generator.random() < 0.5:
            ids[place] = generator.integers(1, mask_id)
    fill = most - len(places)
    return {
        "ids": ids,
        "mask": np.arange(length) < len(items),
        "positions": np.pad(places, (0, fill)).astype(np.int32),
        "targets": np.pad(items[places], (0, fill)).astype(np.int32),
        "weight": np.pad(np.ones(len(places), np.float32), (0, fill)),
    }


def cloze_examples(
    histories: Histories,
    length: int,
    generator: np.random.Generator,
    *,
    masking: Masking | None = None,
    stride: float = 0.5,
    copies: int = 10,
    last: bool = True,
) -> dict[str, np.ndarray]:
    """All training examples of histories without their test items, `Histories.train()`.

    Args:
      histories: of which a user without an item has no example.
      length: N.
      generator: draws what is masked.
      masking: how much, by default as for MovieLens.
      stride: of the windows.
      copies: of each window, each with other items masked.
      last: whether there is one more, with the last item masked.

    Returns:
      The arrays of `cloze_example`, with an axis of examples in front.

    Raises:
      ValueError: for sizes out of range, or if there is no example.
    """
    masking = Masking() if masking is None else masking
    rows = []
    for items in histories.users:
        for window in windows(items, length, stride=stride) if len(items) else ():
            drawn = [
                np.sort(generator.choice(len(window), masking.count(len(window)), replace=False)) for _ in range(copies)
            ]
            drawn += [np.array([len(window) - 1])] * last
            for number, places in enumerate(drawn):
                chance = 1.0 if number == copies else masking.mask_probability
                sizes: dict[str, Any] = {"most": masking.most, "mask_probability": chance}
                rows.append(cloze_example(window, places, length, histories.mask_id, **sizes, generator=generator))
    return _stacked(rows)


def ranking_examples(
    histories: Histories,
    length: int,
    generator: np.random.Generator,
    *,
    num_negatives: int = 100,
    popular: bool = True,
) -> dict[str, np.ndarray]:
    """The test of every user with two items at least: the mask behind what came before, and who it may be.

    Args:
      histories: whole, with the items that are for the test.
      length: N, the mask included.
      generator: draws the negatives.
      num_negatives: items that are ranked beside the true one.
      popular: whether they are drawn by how often they occur, else evenly; never twice, never one that the user knows.

    Returns:
      The arrays of `cloze_example` with P = 1, and `candidates` int32 (examples, 1 + num_negatives), the true item
      first.

    Raises:
      ValueError: if a user knows so many items that there are too few others, or there is no example.
    """
    weights = histories.counts.astype(np.float64) if popular else np.ones(histories.vocab_size)
    weights[[PAD, histories.mask_id]] = 0
    rows = []
    for items in histories.users:
        if len(items) < 2:
            continue
        chances = weights.copy()
        chances[items] = 0
        if np.count_nonzero(chances) < num_negatives:
            raise ValueError(
                f"num_negatives must be at most {np.count_nonzero(chances)}, items that a user does not know"
            )
        others = generator.choice(len(chances), num_negatives, replace=False, p=chances / chances.sum())
        window = items[-length:]
        example = cloze_example(window, np.array([len(window) - 1]), length, histories.mask_id)
        rows.append({**example, "candidates": np.concatenate([items[-1:], others]).astype(np.int32)})
    return _stacked(rows)


def shuffled_windows(
    num_users: int, num_items: int, length: int, generator: np.random.Generator, *, span: int = 3
) -> Histories:
    """Histories whose order is loose: a walk around a circle of items, shuffled inside windows of `span`.

    Args:
      num_users: histories.
      num_items: items of the circle; a user starts anywhere on it.
      length: items of a history.
      generator: draws starts and orders.
      span: items that stand in any order.

    Raises:
      ValueError: for sizes below 1.
    """
    if min(num_users, num_items, length, span) < 1:
        raise ValueError(f"sizes must be at least 1, got {(num_users, num_items, length, span)}")
    users = []
    for start in generator.integers(num_items, size=num_users):
        walk = 1 + (start + np.arange(length)) % num_items
        parts = [generator.permutation(walk[first : first + span]) for first in range(0, length, span)]
        users.append(np.concatenate(parts).astype(np.int32))
    return Histories(tuple(users), num_items)


def _stacked(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if not rows:
        raise ValueError("histories have no example: a user needs an item, and two for a test")
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
