"""In-context linear regression (He et al., ICML 2025, arXiv:2503.12734): a line of another slope in every example.

    β ~ N(0, I/d),   x_l ~ N(0, I),   y_l = x_l·β + σ ε_l,   l = 1..L;     asked for x_q, the target is x_q·β + σ ε_q

The inputs are the rows (x_l, y_l), and last (x_q, 0). With two responses, each looks at `used` covariates: one at the
first, the other at the last, so that they overlap; then β ~ N(0, I), and there is noise of the deviation √used · σ in
the context alone.

Reference: XintianPan/ICL_linear, `LinearReg`, `MultiTaskLinearReg`. The oracle is ridge regression with the true noise;
without noise, and with more examples than covariates, it is exact.
"""

import dataclasses

import numpy as np

from attnlab.models.in_context_regression import PAPER
from attnlab.registry import Cost, Kind, Source, register


@register(
    "icl_linear_regression.regression",
    kind=Kind.TASK,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="XintianPan/ICL_linear",
    cost=Cost("O(L·d)", "O(L·d)"),
    summary="a response for one more covariate, from pairs of covariates and responses of an unknown line",
    small={"length": 12, "covariates": 3, "variance": 0.0},
)
@dataclasses.dataclass(frozen=True)
class InContextRegression:
    """The task; see the module docstring. It opens as data of the kind `vectors`.

    Attributes:
      length: examples L in front of the query.
      covariates: d.
      variance: σ² of the noise.
      responses: numbers of a response, 1 or 2.
      used: covariates that each of two responses looks at.
      correlation: ρ of covariates of the covariance ρ^|i-j|, 0 for independent ones; others are learned with a
        preconditioner. The paper's covariances were not read: this family is ours.
    """

    length: int = 40
    covariates: int = 5
    variance: float = 0.1
    responses: int = 1
    used: int | None = None
    correlation: float = 0.0

    def __post_init__(self) -> None:
        if self.length < 1 or self.covariates < 1 or self.variance < 0:
            raise ValueError(
                f"length and covariates must be at least 1 and variance 0, got {self.length}, {self.covariates}, "
                f"{self.variance}"
            )
        if self.responses not in (1, 2):
            raise ValueError(f"responses must be 1 or 2, got {self.responses}")
        if (self.responses == 2) != (self.used is not None):
            raise ValueError(f"used goes with two responses, got {self.used} with {self.responses}")
        if not -1 < self.correlation < 1:
            raise ValueError(f"correlation must lie in -1..1, both excluded, got {self.correlation}")
        if self.used is not None and not 1 <= self.used <= self.covariates:
            raise ValueError(f"used must lie in 1..{self.covariates}, got {self.used}")

    @property
    def token_features(self) -> int:
        """Numbers of a row."""
        return self.covariates + self.responses

    def sample(self, generator: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        """Inputs (batch, L + 1, d + responses), targets (batch, responses), weight (batch,), all float32."""
        d, tasks = self.covariates, self.responses
        apart = np.abs(np.arange(d)[:, None] - np.arange(d))
        # The Cholesky factor of the covariance turns independent numbers into correlated ones.
        mixed = np.linalg.cholesky(float(self.correlation) ** apart)
        x = generator.standard_normal((batch, self.length + 1, d)) @ mixed.T
        beta = generator.standard_normal((batch, d, tasks)) * (d**-0.5 if tasks == 1 else 1.0)
        beta = beta * self._looks_at()
        noise = self._deviation() * generator.standard_normal((batch, self.length + 1, tasks))
        if tasks == 2:
            noise[:, -1] = 0
        y = x @ beta + noise
        inputs = np.concatenate([x, y], -1)
        inputs[:, -1, d:] = 0
        weight = np.ones(batch, np.float32)
        return {"inputs": inputs.astype(np.float32), "targets": y[:, -1].astype(np.float32), "weight": weight}

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The best predictions (B, responses) of the inputs: ridge regression on the covariates of each response."""
        inputs, d = np.asarray(inputs, np.float64), self.covariates
        x, y, x_q = inputs[:, :-1, :d], inputs[:, :-1, d:], inputs[:, -1, :d]
        answers = []
        for task in range(self.responses):
            chosen = self._looks_at()[:, task] > 0
            # The variance of a coefficient is 1/d with one response, 1 with two.
            prior = d if self.responses == 1 else 1
            gram = np.einsum("bld,ble->bde", x[..., chosen], x[..., chosen])
            gram += self._deviation() ** 2 * prior * np.eye(chosen.sum())
            moment = np.einsum("bld,bl->bd", x[..., chosen], y[..., task])
            answers.append(np.einsum("bd,bd->b", x_q[:, chosen], np.linalg.solve(gram, moment[..., None])[..., 0]))
        return np.stack(answers, -1).astype(np.float32)

    def _looks_at(self) -> np.ndarray:
        """Which covariates count for which response, (d, responses)."""
        mask = np.ones((self.covariates, self.responses))
        if self.used is not None:
            mask[self.used :, 0] = 0
            mask[: self.covariates - self.used, 1] = 0
        return mask

    def _deviation(self) -> float:
        return self.variance**0.5 * (1.0 if self.used is None else self.used**0.5)
