"""Phases of the layers of a transformer, and how its tokens turn from layer to layer (2025, arXiv:2512.19941).

Layers are as far apart as the directions of their tokens: W_lm = 1 - mean of the cosines between layers l and m, over
the class token and the mean of the patches. Phases are the parts that a recursive maximum cut of W leaves: the part
with the most promise, which is the weight of the cut that made it, is cut in two, exactly, as long as the cut weighs
more than ε; parts smaller than twice the least size stay. Side 0, that of the first layer, keeps its number, side 1
takes the next (code: KempnerInstitute/raptor, whose ε are 0.2, 0.1, 0.09 of all weight for 2, 3 and 4 phases).

Of the tokens themselves, with angles in radians: how fast each turns from layer to layer, how far it still is from its
last direction, how much patches agree (the length of the mean of their directions), and in how many directions an
update moves the tokens (stable rank Σσ² / max σ²), which is few in late layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnlab.models.raptor import PAPER
from attnlab.nn.norms import unit_norm
from attnlab.registry import Cost, Example, Kind, Source, register
from pallas_kernels.dtypes import at_least_float32


class DepthDynamics(NamedTuple):
    """How tokens change from layer to layer, float32.

    Attributes:
      dissimilarity: W, `(B, L, L)`.
      speed: angle from each layer to the next, `(B, L - 1, N)`.
      remaining: angle to the last layer, `(B, L, N)`.
      coherence: length of the mean direction of the patches, `(B, L)`.
      update_rank: stable rank of what each layer adds, `(B, L - 1)`.
    """

    dissimilarity: jax.Array
    speed: jax.Array
    remaining: jax.Array
    coherence: jax.Array
    update_rank: jax.Array


@register(
    "raptor.depth_dynamics",
    kind=Kind.ANALYSIS,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="KempnerInstitute/raptor",
    cost=Cost(time="O(L²·C + L·N²·C)", memory="O(L·N·C)"),
    summary="how far apart layers are, how fast tokens turn between them, and along how many directions",
    small=lambda: Example(depth_dynamics, (jax.random.normal(jax.random.key(0), (2, 4, 6, 5)),), {"prefix": 2}),
)
def depth_dynamics(streams: ArrayLike, *, prefix: int = 1) -> DepthDynamics:
    """Measures the streams behind every layer.

    Args:
      streams: `(B, L, N, C)`, of L layers at least two; the streams of a model, stacked.
      prefix: class token and registers in front of the patches; the first of them is the class token, which is left out
        of W where there is none.

    Raises:
      ValueError: for another shape, or a prefix that leaves no patches.
    """
    x = jnp.asarray(streams)
    if x.ndim != 4 or x.shape[1] < 2 or not 0 <= prefix < x.shape[2]:
        raise ValueError(f"streams must be (B, L, N, C) with L at least 2 and N over {prefix=}, got {x.shape}")
    x = x.astype(at_least_float32(x.dtype))
    patches = x[:, :, prefix:]
    means = patches.mean(2, keepdims=True)
    kinds = unit_norm(jnp.concatenate([x[:, :, :1], means], 2) if prefix else means)
    cosines = jnp.clip(jnp.einsum("blkc,bmkc->blmk", kinds, kinds), -1, 1)
    directions = unit_norm(x)
    return DepthDynamics(
        1 - cosines.mean(-1),
        _angle(directions[:, :-1], directions[:, 1:]),
        _angle(directions, directions[:, -1:]),
        _length(directions[:, :, prefix:].mean(2)),
        _stable_rank(x[:, 1:] - x[:, :-1]),
    )


def _length(x: jax.Array) -> jax.Array:
    """With a slope, which is 0, at 0 too."""
    square = jnp.square(x).sum(-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _angle(u: jax.Array, v: jax.Array) -> jax.Array:
    """Between unit vectors; the arc cosine has no precision, and no slope, where they are the same."""
    return 2 * jnp.arctan2(_length(u - v), _length(u + v))


def _stable_rank(x: jax.Array) -> jax.Array:
    rows = x if x.shape[-2] < x.shape[-1] else x.mT
    values = jnp.linalg.eigvalsh(jnp.matmul(rows, rows.mT, precision="highest"))
    largest = values[..., -1]
    return jnp.where(largest > 0, values.sum(-1) / jnp.where(largest > 0, largest, 1), 0)


def max_cut(weights: ArrayLike) -> tuple[np.ndarray, float]:
    """The cut of a graph into two sides that the most weight crosses, by trial of all.

    Args:
      weights: W, `(L, L)`, symmetric; L up to about 20.

    Returns:
      The side of each vertex, `(L,)` boolean, False for the first, and the weight across. Of equal cuts it is the first
      in the order of the sides read as binary numbers.

    Raises:
      ValueError: for weights that are no square.
    """
    w = np.asarray(weights, np.float64)
    if w.ndim != 2 or w.shape[0] != w.shape[1] or not w.size:
        raise ValueError(f"weights must be a square, got {w.shape}")
    count, best, best_side = w.shape[0], -np.inf, np.zeros(w.shape[0], bool)
    shifts = np.arange(count - 2, -1, -1)
    for first in range(0, 2 ** (count - 1), _CUTS):
        numbers = np.arange(first, min(first + _CUTS, 2 ** (count - 1)))
        sides = np.pad((numbers[:, None] >> shifts) & 1, ((0, 0), (1, 0))).astype(np.float64)
        across = np.einsum("ki,ij,kj->k", sides, w + w.T, 1 - sides, optimize=True) / 2
        index = int(np.argmax(across))
        if across[index] > best:
            best, best_side = float(across[index]), sides[index].astype(bool)
    return best_side, best


_CUTS = 1 << 16


def recursive_max_cut(weights: ArrayLike, eps: float, *, min_size: int = 2) -> np.ndarray:
    """The phases of layers by recursive maximum cuts.

    Args:
      weights: W, `(L, L)`.
      eps: a cut is made if more weight crosses it.
      min_size: parts of fewer than twice as many layers are not cut.

    Returns:
      The number of each layer's part, `(L,)`.
    """
    w = np.asarray(weights, np.float64)
    parts, promise = [np.arange(len(w))], [np.inf]
    while max(promise) > eps:
        target = int(np.argmax(promise))
        layers = parts[target]
        if layers.size < 2 * min_size:
            promise[target] = -np.inf
            continue
        side, across = max_cut(w[np.ix_(layers, layers)])
        if across <= eps:
            promise[target] = -np.inf
            continue
        parts[target], promise[target] = layers[~side], across
        parts.append(layers[side])
        promise.append(across)
    labels = np.empty(len(w), np.int64)
    for number, layers in enumerate(parts):
        labels[layers] = number
    return labels


def thresholds_of(labels: Sequence[int] | np.ndarray) -> tuple[int, ...]:
    """The last layer of each phase but the last, counted from 1, as `Raptor` takes them.

    Raises:
      ValueError: if the layers of a phase are not contiguous.
    """
    labels = np.asarray(labels)
    ends = np.flatnonzero(labels[1:] != labels[:-1]) + 1
    if len(ends) + 1 != len(np.unique(labels)):
        raise ValueError(f"phases must be contiguous, got the labels {labels.tolist()}")
    return tuple(int(end) for end in ends)
