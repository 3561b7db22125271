"""The residual paths of a pre-norm transformer, and what removing them does (ICCV 2023, arXiv:2308.06548).

    z_L = z_0 + Σ_l (m_l + f_l) = Σ_i P_i              2L + 1 paths: the input, attention and feed-forward of each layer

A removed path is missing in the sum that is classified, and still there for the layers behind it. `removals` tells the
accuracy without each path, `pruning_curve` removes one after another, always the one that costs least. The sum is
checked against timm's blocks; that a path is removed from the last sum alone is a reading of the paper's abstract.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.models.block import Block
from attnlab.models.path_ensemble import PathEnsembleViT, count_paths


def residual_paths(blocks: Sequence[Block], x: ArrayLike) -> jax.Array:
    """The paths `(2L + 1, B, …, C)` through L blocks: their sum is what the blocks make of the tokens.

    In the order of the pass: the tokens themselves, then what each branch adds, with the factor that the block has for
    it. Depthwise convolutions that a block adds are paths, too.

    Args:
      blocks: pre-norm, of any mixers, causal ones too.
      x: tokens `(B, …, C)`.

    Raises:
      UnsupportedArgument: for blocks with norms or factors on the stream itself, which are no sum of paths.
    """
    count_paths(blocks)
    x = jnp.asarray(x)
    paths: list[jax.Array] = [x]
    for block in blocks:
        x = block(x, paths=paths)
    return jnp.stack(paths)


class Removals(NamedTuple):
    """Accuracy with all paths, and without each of them.

    Attributes:
      whole: with all that the model keeps.
      without: `(2L + 1,)`, without one more.
    """

    whole: float
    without: np.ndarray


def removals(model: PathEnsembleViT, images: ArrayLike, labels: ArrayLike) -> Removals:
    """What removing each path costs on images with labels `(B,)`; all of them go through the model at once."""
    right = _right_without(model, images, labels, np.ones(model.ensemble.num_paths, bool))
    return Removals(float(right[0]), np.asarray(right[1:]))


class PruningCurve(NamedTuple):
    """Paths one after another, the one first whose removal costs least.

    Attributes:
      order: `(K,)`, which path was removed.
      accuracy: `(K + 1,)`, before the first removal and behind each.
    """

    order: np.ndarray
    accuracy: np.ndarray

    def mask(self, num_paths: int, removed: int) -> np.ndarray:
        """`(num_paths,)` boolean: what is left after so many removals, for `PathEnsembleViT`."""
        keep = np.ones(num_paths, bool)
        keep[self.order[:removed]] = False
        return keep


def pruning_curve(
    model: PathEnsembleViT, images: ArrayLike, labels: ArrayLike, *, removed: int | None = None
) -> PruningCurve:
    """Removes paths greedily; of equal ones the first.

    Args:
      model: the factors of its paths, if any, are in the sums; what its mask prunes already is not counted.
      images: `(B, H, W, channels)`.
      labels: integers `(B,)`.
      removed: how many; all but one when None.

    Raises:
      ValueError: for more removals than leave a path.
    """
    count = model.ensemble.num_paths
    removed = count - 1 if removed is None else removed
    if not 0 <= removed < count:
        raise ValueError(f"removed must be in 0..{count - 1} to leave a path of {count}, got {removed}")
    keep, order = np.ones(count, bool), []
    right = _right_without(model, images, labels, keep)
    accuracy = [float(right[0])]
    for _ in range(removed):
        path = int(np.argmax(np.where(keep, right[1:], -1.0)))
        keep[path] = False
        order.append(path)
        accuracy.append(float(right[1 + path]))
        right = _right_without(model, images, labels, keep)
    return PruningCurve(np.asarray(order, int), np.asarray(accuracy))


@nnx.jit
def _right_without(model: PathEnsembleViT, images: ArrayLike, labels: ArrayLike, keep: ArrayLike) -> jax.Array:
    """Accuracy `(1 + paths,)` of the kept paths, and without each one more."""
    paths = model.paths(images)
    weighed = jnp.stack(model.ensemble.weighed(paths))
    masks = jnp.concatenate([jnp.ones((1, len(paths)), bool), ~jnp.eye(len(paths), dtype=bool)]) & jnp.asarray(keep)
    graph, state = nnx.split(model)

    def right(mask: jax.Array) -> jax.Array:
        shape = (-1, *(1,) * (weighed.ndim - 1))
        ensemble = jnp.where(mask.reshape(shape), weighed, 0).sum(0).astype(paths[0].dtype)
        logits = nnx.merge(graph, state).classified(ensemble)
        return (logits.argmax(-1) == jnp.asarray(labels)).mean(dtype=jnp.float32)

    return jax.lax.map(right, masks)
