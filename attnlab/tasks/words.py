"""Sentences of a small vocabulary, as token ids: what text-like tasks share."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

PAD = "_"


@dataclasses.dataclass(frozen=True)
class Words:
    """A vocabulary; the first word pads.

    Attributes:
      words: all different.
    """

    words: tuple[str, ...]

    @classmethod
    def of(cls, *groups: Iterable[str]) -> "Words":
        """The words of some groups, each once, behind the one that pads."""
        return cls(tuple(dict.fromkeys([PAD, *(word for group in groups for word in group)])))

    def __len__(self) -> int:
        return len(self.words)

    def ids(self, words: Sequence[str], length: int | None = None) -> np.ndarray:
        """Token ids int32 `(length,)` of words, padded on the left."""
        found = [self.words.index(word) for word in words]
        return np.asarray([0] * ((length or len(found)) - len(found)) + found, np.int32)

    def text(self, ids: Iterable[int]) -> str:
        """The words of token ids, without those that pad, with spaces between: for another tokenizer."""
        return " ".join(self.words[int(index)] for index in ids if index)


def asked_at_the_end(words: Words, prompts: Sequence[Sequence[str]], answers: Sequence[str], length: int) -> dict:
    """Inputs and targets `(B, N)` of prompts whose next word is the answer, and its weight alone."""
    inputs = np.stack([words.ids(prompt, length) for prompt in prompts])
    last = np.asarray([[words.words.index(answer)] for answer in answers], np.int32)
    weight = np.zeros(inputs.shape, np.float32)
    weight[:, -1] = 1
    return {"inputs": inputs, "targets": np.concatenate([inputs[:, 1:], last], 1), "weight": weight}
