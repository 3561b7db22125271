"""Recall from a context: associations, a needle, a pass key. Only what must be recalled has a weight.

`MultiQueryRecall`  pairs of a key and a value, then some of the keys again, each to be answered by its value (Arora et
                    al., ICLR 2024, arXiv:2312.04927; HazyResearch/zoology)
`Needle`            a run of tokens behind a marker somewhere in noise, to be repeated at the end (after needle-in-a-
                    haystack tests of language models)
`PassKey`           digits behind a marker in a text that repeats itself, to be repeated at the end (Mohtashami and
                    Jaggi, NeurIPS 2023, arXiv:2305.16300)

A longer `length` than in training shows how far recall reaches.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from attnlab.registry import Cost, Kind, Paper, Source, register

COST = Cost("O(N)", "O(N)")


@register(
    "multi_query_recall",
    kind=Kind.TASK,
    paper=Paper(
        "Zoology: Measuring and Improving Recall in Efficient Language Models", "Arora et al.", 2024, "2312.04927"
    ),
    source=Source.PAPER_TEXT,
    cost=COST,
    summary="pairs of keys and values, then keys that must be answered by their values (MQAR)",
    small={"length": 16, "vocab_size": 20, "pairs": 3},
)
@dataclasses.dataclass(frozen=True)
class MultiQueryRecall:
    """Associative recall with several queries.

    Token 0 fills; the lower half of the others are keys, the upper half values. The pairs come first; each key stands
    again once, at an even number of places behind them that is drawn with the probability ∝ (1 + i)^(power - 1) for the
    i-th such place, and its target is its value.

    Attributes:
      length: inputs N, at least 4 · pairs.
      vocab_size: tokens are below it.
      pairs: keys, all different, with a value each.
      power: small where queries come soon, 1 where all places are alike.
    """

    length: int = 64
    vocab_size: int = 256
    pairs: int = 8
    power: float = 0.01

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.length < 4 * self.pairs:
            raise ValueError(f"length must be at least 4 · pairs, got {self.length} and {self.pairs}")
        if self.pairs > self._keys:
            raise ValueError(f"vocab_size {self.vocab_size} has {self._keys} keys, pairs asks for {self.pairs}")

    @property
    def _keys(self) -> int:
        return max((self.vocab_size - 1) // 2, 0)

    def sample(self, generator: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        """Inputs and targets (batch, N) int32, and the weight of each target (batch, N) float32."""
        inputs = np.zeros((batch, self.length), np.int32)
        places = (self.length - 2 * self.pairs) // 2
        chance = np.arange(1.0, places + 1) ** (self.power - 1)
        for row in inputs:
            keys = 1 + generator.choice(self._keys, self.pairs, replace=False)
            row[0 : 2 * self.pairs : 2] = keys
            row[1 : 2 * self.pairs : 2] = generator.integers(1 + self._keys, self.vocab_size, self.pairs)
            at = generator.choice(places, self.pairs, replace=False, p=chance / chance.sum())
            row[2 * self.pairs + 2 * at] = keys
        asked = (inputs > 0) & (np.arange(self.length) >= 2 * self.pairs)
        return {"inputs": inputs, "targets": self.oracle(inputs), "weight": asked.astype(np.float32)}

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The targets (B, N) of the inputs (B, N): the value behind the first occurrence of a key, 0 elsewhere."""
        targets = np.zeros(inputs.shape, np.int32)
        keys, values = inputs[:, 0 : 2 * self.pairs : 2], inputs[:, 1 : 2 * self.pairs : 2]
        same = inputs[:, 2 * self.pairs :, None] == keys[:, None]
        targets[:, 2 * self.pairs :] = np.where(same, values[:, None], 0).max(-1)
        return targets


