"""Indirect objects (Wang et al., 2022, arXiv:2211.00593), one of the two tasks of circuit reuse (arXiv:2310.08744).

    When Anna and Ben went to the park , Ben gave a ball to   ->  Anna

The two names stand in either order. In the corrupted sentence the other name is given a second time, so that the answer
is the other one. Words are token ids of their own vocabulary; `text` gives them to another tokenizer.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from attnlab.registry import Cost, Kind, Paper, Source, register
from attnlab.tasks.words import Words, asked_at_the_end

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo", "Mary")
NAMES += ("Noah", "Olga", "Paul", "Rose", "Sam", "Tom", "Vera")
PLACES = ("park", "school", "station", "market", "library", "beach", "office", "garden")
THINGS = ("ball", "book", "drink", "key", "letter", "phone", "ring", "map")
FRAME = ("When", "and", "went", "to", "the", ",", "gave", "a")
WORDS = Words.of(FRAME, NAMES, PLACES, THINGS)
SENTENCE = 14


@register(
    "circuit_reuse.ioi",
    kind=Kind.TASK,
    paper=Paper(
        "Circuit Component Reuse Across Tasks in Transformer Language Models",
        "Merullo et al.",
        2024,
        "2310.08744",
        number=86,
    ),
    source=Source.PAPER_TEXT,
    cost=Cost("O(N)", "O(N)"),
    summary="whom something was given to: the name that stands once",
    small={"length": 15},
)
@dataclasses.dataclass(frozen=True)
class IndirectObject:
    """The task; see the module docstring.

    Attributes:
      length: inputs N, at least 14; shorter sentences are padded on the left.
    """

    length: int = SENTENCE

    vocab_size: ClassVar[int] = len(WORDS)

    def __post_init__(self) -> None:
        if self.length < SENTENCE:
            raise ValueError(f"length must be at least {SENTENCE}, got {self.length}")

    def sample(self, generator: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        """Inputs and targets (batch, N) int32, and the weight of each target (batch, N) float32: 1 for the answer."""
        prompts, answers = [], []
        for _ in range(batch):
            first, second = (NAMES[i] for i in generator.choice(len(NAMES), 2, replace=False))
            giver, answer = (first, second) if generator.integers(2) else (second, first)
            place, thing = PLACES[generator.integers(len(PLACES))], THINGS[generator.integers(len(THINGS))]
            went = ("When", first, "and", second, "went", "to", "the", place, ",")
            prompts.append((*went, giver, "gave", "a", thing, "to"))
            answers.append(answer)
        return asked_at_the_end(WORDS, prompts, answers, self.length)

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The targets (B, N) of the inputs (B, N): the next words, and at the end the name that stands once."""
        return np.concatenate([inputs[:, 1:], self.answers(inputs)[:, :1]], 1)

    def answers(self, inputs: np.ndarray) -> np.ndarray:
        """The right answer and the wrong one, (B, 2) int32."""
        names = inputs[:, [-13, -11]]
        given = inputs[:, -5, None]
        return np.concatenate([np.where(names[:, :1] == given, names[:, 1:], names[:, :1]), given], 1)

    def corrupted(self, inputs: np.ndarray) -> np.ndarray:
        """The sentences in which the other name is given."""
        other = np.array(inputs)
        other[:, -5] = self.answers(inputs)[:, 0]
        return other

    def text(self, ids: np.ndarray) -> str:
        """The words of one sequence of token ids."""
        return WORDS.text(ids)
