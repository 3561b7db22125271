"""Training on turned and perturbed images, the recipe of Berrios and Deza (2022, arXiv:2203.06649).

For each batch of images x in [0, 1] a perturbation starts at random, takes one step along the gradient of the loss, and
the model is trained on the images under it (fast adversarial training: Wong et al., 2020, arXiv:2001.03994):

    δ ~ U(-ε, ε)                                                        ε = 2/255
    δ ← clip(δ + α sign(∇_δ loss(clip(x + δ, 0, 1))), -ε, ε)            α = 2.5/255
    one step of the optimizer on loss(clip(x + δ, 0, 1))

Images are turned by 90°, and then by 180°, each with probability 1/2. The authors trained CrossViT-18† so, by Adam at
8e-5 with weight decay 1e-4, for 6 epochs; code: williamberrios/BrainScore-Transformers.
`attnlab.training.AdversarialTask` trains so.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.models.crossvit import PAPER
from attnlab.objectives.adversarial import adversarial_step
from attnlab.registry import Cost, Example, Kind, Source, register


def _example_loss(images: jax.Array) -> jax.Array:
    return jnp.square(images.astype(jnp.float32) - 0.4).sum((1, 2, 3))


def _example() -> Example:
    keys = jax.random.split(jax.random.key(0), 2)
    images = jax.random.uniform(keys[0], (2, 4, 4, 3))
    start = random_start(keys[1], images.shape)
    return Example(fast_adversarial, (_example_loss, images, start), {}, (1, 2), (1,))


def random_start(key: jax.Array, shape: tuple[int, ...], *, epsilon: float = 2 / 255) -> jax.Array:
    """δ ~ U(-ε, ε) in float32, anew for each batch."""
    return jax.random.uniform(key, shape, minval=-epsilon, maxval=epsilon)


@register(
    "crossvit_dual_stream.adversarial",
    kind=Kind.FUNCTION,
    paper=PAPER,
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(1) gradients of the loss", memory="O(B·H·W)"),
    summary="images under a perturbation of one step against a model, for fast adversarial training",
    small=_example,
)
def fast_adversarial(
    loss: Callable[[jax.Array], jax.Array],
    images: ArrayLike,
    start: ArrayLike,
    *,
    epsilon: float = 2 / 255,
    step: float = 2.5 / 255,
) -> jax.Array:
    """The images that the model is trained on next; the perturbation has no gradient.

    Args:
      loss: of images in [0, 1], what stands in front of a model's normalisation: a scalar, or one number per example.
        In training mode, as the authors take it.
      images: `(B, H, W, channels)` in [0, 1].
      start: δ of their shape, from `random_start`; zeros for a plain step (FGSM).
      epsilon: ε, greatest change of a channel.
      step: α.

    Returns:
      Of the shape and dtype of the images, in [0, 1].

    Raises:
      ValueError: if δ has another shape than the images, or ε is not positive.
    """
    images, start = jnp.asarray(images), jnp.asarray(start)
    if start.shape != images.shape:
        raise ValueError(f"start must have the shape of the images {images.shape}, got {start.shape}")

    def perturbed(delta: jax.Array) -> jax.Array:
        return jnp.clip(images + delta.astype(images.dtype), 0, 1)

    delta = adversarial_step(lambda delta: loss(perturbed(delta)), start, size=step, norm="sign", bound=epsilon)
    return perturbed(delta)


def random_quarter_turns(key: jax.Array, images: ArrayLike) -> jax.Array:
    """Each image `(B, S, S, channels)` turned by 90° and then by 180°, each with probability 1/2.

    Raises:
      ValueError: for images that are not square.
    """
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[1] != images.shape[2]:
        raise ValueError(f"images must be square (B, S, S, channels) to be turned, got {images.shape}")
    quarter, half = jax.random.bernoulli(key, shape=(2, images.shape[0], 1, 1, 1))
    turned = jnp.where(quarter, jnp.rot90(images, axes=(1, 2)), images)
    return jnp.where(half, turned[:, ::-1, ::-1], turned)
