"""Tasks that need absolute positions, without any in the tokens (Luo et al., 2022, arXiv:2205.13401, section 5.1).

Even tokens: the first half of the targets are the tokens of every second place, x_1, x_3, ...; the rest are a token of
their own. Position: the target of token t is t + 1. Tokens mean nothing: they are drawn from `vocab_size` - 20 kinds.
"""

import dataclasses

import numpy as np

from attnlab.attention.dense.urpe import PAPER
from attnlab.registry import Cost, Kind, Source, register

_FIRST, _FEWER = 11, 20


@dataclasses.dataclass(frozen=True)
class _PositionTask:
    length: int = 128
    vocab_size: int = 1000

    def __post_init__(self) -> None:
        if self.length < 2 or self.vocab_size <= max(_FEWER, self.length):
            raise ValueError(
                f"length must be at least 2 and vocab_size above {_FEWER} and the length, "
                f"got {self.length} and {self.vocab_size}"
            )

    def sample(self, generator: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        """Inputs and targets (batch, N) int32, and the weight of each target (batch, N) float32."""
        kinds = self.vocab_size - _FEWER
        inputs = _FIRST + generator.integers(kinds, size=(batch, self.length), dtype=np.int32)
        return {"inputs": inputs, "targets": self.oracle(inputs), "weight": np.ones(inputs.shape, np.float32)}

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The targets (B, N) of the inputs (B, N)."""
        raise NotImplementedError


@register(
    "urpe.even_tokens",
    kind=Kind.TASK,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="lsj2408/URPE",
    cost=Cost(time="O(N)", memory="O(N)"),
    summary="the tokens of every second place, moved to the front: needs absolute positions",
    small={"length": 7, "vocab_size": 30},
)
@dataclasses.dataclass(frozen=True)
class EvenTokenPrediction(_PositionTask):
    """The task; see the module docstring.

    Attributes:
      length: tokens in a sequence, N.
      vocab_size: tokens are below it, above 20 and N; `vocab_size` - 2 is the target of the second half.
    """

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The targets (B, N) of the inputs (B, N)."""
        even = inputs[:, 1::2]
        rest = np.full((inputs.shape[0], inputs.shape[1] - even.shape[1]), self.vocab_size - 2, inputs.dtype)
        return np.concatenate([even, rest], axis=1)


@register(
    "urpe.position",
    kind=Kind.TASK,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="lsj2408/URPE",
    cost=Cost(time="O(N)", memory="O(N)"),
    summary="each token's own position: needs absolute positions",
    small={"length": 7, "vocab_size": 30},
)
@dataclasses.dataclass(frozen=True)
class PositionIdentification(_PositionTask):
    """The task; see the module docstring.

    Attributes:
      length: tokens in a sequence, N.
      vocab_size: tokens are below it, above 20 and N.
    """

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The targets (B, N) of the inputs (B, N)."""
        return np.broadcast_to(np.arange(1, inputs.shape[1] + 1, dtype=inputs.dtype), inputs.shape).copy()
