"""Small stand-ins for the tasks of the benchmark CAB (Zhang et al., ICML 2023, arXiv:2210.07661), made to be solved.

    masked_tokens       noncausal self    MLM        tokens of a text that repeats itself are hidden
    aligned_copying     causal            TTS, Sum   each token of a source is spoken for as long as it takes
    forecasting         noncausal cross   LSTF       a sum of waves goes on
    point_completion    noncausal cross   PCC        a gap in a closed curve is filled

The fifth, recall for language models, is `multi_query_recall`. The paper's data are real; these tasks are ours, each
with an oracle that is exact, so that what an attention cannot do is not what nobody could.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from attnlab.analysis.cab import PAPER
from attnlab.registry import Cost, Kind, Source, register

_ENTRY = {"kind": Kind.TASK, "paper": PAPER, "source": Source.PAPER_TEXT}


@register(
    "cab.masked_tokens",
    **_ENTRY,
    cost=Cost("O(N)", "O(N)"),
    summary="hidden tokens of a text that repeats itself with an unknown word",
    small={"length": 12, "vocab_size": 9, "period": 4},
)
@dataclasses.dataclass(frozen=True)
class MaskedTokens:
    """A random word is repeated over and over, and some of its tokens are hidden, but never all copies of one.

    Attributes:
      length: tokens N, at least 2 · period.
      vocab_size: tokens are below it; 0 hides.
      period: tokens of the word.
      rate: share of the tokens that are hidden.
    """

    length: int = 64
    vocab_size: int = 32
    period: int = 8
    rate: float = 0.3

    def __post_init__(self) -> None:
        if self.period < 1 or self.length < 2 * self.period or self.vocab_size < 3 or not 0 < self.rate < 1:
            raise ValueError(
                f"length must be at least 2 · period, vocab_size 3 and rate inside 0..1, got {self.length}, "
                f"{self.period}, {self.vocab_size} and {self.rate}"
            )

    def sample(self, generator: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        """Inputs and targets (batch, N) int32, and the weight of each target (batch, N) float32: 1 where hidden."""
        words = generator.integers(1, self.vocab_size, (batch, self.period), np.int32)
        targets = words[:, np.arange(self.length) % self.period]
        hidden = generator.random((batch, self.length)) < self.rate
        place = np.arange(self.length) % self.period
        for row in hidden:
            for residue in range(self.period):
                copies = np.flatnonzero(place == residue)
                row[generator.choice(copies)] = False
            if not row.any():
                row[0] = True  # its other copies are there
        inputs = np.where(hidden, 0, targets)
        return {"inputs": inputs, "targets": targets, "weight": hidden.astype(np.float32)}

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The targets (B, N) of the inputs (B, N)."""
        inputs = np.asarray(inputs)
        place = np.arange(self.length) % self.period
        word = np.stack([inputs[:, place == residue].max(1) for residue in range(self.period)], 1)
        return word[:, place].astype(np.int32)


