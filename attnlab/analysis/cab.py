"""How the benchmark CAB (Zhang et al., ICML 2023, arXiv:2210.07661) scores attentions: indices and efficiency lengths.

Attentions are compared in four patterns, {noncausal, causal} × {self, cross}. With the mean μ and the deviation σ of a
metric over the attentions of a study, and w = -1 where less is better, else 1:

    z = w (x - μ) / σ,   index of a task = mean of its z,   compositional index of a pattern = mean over its tasks

μ and σ of the paper's study are constants (`STUDIES`), so a new attention's index says where it stands among those of
the paper; `study` makes them of other results. An efficiency length is the number of tokens from which an efficient
attention is cheaper than vanilla attention: the larger root of

    a n² + b n + c = d n + e

with the parabola fitted to vanilla attention's memory or time by least squares, and the line to the other's.

Reference: Shark-NLP/CAB, `compositional_index.py`, `efficiency_length.py`. What has no root is infinite or 0 here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from attnlab.suggest import suggestion
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper(
    "CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling",
    "Zhang et al.",
    2023,
    arxiv="2210.07661",
    number=64,
)
_ENTRY = {"paper": PAPER, "source": Source.AUTHORS_CODE, "repository": "Shark-NLP/CAB"}


@dataclasses.dataclass(frozen=True)
class Study:
    """What metrics are compared with.

    Attributes:
      mean: μ of each metric.
      deviation: σ of each.
      sign: 1 for a metric of which more is better, else -1.
      tasks: names of the tasks, and how many of the metrics, in their order, belong to each.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    sign: tuple[int, ...]
    tasks: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        sizes = {len(self.mean), len(self.deviation), len(self.sign), sum(count for _, count in self.tasks)}
        if len(sizes) != 1 or any(count < 1 for _, count in self.tasks):
            raise ValueError(
                f"a study needs mean, deviation, sign and a task for each metric, got {len(self.mean)}, "
                f"{len(self.deviation)}, {len(self.sign)} and tasks {self.tasks}"
            )
        if min(self.deviation) <= 0 or set(self.sign) - {1, -1}:
            raise ValueError(f"deviations must be above 0 and signs 1 or -1, got {self.deviation} and {self.sign}")


STUDIES: dict[str, Study] = {
    "noncausal self": Study(
        (3.4245, 1.97429, 4.06947, 2.19021, 34.88667, 6.79333, 31.96889, 23.208, 0.6758, 36.292),
        (0.06832, 0.0361768, 0.09422, 0.03866, 1.39697, 1.41078, 1.31499, 0.27499, 0.01557, 62.30827),
        (-1, -1, -1, -1, 1, 1, 1, 1, 1, -1),
        (("TTS", 4), ("Sum", 3), ("SR", 2), ("MLM", 1)),
    ),
    "causal self": Study(
        (4.08325, 2.20085, 32.9575, 6.0925, 30.2575, 22.26),
        (0.04529, 0.01372, 1.92754, 0.41007, 1.61951, 8.29944),
        (-1, -1, 1, 1, 1, -1),
        (("TTS", 2), ("Sum", 3), ("LM", 1)),
    ),
    "noncausal cross": Study(
        (7.7025, 0.24775, 0.7625, 1.18933, 0.80625, 0.47575, 0.511, 0.62025, 0.58075),
        (0.64789, 0.03366, 0.03906, 0.05615, 0.02193, 0.01057, 0.00601, 0.18948, 0.10312),
        (-1, -1, 1, -1, -1, -1, -1, -1, -1),
        (("PCC", 3), ("LSTF", 6)),
    ),
    "causal cross": Study(
        (5.5037, 2.6278, 31.35, 5.26, 28.8),
        (1.29239, 0.42726, 3.77103, 1.26028, 3.28638),
        (-1, -1, 1, 1, 1),
        (("TTS", 2), ("Sum", 3)),
    ),
}
"""The paper's study by pattern. TTS: mel cepstral distortion and mel spectral distance; Sum: ROUGE-1, -2 and -L; SR:
PSNR and SSIM; MLM and LM: perplexity; PCC: two Chamfer distances and the F-score; LSTF: squared and absolute errors on
three series."""


def study(metrics: ArrayLike, sign: Sequence[int], tasks: Mapping[str, int]) -> Study:
    """A study of one's own: the mean and the deviation of each metric over the attentions.

    Args:
      metrics: `(attentions, metrics)`, at least two of the former.
      sign: 1 for a metric of which more is better, else -1.
      tasks: for each task, how many of the metrics in their order are its.

    Raises:
      ValueError: for shapes that do not fit, or a metric that is the same for all attentions.
    """
    table = np.asarray(metrics, np.float64)
    if table.ndim != 2 or table.shape[0] < 2:
        raise ValueError(f"metrics must be (attentions, metrics) of at least 2 attentions, got shape {table.shape}")
    return Study(tuple(table.mean(0).tolist()), tuple(table.std(0).tolist()), tuple(sign), tuple(tasks.items()))


class CompositionalIndex(NamedTuple):
    """How an attention stands in a study, in deviations; float32 (or wider).

    Attributes:
      tasks: `(..., T)`, index of each task.
      total: `(...)`, their mean: the compositional index.
    """

    tasks: jax.Array
    total: jax.Array


