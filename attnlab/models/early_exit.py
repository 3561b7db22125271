"""Early exits: how sure an example must be to leave at one of several classifiers, what that costs, and leaving.

    confidence = max softmax;    an example leaves at the first exit k with confidence_k ≥ T_k, or at the last
    cost = Σ_k P(leaves at k) · cost up to k

Thresholds follow from confidences on held-out examples and the share of them that is to leave at each exit: T_k is the
confidence of the ⌊N p_k⌋-th surest of those that are still there (Han et al., 2023, arXiv:2306.11248; code:
LeapLabTHU/Dynamic_Perceiver). `classify` runs a model of several runs, and hands on only what has not left.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.cross.dyn_perceiver import SOURCE
from attnlab.models.dyn_perceiver import DynamicPerceiver, Progress
from attnlab.registry import Cost, Example, Kind, register


def exit_shares(ratio: float, exits: int = 4) -> tuple[float, ...]:
    """The share of examples that is to leave at each exit, p_k ∝ ratio^k: a ratio below 1 lets most leave early."""
    powers = [ratio**k for k in range(1, exits + 1)]
    return tuple(power / sum(powers) for power in powers)


def confidence(logits: Sequence[ArrayLike]) -> jax.Array:
    """The largest probability at each exit, `(N, exits)` in float32, of logits `(N, classes)` each."""
    return jnp.stack([jax.nn.softmax(jnp.asarray(one, jnp.float32)).max(-1) for one in logits], 1)


def _example() -> Example:
    confidences = jax.random.uniform(jax.random.key(0), (8, 3))
    return Example(exit_thresholds, (confidences,), {"shares": (0.25, 0.5, 0.25)}, (), ())


@register(
    "dyn_perceiver.thresholds",
    kind=Kind.FUNCTION,
    cost=Cost(time="O(N·log N)", memory="O(N)"),
    summary="how sure an example must be to leave at each exit, so that given shares of examples do",
    small=_example,
    **SOURCE,
)
def exit_thresholds(confidences: ArrayLike, *, shares: tuple[float, ...]) -> jax.Array:
    """One threshold for each exit, `(exits,)` in the dtype of the confidences.

    Args:
      confidences: of held-out examples, `(N, exits)`.
      shares: of all examples, that are to leave at each exit; what the last one's is does not matter. At an exit whose
        share is less than one example, or more than are still there, none leaves: its threshold is the largest number.

    Raises:
      ValueError: for another number of shares than exits, or negative ones.
    """
    confidences = jnp.asarray(confidences)
    count, exits = confidences.shape
    if len(shares) != exits or min(shares) < 0:
        raise ValueError(f"shares must be {exits} numbers of at least 0, got {shares}")
    gone, found, largest = jnp.zeros(count, bool), [], jnp.finfo(confidences.dtype).max
    for k in range(exits - 1):
        wanted = math.floor(count * shares[k])
        surest = jnp.sort(jnp.where(gone, -jnp.inf, confidences[:, k]))[::-1]
        threshold = jnp.asarray(largest, confidences.dtype)
        if 1 <= wanted <= count:
            threshold = jnp.where(surest[wanted - 1] == -jnp.inf, threshold, surest[wanted - 1])
        gone = gone | (confidences[:, k] >= threshold)
        found.append(threshold)
    return jnp.stack([*found, jnp.asarray(-largest, confidences.dtype)])


def exit_taken(confidences: ArrayLike, thresholds: ArrayLike) -> jax.Array:
    """Index of the first exit at which each example is sure enough, `(N,)` int32."""
    return jnp.argmax(jnp.asarray(confidences) >= jnp.asarray(thresholds), axis=1).astype(jnp.int32)


def expected_cost(taken: ArrayLike, costs: Sequence[float]) -> float:
    """The mean over examples of what it costs to come to the exit that each took.

    Args:
      taken: from `exit_taken`, `(N,)`.
      costs: up to each exit, in any unit, such as `exit_costs`.
    """
    return float(np.asarray(costs, np.float64)[np.asarray(taken)].mean())


def exit_costs(model: DynamicPerceiver, image_size: tuple[int, int] = (224, 224)) -> tuple[float, ...]:
    """Floating-point operations of one image up to each exit, as XLA counts them; nothing is computed.

    An exit is charged with all that stands in front of it, the classifiers that were passed among it.
    """
    graph, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((1, *image_size, model.image_shape[-1]), jnp.float32)

    def count(run: str, *arguments: object) -> float:
        program = jax.jit(lambda state, *args: getattr(nnx.merge(graph, state), run)(*args))
        return float(program.lower(state, *arguments).cost_analysis()["flops"])

    def shapes(run: str, *arguments: object) -> object:
        return jax.eval_shape(lambda state, *args: getattr(nnx.merge(graph, state), run)(*args), state, *arguments)

    first = shapes("begin", images)
    second = shapes("proceed", first)
    early, latent = count("begin", images), count("proceed", first)
    cnn, both = count("finish_cnn", second), count("finish", second)
    return early, early + latent, early + latent + cnn, early + latent + both


class Classified(NamedTuple):
    """What `classify` finds: `logits` `(N, classes)` and `taken` `(N,)`, the exit each example left at."""

    logits: np.ndarray
    taken: np.ndarray


def classify(model: DynamicPerceiver, images: ArrayLike, thresholds: ArrayLike) -> Classified:
    """Classifies images, each as far as it must go; between the runs, examples that have left are taken out.

    The batch of a later run is filled up to a power of two, so that few shapes are compiled. For evaluation alone: this
    function chooses on the host, and cannot be traced.

    Args:
      model: with four exits.
      images: `(N, H, W, channels)`.
      thresholds: `(4,)`, from `exit_thresholds`.

    Raises:
      ValueError: for another number of thresholds.
    """
    limits = np.asarray(thresholds, np.float32)
    if limits.shape != (4,):
        raise ValueError(f"thresholds must be one for each of four exits, got shape {limits.shape}")
    at = _run(model, "begin", images)
    here = np.arange(np.shape(images)[0])
    logits = np.array(at.logits)
    taken = np.zeros(len(here), np.int32)

    def staying(found: jax.Array, limit: float) -> np.ndarray:
        return np.flatnonzero(np.asarray(confidence([found])[: len(here), 0]) < limit)

    stay = staying(at.logits, limits[0])
    here, at = here[stay], _some(at, stay)
    if len(here):
        at = _run(model, "proceed", at)
        logits[here], taken[here] = np.asarray(at.logits)[: len(here)], 1
        stay = staying(at.logits, limits[1])
        here, at = here[stay], _some(at, stay)
    if len(here):
        cnn, merged = _run(model, "finish", at)
        last = np.asarray(confidence([cnn])[: len(here), 0]) < limits[2]
        taken[here] = np.where(last, 3, 2)
        logits[here] = np.where(last[:, None], merged[: len(here)], cnn[: len(here)])
    return Classified(logits, taken)


@functools.partial(nnx.jit, static_argnums=1)
def _run(model: DynamicPerceiver, run: str, x: object) -> object:
    return getattr(model, run)(x)


def _some(at: Progress, rows: np.ndarray) -> Progress:
    """The chosen examples, and copies of the first of them up to a power of two."""
    if not len(rows):
        return at
    size = 1 << (len(rows) - 1).bit_length()
    rows = np.concatenate([rows, np.full(size - len(rows), rows[0])])
    return jax.tree.map(lambda a: a[rows], at)
