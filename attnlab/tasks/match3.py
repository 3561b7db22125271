"""Match-3: does a token sum to nothing with any two others? (Sanford et al., 2023, arXiv:2306.02896.)

    target_i = 1 if there are j, k with x_i + x_j + x_k = 0 modulo p, else 0

j and k may be the same, and may be i. One layer of ordinary attention cannot tell, unless it is as wide as the sequence
is long; attention to pairs (`kronecker_attention`, arXiv:2310.04064) can. Numbers of a sequence are drawn from few
residues of its own: of all of them some pair would nearly always do.
"""

import dataclasses

import numpy as np

from attnlab.attention.dense.kronecker_attention import PAPER
from attnlab.registry import Cost, Kind, Source, register


@register(
    "kronecker_attention.match3",
    kind=Kind.TASK,
    paper=PAPER,
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N·p)", memory="O(N·p)"),
    summary="whether two other tokens complete a token to a sum of 0, modulo a prime",
    small={"length": 6, "modulus": 7},
)
@dataclasses.dataclass(frozen=True)
class Match3:
    """The task; see the module docstring.

    Attributes:
      length: numbers in a sequence, N.
      modulus: p.
      residues: how many different numbers a sequence is drawn from.

    Raises:
      ValueError: for more residues than there are, or sizes below 1.
    """

    length: int = 16
    modulus: int = 11
    residues: int = 3

    def __post_init__(self) -> None:
        if self.length < 1 or not 1 <= self.residues <= self.modulus:
            raise ValueError(f"length must be at least 1 and residues from 1 to the modulus, got {self}")

    @property
    def vocab_size(self) -> int:
        """Numbers are below it; targets, 0 and 1, are too."""
        return max(self.modulus, 2)

    def sample(self, generator: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        """Inputs and targets (batch, N) int32, and the weight of each target (batch, N) float32."""
        order = generator.permuted(np.tile(np.arange(self.modulus), (batch, 1)), axis=1)
        drawn = generator.integers(self.residues, size=(batch, self.length))
        inputs = np.take_along_axis(order, drawn, 1).astype(np.int32)
        return {"inputs": inputs, "targets": self.oracle(inputs), "weight": np.ones(inputs.shape, np.float32)}

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The targets (B, N) of the inputs (B, N)."""
        there = np.zeros((len(inputs), self.modulus), bool)
        np.put_along_axis(there, inputs, True, 1)
        sums = np.zeros_like(there)  # residues that a pair sums to
        for shift in range(self.modulus):
            sums |= there[:, shift, None] & np.roll(there, shift, 1)
        return np.take_along_axis(sums, (-inputs) % self.modulus, 1).astype(np.int32)