@register(
    "cab.compositional_index",
    kind=Kind.ANALYSIS,
    **_ENTRY,
    cost=Cost("O(K)", "O(K)"),
    summary="where an attention stands among those of a study, over tasks whose metrics have other units",
    small=lambda: Example(compositional_index, (jnp.array([[4.1, 2.2, 33, 6, 30, 22], [4.0, 2.3, 31, 5, 29, 40]]),)),
)
def compositional_index(metrics: ArrayLike, *, pattern: str | Study = "causal self") -> CompositionalIndex:
    """Indices of attentions by their metrics.

    Args:
      metrics: `(..., K)` in the order of the study.
      pattern: a name in `STUDIES`, or a study.

    Raises:
      ValueError: for another number of metrics, or an unknown pattern.
    """
    if isinstance(pattern, str) and pattern not in STUDIES:
        raise ValueError(f"no study is called {pattern!r}: {suggestion(pattern, STUDIES)}")
    of = STUDIES[pattern] if isinstance(pattern, str) else pattern
    metrics = jnp.asarray(metrics)
    wide = metrics.astype(at_least_float32(metrics.dtype))
    if wide.ndim < 1 or wide.shape[-1] != len(of.mean):
        raise ValueError(f"metrics must be (..., {len(of.mean)}), got shape {wide.shape}")
    mean, deviation, sign = (jnp.asarray(np.asarray(part), wide.dtype) for part in (of.mean, of.deviation, of.sign))
    scores, indices, first = sign * (wide - mean) / deviation, [], 0
    for _, count in of.tasks:
        indices.append(scores[..., first : first + count].mean(-1))
        first += count
    tasks = jnp.stack(indices, -1)
    return CompositionalIndex(tasks, tasks.mean(-1))


class EfficiencyLength(NamedTuple):
    """From how many tokens on an attention is cheaper than vanilla attention; float32 (or wider).

    Attributes:
      length: `(...)`; 0 where it always is, infinite where it never is.
      vanilla: `(..., 3)`, c, b and a of the parabola.
      other: `(..., 2)`, e and d of the line.
      fit: `(..., 2)`, R² of the parabola and of the line.
    """

    length: jax.Array
    vanilla: jax.Array
    other: jax.Array
    fit: jax.Array


def _example() -> Example:
    lengths = jnp.array([256.0, 512, 1024, 2048])
    costs = jnp.stack([1e-6 * lengths**2 + 1e-4 * lengths + 1, 2e-6 * lengths**2 + 2])
    return Example(
        efficiency_length, (costs, 2e-3 * lengths + jnp.array([[2.0], [3]])), {"lengths": lengths},
        batched=(0, 1), differentiable=(0, 1),
    )  # fmt: skip


@register(
    "cab.efficiency_length",
    kind=Kind.ANALYSIS,
    **_ENTRY,
    cost=Cost("O(L)", "O(L)"),
    summary="the sequence length from which an attention costs less than vanilla attention",
    small=_example,
)
def efficiency_length(vanilla: ArrayLike, other: ArrayLike, *, lengths: ArrayLike, skip: int = 0) -> EfficiencyLength:
    """Where the costs of two attentions cross.

    Args:
      vanilla: memory or time of vanilla attention at each length, `(..., L)`.
      other: that of the other one, `(..., L)`.
      lengths: numbers of tokens `(L,)`; 256, 512, …, 8192 in the paper.
      skip: the first lengths that do not count for the line: 1 in the paper for times, which are overhead there.

    Raises:
      ValueError: for shapes that do not fit, or too few lengths.
    """
    vanilla, other, lengths = (jnp.asarray(x) for x in (vanilla, other, lengths))
    wide = at_least_float32(vanilla.dtype)
    vanilla, other, lengths = (x.astype(wide) for x in (vanilla, other, lengths))
    count = lengths.shape[0] if lengths.ndim == 1 else -1
    if vanilla.shape != other.shape or vanilla.shape[-1:] != (count,):
        raise ValueError(
            f"vanilla and other must be (..., L) for lengths (L,), got {vanilla.shape}, {other.shape}, {lengths.shape}"
        )
    if skip < 0 or count < 3 or count - skip < 2:
        raise ValueError(f"three lengths are needed, and two behind the {skip} that are skipped, got {count}")
    unit = lengths.max()
    (c, b, a), parabola = _fit(lengths / unit, vanilla, 2)
    (e, d), line = _fit(lengths[skip:] / unit, other[..., skip:], 1)
    half, rest = (b - d) / 2, c - e
    inside = jnp.square(half) - a * rest
    crosses = (inside >= 0) & (a > 0)
    root = (jnp.sqrt(jnp.where(crosses, inside, 0)) - half) / jnp.where(crosses, a, 1)
    never = jnp.where(a > 0, 0, jnp.inf)
    length = jnp.where(crosses, jnp.maximum(root * unit, 0), never)
    return EfficiencyLength(
        length,
        jnp.stack([c, b / unit, a / jnp.square(unit)], -1),
        jnp.stack([e, d / unit], -1),
        jnp.stack([parabola, line], -1),
    )


def _fit(x: jax.Array, y: jax.Array, degree: int) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Coefficients, from the constant on, of the least-squares polynomial of `y` `(..., L)`, and R²."""
    powers = jnp.stack([x**power for power in range(degree + 1)], -1)
    basis, triangle = jnp.linalg.qr(powers)
    weights = jax.scipy.linalg.solve_triangular(triangle, basis.T)  # (degree + 1, L)
    found = jnp.einsum("pl,...l->...p", weights, y, precision="highest")
    off = y - jnp.einsum("lp,...p->...l", powers, found, precision="highest")
    spread = jnp.square(y - y.mean(-1, keepdims=True)).sum(-1)
    share = jnp.where(spread > 0, jnp.square(off).sum(-1) / jnp.where(spread > 0, spread, 1), 0)
    return tuple(jnp.moveaxis(found, -1, 0)), 1 - share
