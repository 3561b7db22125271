"""SKELETON made by `attnlab new`: replace this toy by the mechanism, and take this line out.

Sequences of numbers, whose targets are the greatest number so far.

Say here what the paper's task is, and where this one differs.
"""

import dataclasses

import numpy as np

from attnlab.registry import Cost, Kind, Paper, Source, register

PAPER = Paper("Title of the paper", "First et al.", 2026)


@register(
    "skeleton",
    kind=Kind.TASK,
    paper=PAPER,
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N)", memory="O(N)"),
    summary="the greatest number so far (a toy)",
    small={"length": 6, "vocab_size": 9},
)
@dataclasses.dataclass(frozen=True)
class Skeleton:
    """The task; see the module docstring.

    Attributes:
      length: numbers in a sequence, N.
      vocab_size: numbers are below it.
    """

    length: int = 64
    vocab_size: int = 32

    def sample(self, generator: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        """Inputs and targets (batch, N) int32, and the weight of each target (batch, N) float32."""
        inputs = generator.integers(self.vocab_size, size=(batch, self.length), dtype=np.int32)
        return {"inputs": inputs, "targets": self.oracle(inputs), "weight": np.ones(inputs.shape, np.float32)}

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The targets (B, N) of the inputs (B, N)."""
        return np.maximum.accumulate(inputs, axis=1)
