"""Absolute error with the hard regions stressed, of RAT (Yang et al., MICCAI 2024, arXiv:2407.09268).

    w_i = mean of |prediction - target| over the region of i, over the greatest such mean of the batch    (no gradient)
    loss = mean_i |prediction_i - target_i| (β w_i + 1)

Code: Yaziwel/Region-Attention-Transformer-for-Medical-Image-Restoration.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnlab.attention.sparse.rat_region_attention import PAPER, REPOSITORY
from attnlab.nn.token_selection import group_by
from attnlab.registry import Cost, Example, Kind, Source, register
from pallas_kernels.integers import integers, runs


def _example() -> Example:
    rng = np.random.default_rng(0)
    prediction, target = rng.standard_normal((2, 2, 4, 5, 3)).astype(np.float32)
    labels = rng.integers(0, 4, (2, 4, 5), np.int32)
    # The greatest mean is that of the batch: no example is alone.
    return Example(focal_region_loss, (prediction, target, labels), batched=(), differentiable=(0, 1))


@register(
    "rat_region_attention.loss",
    kind=Kind.OBJECTIVE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=Cost(time="O(N·log(N)+N·C)", memory="O(N·C)"),
    summary="absolute error, each region weighted by its own mean error among those of the batch",
    small=_example,
)
def focal_region_loss(
    prediction: ArrayLike,
    target: ArrayLike,
    labels: ArrayLike,
    *,
    beta: float = 1.0,
    weight: ArrayLike | None = None,
) -> jax.Array:
    """The error, averaged over the entries of each example; (B,) float32.

    Args:
      prediction: `(B, *S, C)`.
      target: of the same shape.
      labels: of the regions, integers `(B, *S)`.
      beta: β; the authors train with 1e-3.
      weight: of the entries, broadcastable to them, in all means; 1 when None. An example whose weights are all 0
        gives 0.

    Raises:
      ValueError: for shapes that do not fit.
    """
    shape = jnp.shape(prediction)
    if jnp.shape(target) != shape or jnp.shape(labels) != shape[:-1]:
        raise ValueError(f"target must be {shape} and labels {shape[:-1]}, got {jnp.shape(target), jnp.shape(labels)}")
    error = jnp.abs(jnp.asarray(prediction, jnp.float32) - jnp.asarray(target, jnp.float32))
    weight = jnp.broadcast_to(jnp.asarray(1.0 if weight is None else weight, jnp.float32), shape)
    entries = tuple(range(1, len(shape)))
    means = jax.lax.stop_gradient(_region_means(error, weight, integers("labels", labels)))
    greatest = means.max()
    stress = jnp.clip(means / jnp.where(greatest == 0, 1, greatest), 0, 1)
    total = weight.sum(entries)
    return (error * weight * (beta * stress + 1)[..., None]).sum(entries) / jnp.where(total == 0, 1, total)


def _region_means(error: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
    """At each token `(B, *S)` the mean error of its region; any integers are labels."""
    batch, tokens = error.shape[0], labels[0].size
    order = group_by(labels.reshape(batch, tokens))
    # Labels in order, numbered anew from 0: there are no more of them than tokens.
    region = runs(jnp.take_along_axis(labels.reshape(batch, tokens), order.places, 1))
    region = jnp.take_along_axis(region, order.inverse, 1)
    sums = jnp.stack([(error * weight).sum(-1), weight.sum(-1)], -1).reshape(batch, tokens, 2)
    rows = jnp.arange(batch)[:, None]
    whole = jnp.zeros_like(sums).at[rows, region].add(sums)[rows, region]
    return (whole[..., 0] / jnp.where(whole[..., 1] == 0, 1, whole[..., 1])).reshape(labels.shape)