@register(
    "cab.aligned_copying",
    **_ENTRY,
    cost=Cost("O(N)", "O(N)"),
    summary="each token of a source is repeated as often as it takes: a monotone alignment",
    small={"length": 14, "vocab_size": 8, "source": 4},
)
@dataclasses.dataclass(frozen=True)
class AlignedCopying:
    """A source, a token 0, and the source again, in which token t stands 1 + t mod `longest` times.

    The target is that speech, cut off at the end of the sequence or filled up with 0.

    Attributes:
      length: inputs N.
      vocab_size: tokens are below it.
      source: tokens of the source.
      longest: the longest that a token takes.
    """

    length: int = 64
    vocab_size: int = 32
    source: int = 16
    longest: int = 3

    def __post_init__(self) -> None:
        if self.source < 1 or self.longest < 1 or self.vocab_size < 2 or self.length < 2 * self.source + 1:
            raise ValueError(
                f"length must be at least 2 · source + 1, vocab_size 2 and longest 1, got {self.length}, "
                f"{self.source}, {self.vocab_size} and {self.longest}"
            )

    def sample(self, generator: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        """Inputs and targets (batch, N) int32, and the weight of each target (batch, N) float32: 1 for the speech."""
        sources = generator.integers(1, self.vocab_size, (batch, self.source), np.int32)
        speech = self._speech(sources)
        inputs = np.concatenate([sources, np.zeros((batch, 1), np.int32), speech[:, :-1]], 1)
        weight = np.zeros(inputs.shape, np.float32)
        weight[:, self.source :] = 1
        return {"inputs": inputs, "targets": self.oracle(inputs), "weight": weight}

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The targets (B, N) of the inputs (B, N): the speech behind the source, 0 elsewhere."""
        inputs = np.asarray(inputs)
        before = np.zeros((len(inputs), self.source), np.int32)
        return np.concatenate([before, self._speech(inputs[:, : self.source])], 1)

    def _speech(self, sources: np.ndarray) -> np.ndarray:
        size = self.length - self.source
        speech = np.zeros((len(sources), size), np.int32)
        for row, source in zip(speech, sources, strict=True):
            spoken = np.repeat(source, 1 + source % self.longest)[:size]
            row[: len(spoken)] = spoken
        return speech


@register(
    "cab.forecasting",
    **_ENTRY,
    cost=Cost("O(N)", "O(N)"),
    summary="how a sum of waves of unknown strengths goes on",
    small={"length": 16, "responses": 3, "waves": 2},
)
@dataclasses.dataclass(frozen=True)
class Forecasting:
    """A series of N numbers, a sum of some of the waves of the task; asked for are the next ones.

    The waves have `waves` periods from 4 to N/2 tokens, at equal ratios; each has a random amplitude and phase in every
    series. It opens as data of the kind `vectors`.

    Attributes:
      length: tokens N, at least 8 and 2 · waves.
      responses: numbers that are asked for.
      waves: of a series.
    """

    length: int = 96
    responses: int = 24
    waves: int = 3

    token_features: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.waves < 1 or self.responses < 1 or self.length < max(8, 2 * self.waves):
            raise ValueError(
                f"length must be at least 8 and 2 · waves, responses and waves 1, got {self.length}, {self.responses} "
                f"and {self.waves}"
            )

    def sample(self, generator: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        """Inputs (batch, N, 1), targets (batch, responses), weight (batch,), all float32."""
        parts = generator.standard_normal((batch, 2 * self.waves)) * (2 * self.waves) ** -0.5
        series = parts @ self._basis().T
        inputs, targets = series[:, : self.length, None], series[:, self.length :]
        weight = np.ones(batch, np.float32)
        return {"inputs": inputs.astype(np.float32), "targets": targets.astype(np.float32), "weight": weight}

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The targets (B, responses), of the waves that fit the series (B, N, 1) best."""
        basis = self._basis()
        parts = np.linalg.lstsq(basis[: self.length], np.asarray(inputs, np.float64)[..., 0].T, rcond=None)[0]
        return (basis[self.length :] @ parts).T.astype(np.float32)

    def _basis(self) -> np.ndarray:
        """Sines and cosines at all times, `(N + responses, 2 · waves)`."""
        periods = np.geomspace(4, self.length / 2, self.waves) if self.waves > 1 else np.array([self.length / 4])
        angles = 2 * np.pi * np.arange(self.length + self.responses)[:, None] / periods
        return np.concatenate([np.sin(angles), np.cos(angles)], 1)


@register(
    "cab.point_completion",
    **_ENTRY,
    cost=Cost("O(N)", "O(N)"),
    summary="the points that are missing in a gap of a closed curve in space",
    small={"length": 12, "missing": 2},
)
@dataclasses.dataclass(frozen=True)
class PointCompletion:
    """Points of an ellipse in space, in their order, of which a run at a random place is missing.

    A token is x, y, z, and 1, or zeros where the point is missing; asked for are the missing points from the first. It
    opens as data of the kind `vectors`.

    Attributes:
      length: points N, missing ones too.
      missing: points of the gap.
    """

    length: int = 48
    missing: int = 8

    token_features: ClassVar[int] = 4

    def __post_init__(self) -> None:
        if self.missing < 1 or self.length < self.missing + 3:
            raise ValueError(f"length must be at least missing + 3, got {self.length} and {self.missing}")

    @property
    def responses(self) -> int:
        """Numbers that are asked for."""
        return 3 * self.missing

    def sample(self, generator: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        """Inputs (batch, N, 4), targets (batch, 3 · missing), weight (batch,), all float32."""
        points = self._basis() @ generator.standard_normal((batch, 3, 3))
        first = generator.integers(self.length, size=batch)
        gap = (first[:, None] + np.arange(self.missing)) % self.length
        targets = np.take_along_axis(points, gap[..., None], 1).reshape(batch, -1)
        inputs = np.concatenate([points, np.ones((batch, self.length, 1))], -1)
        np.put_along_axis(inputs, gap[..., None], 0, 1)
        weight = np.ones(batch, np.float32)
        return {"inputs": inputs.astype(np.float32), "targets": targets.astype(np.float32), "weight": weight}

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The targets (B, 3 · missing), of the ellipses that fit the other points best."""
        answers, basis = [], self._basis()
        for example in np.asarray(inputs, np.float64):
            there = example[:, 3] > 0
            shape = np.linalg.lstsq(basis[there], example[there, :3], rcond=None)[0]
            # The gap begins behind a point that is there.
            first = np.flatnonzero(~there & np.roll(there, 1))[0]
            gap = (first + np.arange(self.missing)) % self.length
            answers.append((basis[gap] @ shape).ravel())
        return np.asarray(answers, np.float32)

    def _basis(self) -> np.ndarray:
        """Centre, cosine and sine at all points, `(N, 3)`."""
        angles = 2 * np.pi * np.arange(self.length)[:, None] / self.length
        return np.concatenate([np.ones_like(angles), np.cos(angles), np.sin(angles)], 1)
