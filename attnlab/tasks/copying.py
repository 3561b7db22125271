"""Copying that depends on content (Gu and Dao, 2023, arXiv:2312.00752, section 4.1): selective copying and induction.

Selective copying: some tokens stand at random places in noise, and are to be repeated in their order. Induction: a
special token stands somewhere and again at the end, and the token behind the first is to be repeated. Only what is to
be repeated has a weight; longer sequences than in training show whether what was learned depends on the length.
"""

import dataclasses

import numpy as np

from attnlab.registry import Cost, Kind, Paper, Source, register

PAPER = Paper("Mamba: Linear-Time Sequence Modeling with Selective State Spaces", "Gu and Dao", 2023, "2312.00752")


@register(
    "selective_copying",
    kind=Kind.TASK,
    paper=PAPER,
    source=Source.PAPER_TEXT,
    cost=Cost("O(N)", "O(N)"),
    summary="tokens at random places in noise, to be repeated in their order",
    small={"length": 12, "vocab_size": 8, "count": 3},
)
@dataclasses.dataclass(frozen=True)
class SelectiveCopying:
    """Selective copying; token 0 is noise, 1 asks for the next token to be repeated.

    Attributes:
      length: inputs N, at least 2 · count.
      vocab_size: tokens are below it.
      count: tokens to be repeated.
    """

    length: int = 272
    vocab_size: int = 16
    count: int = 16

    def __post_init__(self) -> None:
        if self.count < 1 or self.length < 2 * self.count or self.vocab_size < 3:
            raise ValueError(
                f"length must be at least 2 · count and vocab_size 3, got {self.length}, {self.count}, "
                f"{self.vocab_size}"
            )

    def sample(self, generator: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        """Inputs and targets (batch, N) int32, and the weight of each target (batch, N) float32."""
        inputs = np.zeros((batch, self.length), np.int32)
        inputs[:, self.length - self.count :] = 1
        for row in inputs:
            at = np.sort(generator.choice(self.length - self.count, self.count, replace=False))
            row[at] = generator.integers(2, self.vocab_size, self.count)
        weight = (inputs == 1).astype(np.float32)
        return {"inputs": inputs, "targets": self.oracle(inputs), "weight": weight}

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The targets (B, N) of the inputs (B, N): what is no noise in its order at the end, 0 elsewhere."""
        targets, before = np.zeros(inputs.shape, np.int32), inputs[:, : self.length - self.count]
        targets[:, self.length - self.count :] = before[before > 1].reshape(len(inputs), self.count)
        return targets


@register(
    "induction",
    kind=Kind.TASK,
    paper=PAPER,
    source=Source.PAPER_TEXT,
    cost=Cost("O(N)", "O(N)"),
    summary="the token behind a special one is to be repeated when that comes again at the end",
    small={"length": 12, "vocab_size": 8},
)
@dataclasses.dataclass(frozen=True)
class Induction:
    """Induction; token 0 is the special one.

    Attributes:
      length: inputs N, at least 3.
      vocab_size: tokens are below it.
    """

    length: int = 256
    vocab_size: int = 16

    def __post_init__(self) -> None:
        if self.length < 3 or self.vocab_size < 2:
            raise ValueError(f"length must be at least 3 and vocab_size 2, got {self.length} and {self.vocab_size}")

    def sample(self, generator: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        """Inputs and targets (batch, N) int32, and the weight of each target (batch, N) float32: 1 for the last."""
        inputs = generator.integers(1, self.vocab_size, (batch, self.length), np.int32)
        inputs[np.arange(batch), generator.integers(self.length - 2, size=batch)] = 0
        inputs[:, -1] = 0
        weight = np.zeros(inputs.shape, np.float32)
        weight[:, -1] = 1
        return {"inputs": inputs, "targets": self.oracle(inputs), "weight": weight}

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The targets (B, N) of the inputs (B, N): the next tokens, and at the end the one behind the special one."""
        after = np.take_along_axis(inputs, (inputs == 0).argmax(1)[:, None] + 1, 1)
        return np.concatenate([inputs[:, 1:], after], 1)
