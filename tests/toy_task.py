"""A task for tests, which is not registered."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class GreatestSoFar:
    """Sequences of numbers, whose targets are the greatest number so far."""

    length: int = 64
    vocab_size: int = 32

    def sample(self, generator: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        """Inputs and targets (batch, N) int32, and weights (batch, N) float32."""
        inputs = generator.integers(self.vocab_size, size=(batch, self.length), dtype=np.int32)
        return {"inputs": inputs, "targets": self.oracle(inputs), "weight": np.ones(inputs.shape, np.float32)}

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The targets (B, N) of the inputs (B, N)."""
        return np.maximum.accumulate(inputs, axis=1)
