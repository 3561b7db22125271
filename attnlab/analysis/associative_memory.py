"""How much a Hebbian memory holds, and how its errors go through a network (2025, arXiv:2508.08289).

M items (k_j, v_j) with keys of unit length are summed, S = Σ_j k_j v_jᵀ, and read by their own keys:

    y_i = v_i + Σ_{j≠i} (k_i·k_j) v_j

For random keys the crosstalk has variance (M - 1) / D per component of unit variance: the part of the bits ±1 whose
sign survives is Φ(√(D / (M - 1))), and a part p of them does up to M = 1 + D / Φ⁻¹(p)² items, so that on average M
grows like D (0.6 D at 90 %). That every item is read without error holds up to O(√D), the paper's theorem.

Errors through a network are our reading of its trade-off of depth, width and redundancy, as only the abstract could be
read: R heads that repeat one another outvote an error rate p to

    p_R = Σ_{r > R/2} C(R, r) p^r (1 - p)^(R-r)      and half of a tie

which leaves (1 - p_R)^L right after L layers; noise of variance s² per head averages to s² / R and adds up to L s² / R.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnlab.attention.linear.pavlovian import PAPER
from attnlab.nn.norms import unit_norm
from attnlab.registry import Cost, Example, Kind, Source, register
from pallas_kernels.dtypes import at_least_float32


class Recall(NamedTuple):
    """What a Hebbian memory of an example's tokens gives back, each `(B, G)` in float32; 0 without tokens.

    Attributes:
      error: relative RMS error of what is read.
      expected: the same for random keys, √((M - 1) / D).
      signs: part of the components of the values whose sign is right.
    """

    error: jax.Array
    expected: jax.Array
    signs: jax.Array


def _example() -> Example:
    k, v = (jax.random.normal(jax.random.key(size), (3, 6, 2, size)) for size in (8, 5))
    return Example(recall, (k, v), {"mask": np.arange(6) < [[6], [4], [5]]}, (0, 1, "mask"), (0, 1))


@register(
    "pavlovian.recall",
    kind=Kind.ANALYSIS,
    paper=PAPER,
    source=Source.ABSTRACT_ONLY,
    cost=Cost(time="O(M²·G·(D+E))", memory="O(M²·G)"),
    summary="how well a Hebbian memory of keys and values gives the values back, for each head",
    small=_example,
)
def recall(keys: ArrayLike, values: ArrayLike, *, mask: ArrayLike | None = None) -> Recall:
    """Stores the tokens of each example under their keys, scaled to unit length, and reads them all.

    Args:
      keys: `(B, M, G, D)`, as recorded at the point `qkv`.
      values: `(B, M, G, E)`.
      mask: `(B, M)` boolean, which tokens are stored and read; all when None.

    Raises:
      ValueError: for shapes that do not fit.
    """
    k, v = jnp.asarray(keys), jnp.asarray(values)
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"keys and values must be (B, M, G, D) and (B, M, G, E), got {k.shape} and {v.shape}")
    wide = at_least_float32(k.dtype)
    k, v = unit_norm(k.astype(wide)), v.astype(wide)
    exists = jnp.ones(k.shape[:2], bool) if mask is None else jnp.asarray(mask)
    if exists.shape != k.shape[:2] or exists.dtype != jnp.bool_:
        raise ValueError(f"mask must be boolean {k.shape[:2]}, got {exists.dtype} {exists.shape}")
    v = jnp.where(exists[..., None, None], v, 0)
    there = exists[..., None, None]
    read = jnp.einsum("bmgd,bngd,bnge->bmge", k, k, v)
    noise = jnp.where(there, jnp.square(read - v), 0).sum((1, 3))
    signal = jnp.square(v).sum((1, 3))
    items = exists.sum(1).astype(wide)[:, None]
    right = jnp.where(there, jnp.sign(read) == jnp.sign(v), False).sum((1, 3))
    expected = jnp.sqrt(jnp.maximum(items - 1, 0) / k.shape[-1])
    # An error of zero, of a single item, has no slope.
    error = jnp.sqrt(jnp.maximum(noise, 1e-30) / jnp.maximum(signal, 1e-30))
    return Recall(
        jnp.where((noise > 0) & (signal > 0), error, 0),
        jnp.broadcast_to(expected, noise.shape),
        right / jnp.maximum(items * v.shape[-1], 1),
    )


def right_signs(head_dim: int, items: int) -> float:
    """The part of the bits ±1 that M `items` under random keys of D `head_dim` leave right, in expectation."""
    return 1.0 if items < 2 else NormalDist().cdf(math.sqrt(head_dim / (items - 1)))


def capacity(head_dim: int, share: float = 0.9) -> float:
    """How many items under random keys leave a part `share` of the bits ±1 right; `share` in (0.5, 1).

    Raises:
      ValueError: for a share out of its range.
    """
    if not 0.5 < share < 1:
        raise ValueError(f"share must be between 0.5, which chance gives, and 1, got {share}")
    return 1 + head_dim / NormalDist().inv_cdf(share) ** 2


def simulated_signs(head_dim: int, items: int, *, trials: int, bits: int = 32, seed: int = 0) -> float:
    """What `right_signs` says, measured: over `trials` memories of values of random `bits` under random keys."""
    generator = np.random.default_rng(seed)
    keys = generator.standard_normal((trials, items, head_dim))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    values = generator.choice([-1.0, 1.0], size=(trials, items, bits))
    read = keys @ (np.swapaxes(keys, 1, 2) @ values)
    return float(np.mean(np.sign(read) == values))


def voted_error(error: float, heads: int) -> float:
    """The error rate p_R of the majority of R `heads` that are wrong with probability `error`, independently."""
    chances = [math.comb(heads, r) * error**r * (1 - error) ** (heads - r) for r in range(heads + 1)]
    return math.fsum(c * (1.0 if 2 * r > heads else 0.5 * (2 * r == heads)) for r, c in enumerate(chances))


def fidelity(error: float, *, heads: int, layers: int) -> float:
    """What `layers` layers leave right, each of them a vote of `heads` heads: (1 - p_R)^L."""
    return (1 - voted_error(error, heads)) ** layers


def accumulated_noise(variance: float, *, heads: int, layers: int) -> float:
    """The variance L s² / R behind `layers` layers, in each of which `heads` heads are averaged."""
    return layers * variance / heads
