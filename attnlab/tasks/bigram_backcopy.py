"""Bigram-backcopy (Guo et al., 2024, arXiv:2410.13835): a Markov chain with triggers that copy the token before them.

    x_0 = <s>;   x_1 ~ the frequencies of characters without the triggers
    x_{t+1} = x_{t-1}             if x_t is a trigger
    x_{t+1} ~ bigrams[x_t]        else

Bigrams are those of tiny Shakespeare by characters, triggers its k most frequent ones. In a transformer that learns it,
a head that copies at triggers has nothing to do elsewhere, and attends to <s> then: it is dormant, and <s> is a sink.

The vocabulary of 67 is 65 characters, <s> (65), and <d> (66), which is never drawn. Triggers may follow triggers; since
x_1 is none, <s> is never copied. The table of counts is in `bigram_counts.csv`.

Reference: GuoTianYu2000/Active-Dormant-Attention, `bbm`, `get_oracle_predicts`, `get_risk`.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnlab.attention.dense.relu_attention import PAPER
from attnlab.registry import Cost, Kind, Source, register

CHARACTERS = 65
START = 65


class Chain(NamedTuple):
    """What the task draws from, V = 67; arrays are NumPy's, or JAX's for counts that are.

    Attributes:
      bigrams: `(V, V)`, the next token's distribution after each; that of single characters after <s> and <d>.
      frequencies: `(V,)`, of single characters.
      first: `(V,)`, of the token behind <s>: without triggers.
      triggers: `(k,)` int, in ascending order of frequency.
    """

    bigrams: Any
    frequencies: Any
    first: Any
    triggers: Any


def chain(bigram_counts: ArrayLike, unigram_counts: ArrayLike, k: int) -> Chain:
    """The task's distributions from the counts `(65, 65)` and `(65,)` of a text, and its k triggers."""
    array = jnp if isinstance(bigram_counts, jax.Array) else np
    counts, singles = array.asarray(bigram_counts), array.asarray(unigram_counts)
    extra = len(singles) + 2
    frequencies = array.pad(singles / singles.sum(), (0, 2))
    rows = array.pad(counts / array.maximum(counts.sum(1, keepdims=True), 1), ((0, 0), (0, 2)))
    triggers = array.argsort(singles)[extra - 2 - k :]
    rest = array.where((array.arange(extra)[:, None] == triggers).any(1), 0, frequencies)
    return Chain(
        array.concatenate([rows, frequencies[None], frequencies[None]]), frequencies, rest / rest.sum(), triggers
    )


@functools.cache
def shakespeare(k: int) -> Chain:
    """The chain of tiny Shakespeare, in float64."""
    counts = np.loadtxt(Path(__file__).with_name("bigram_counts.csv"), delimiter=",", dtype=np.int64)
    return chain(counts[1:], counts[0], k)


@register(
    "active_dormant.bigram_backcopy",
    kind=Kind.TASK,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="GuoTianYu2000/Active-Dormant-Attention",
    cost=Cost("O(N·V)", "O(V²)"),
    summary="a chain of bigrams in which the most frequent characters copy the token before them",
    small={"length": 12, "weigh": "copies"},
)
@dataclasses.dataclass(frozen=True)
class BigramBackcopy:
    """The task; see the module docstring.

    Attributes:
      length: inputs N; a sequence has N + 1 tokens.
      k: number of triggers.
      weigh: `"all"` counts every target, as in the paper; `"copies"` those alone that are no matter of chance.
    """

    length: int = 256
    k: int = 3
    weigh: str = "all"

    vocab_size: ClassVar[int] = CHARACTERS + 2

    def __post_init__(self):
        if not 1 <= self.k <= CHARACTERS or self.length < 2:
            raise ValueError(f"k must lie in 1..{CHARACTERS} and length be at least 2, got {self.k} and {self.length}")
        if self.weigh not in ("all", "copies"):
            raise ValueError(f"weigh must be 'all' or 'copies', got {self.weigh!r}")

    def sample(self, generator: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        """Inputs and targets (batch, N) int32, and the weight of each target (batch, N) float32."""
        it, tokens = shakespeare(self.k), np.full((batch, self.length + 1), START, np.int32)
        ranges, first = np.cumsum(it.bigrams, 1), np.cumsum(it.first)
        tokens[:, 1] = _draw(first[None], generator.random(batch))
        for place in range(1, self.length):
            now = tokens[:, place]
            drawn = _draw(ranges[now], generator.random(batch))
            tokens[:, place + 1] = np.where(np.isin(now, it.triggers), tokens[:, place - 1], drawn)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        counted = self.triggered(inputs) if self.weigh == "copies" else np.ones(inputs.shape, bool)
        return {"inputs": inputs, "targets": targets, "weight": counted.astype(np.float32)}

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The likeliest targets (B, N): the copy behind a trigger, which is certain; else the likeliest successor."""
        before = np.concatenate([inputs[:, :1], inputs[:, :-1]], 1)
        likeliest = shakespeare(self.k).bigrams.argmax(1)[inputs]
        return np.where(self.triggered(inputs), before, likeliest).astype(np.int32)

    def triggered(self, inputs: ArrayLike) -> np.ndarray:
        """Where the input is a trigger, (B, N) boolean: there a head is active, elsewhere dormant."""
        return np.isin(np.asarray(inputs), shakespeare(self.k).triggers)


class Risk(NamedTuple):
    """Cross-entropy against the oracle, in nats.

    Attributes:
      oracle: `(B, N, V)`, the true distribution of each target.
      risk: `(B, N)`.
      copies: mean of the risk where the input is a trigger.
      bigrams: mean of the risk elsewhere.
      triggered: `(B, N)` boolean.
    """

    oracle: jax.Array
    risk: jax.Array
    copies: jax.Array
    bigrams: jax.Array
    triggered: jax.Array


def oracle_risk(inputs: ArrayLike, logits: ArrayLike, *, k: int = 3) -> Risk:
    """How far logits are from the true distributions.

    Args:
      inputs: tokens `(B, N)` of the task.
      logits: `(B, N, 67)`.
      k: number of triggers.
    """
    it, inputs = shakespeare(k), jnp.asarray(inputs)
    triggered = (inputs[..., None] == jnp.asarray(it.triggers)).any(-1)
    before = jnp.concatenate([inputs[:, :1], inputs[:, :-1]], 1)
    copied = jax.nn.one_hot(before, len(it.frequencies))
    oracle = jnp.where(triggered[..., None], copied, jnp.asarray(it.bigrams, jnp.float32)[inputs])
    likelihood = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    risk = -jnp.sum(jnp.where(oracle > 0, oracle * likelihood, 0), -1)

    def mean(where: jax.Array) -> jax.Array:
        return jnp.where(where, risk, 0).sum() / jnp.maximum(where.sum(), 1)

    return Risk(oracle, risk, mean(triggered), mean(~triggered), triggered)


def _draw(ranges: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Indices (B,) by cumulative distributions (B|1, V) and uniform numbers (B,)."""
    return np.minimum((uniform[:, None] * ranges[:, -1:] >= ranges).sum(1), ranges.shape[1] - 1)