class _Repeated:
    """Base of tasks in which a run of tokens behind a marker is repeated at the end, behind a question.

    The sequence of N + 1 tokens is a haystack, with the marker and the run in it, the question, and the run again.
    Tokens: 0 the marker, 1 the question.
    """

    MARKER: ClassVar[int] = 0
    QUESTION: ClassVar[int] = 1
    length: int

    def _run(self) -> int:
        """Number of tokens to be repeated."""
        raise NotImplementedError

    def _haystack(self, generator: np.random.Generator, size: int) -> np.ndarray:
        raise NotImplementedError

    def _drawn(self, generator: np.random.Generator) -> np.ndarray:
        """The run."""
        raise NotImplementedError

    def _depth(self) -> float | None:
        return None

    def sample(self, generator: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        """Inputs and targets (batch, N) int32, and the weight of each target (batch, N) float32: 1 for the answer."""
        run, size = self._run(), self.length - 2 * self._run() - 1
        rows = []
        for _ in range(batch):
            hay, drawn, depth = self._haystack(generator, size), self._drawn(generator), self._depth()
            at = int(generator.integers(size + 1)) if depth is None else round(depth * size)
            rows.append(np.concatenate([hay[:at], [self.MARKER], drawn, hay[at:], [self.QUESTION], drawn]))
        tokens = np.asarray(rows, np.int32)
        weight = np.zeros((batch, self.length), np.float32)
        weight[:, self.length - run :] = 1
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weight": weight}

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The targets (B, N) of the inputs (B, N): at the end the run behind the marker, 0 elsewhere."""
        targets, run = np.zeros(inputs.shape, np.int32), self._run()
        targets[:, self.length - run :] = self.needle(inputs)
        return targets

    def needle(self, inputs: np.ndarray) -> np.ndarray:
        """The run (B, m) in inputs (B, N), or in what `prompt` makes of them."""
        start = (np.asarray(inputs) == self.MARKER).argmax(1) + 1
        return np.take_along_axis(np.asarray(inputs), start[:, None] + np.arange(self._run()), 1)

    def prompt(self, inputs: np.ndarray) -> np.ndarray:
        """Inputs up to the question, (B, N - m + 1), for a model to continue by the m tokens of the run."""
        return np.asarray(inputs)[:, : self.length - self._run() + 1]


def _check(length: int, run: int) -> None:
    if run < 1 or length < 2 * run + 1:
        raise ValueError(f"length must be at least {2 * run + 1} for a run of {run} tokens, got {length}")


@register(
    "needle",
    kind=Kind.TASK,
    paper=Paper("Retrieval Head Mechanistically Explains Long-Context Factuality", "Wu et al.", 2024, "2404.15574"),
    source=Source.PAPER_TEXT,
    cost=COST,
    summary="a run of tokens behind a marker, somewhere in noise, to be repeated at the end",
    small={"length": 14, "vocab_size": 12, "needle_length": 3},
)
@dataclasses.dataclass(frozen=True)
class Needle(_Repeated):
    """A needle of random tokens in random tokens; the marker alone tells where it is.

    Attributes:
      length: inputs N.
      vocab_size: tokens are below it, 0 is the marker and 1 the question.
      needle_length: tokens of the needle.
      depth: where it is, 0 at the start to 1 at the end of the noise; drawn when None.
    """

    length: int = 128
    vocab_size: int = 64
    needle_length: int = 6
    depth: float | None = None

    def __post_init__(self) -> None:
        _check(self.length, self.needle_length)
        if self.vocab_size < 3 or (self.depth is not None and not 0 <= self.depth <= 1):
            raise ValueError(f"vocab_size must be at least 3 and depth in 0..1, got {self.vocab_size} and {self.depth}")

    def _run(self) -> int:
        return self.needle_length

    def _haystack(self, generator: np.random.Generator, size: int) -> np.ndarray:
        return generator.integers(2, self.vocab_size, size)

    def _drawn(self, generator: np.random.Generator) -> np.ndarray:
        return generator.integers(2, self.vocab_size, self.needle_length)

    def _depth(self) -> float | None:
        return self.depth


@register(
    "pass_key",
    kind=Kind.TASK,
    paper=Paper(
        "Landmark Attention: Random-Access Infinite Context Length for Transformers",
        "Mohtashami and Jaggi",
        2023,
        "2305.16300",
    ),
    source=Source.PAPER_TEXT,
    cost=COST,
    summary="digits behind a marker in a text that repeats itself, to be repeated at the end",
    small={"length": 14, "digits": 3},
)
@dataclasses.dataclass(frozen=True)
class PassKey(_Repeated):
    """Digits 2..11 in a phrase of the tokens 12..31 that goes on and on.

    Attributes:
      length: inputs N.
      digits: of the pass key.
    """

    length: int = 256
    digits: int = 5

    vocab_size: ClassVar[int] = 32

    def __post_init__(self) -> None:
        _check(self.length, self.digits)

    def _run(self) -> int:
        return self.digits

    def _haystack(self, generator: np.random.Generator, size: int) -> np.ndarray:
        return 12 + np.arange(size) % 20

    def _drawn(self, generator: np.random.Generator) -> np.ndarray:
        return generator.integers(2, 12, self.digits)
