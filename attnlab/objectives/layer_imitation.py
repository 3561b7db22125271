"""Losses that teach a recurrent block the layers of a transformer (2025, arXiv:2512.19941; KempnerInstitute/raptor).

Of the teacher's tokens A_0..A_L, in front of the first of L layers and behind each, and of f(x, t), t the layer:

    autoregressive     x_0 = A_0, x_i = f(x_{i-1} + σ ε, start + i):   Σ_i l(x_i, A_i) / L
    teacher-forced     mean_i l(f(A_{i-1} + σ ε, start + i), A_i)

and a mixture of both, r · teacher-forced + (1 - r) · autoregressive, where r falls linearly from 1 in the first quarter
of the steps. l is one of

    "mse"              mean of squares
    "cosine"           - mean over tokens of the cosine; the authors' code lacks the sign, where it stands alone
    "mse_cosine"       0.5 mse - 0.5 cosine
    "weighted"         w_c mse(class token) + w_r mse(registers) + w_p mse(patches)

All are of each example; the authors' are the mean over the batch.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.models.raptor import PAPER
from attnlab.registry import Cost, Example, Kind, Source, register

Layer = Callable[[jax.Array, jax.Array], jax.Array]
Loss = Callable[[jax.Array, jax.Array], jax.Array]
_REPOSITORY = "KempnerInstitute/raptor"


def _mse(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.square(prediction - target).mean((1, 2))


def _cosine(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over tokens, each norm at least 1e-8, as PyTorch has it."""
    lengths = (jnp.maximum(jnp.square(part).sum(-1), 1e-16) for part in (prediction, target))
    product = (prediction * target).sum(-1)
    for length in lengths:
        product = product * jax.lax.rsqrt(length)
    return product.mean(1)


def _tokens() -> tuple[jax.Array, ...]:
    return tuple(jax.random.normal(key, (2, 7, 6)) for key in jax.random.split(jax.random.key(0)))


@register(
    "raptor.token_loss",
    kind=Kind.OBJECTIVE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=_REPOSITORY,
    cost=Cost(time="O(N·C)", memory="O(N·C)"),
    summary="squares and cosines between tokens, with weights of class token, registers and patches",
    small=lambda: Example(token_loss, _tokens(), {"kind": "weighted"}, (0, 1), (0, 1)),
)
def token_loss(
    prediction: ArrayLike,
    target: ArrayLike,
    *,
    kind: Literal["mse", "cosine", "mse_cosine", "weighted"] = "mse",
    weights: tuple[float, float, float] = (0.34, 0.33, 0.33),
    registers: int = 4,
) -> jax.Array:
    """How far tokens are from the teacher's; `(B,)` float32.

    Args:
      prediction: `(B, N, C)`; for "weighted" a class token, the registers, then patches.
      target: of the same shape.
      kind: which loss.
      weights: of class token, registers and patches, for "weighted"; the last phase's are 0.45, 0.1 and 0.45.
      registers: how many follow the class token.

    Raises:
      ValueError: for shapes that do not fit, another kind, or "weighted" without patches.
    """
    y, wanted = (jnp.asarray(a, jnp.float32) for a in (prediction, target))
    if y.shape != wanted.shape or y.ndim != 3:
        raise ValueError(f"prediction and target must be (B, N, C) alike, got {y.shape} and {wanted.shape}")
    if kind == "mse":
        return _mse(y, wanted)
    if kind == "cosine":
        return -_cosine(y, wanted)
    if kind == "mse_cosine":
        return 0.5 * _mse(y, wanted) - 0.5 * _cosine(y, wanted)
    if kind != "weighted":
        raise ValueError(f"kind must be mse, cosine, mse_cosine or weighted, got {kind!r}")
    front = 1 + registers
    if y.shape[1] <= front:
        raise ValueError(f"weighted needs patches behind {front} tokens, got {y.shape[1]} tokens in all")
    spans = [slice(0, 1), slice(1, front), slice(front, None)]
    parts = [(w, span) for w, span in zip(weights, spans, strict=True) if span.stop is None or span.start < span.stop]
    return sum((w * _mse(y[:, span], wanted[:, span]) for w, span in parts), jnp.zeros(y.shape[0]))


def _check(sequence: ArrayLike, sigma: float, key: jax.Array | None) -> jax.Array:
    sequence = jnp.asarray(sequence)
    if sequence.ndim != 4 or sequence.shape[1] < 2:
        raise ValueError(f"sequence must be (B, L + 1, N, C) with L at least 1, got {sequence.shape}")
    if (sigma > 0) != (key is not None):
        raise ValueError(f"key is needed for noise, and only for that: sigma is {sigma}")
    return sequence


def autoregressive_loss(
    layer: Layer,
    sequence: ArrayLike,
    *,
    start: int = 0,
    loss: Loss = token_loss,
    sigma: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """The loss of a roll-out from the first tokens, averaged over layers; `(B,)` float32.

    Args:
      layer: f(x `(B, N, C)`, t `(B,)`), such as a `RecurrentBlock`.
      sequence: the teacher's tokens, `(B, L + 1, N, C)`.
      start: number of the layer whose tokens come first.
      loss: of tokens, `(B,)`.
      sigma: deviation of noise on what each layer is given.
      key: of the noise.

    Raises:
      ValueError: for another shape, or noise without a key.
    """
    sequence = _check(sequence, sigma, key)
    x, count = sequence[:, 0], sequence.shape[1] - 1
    total = jnp.zeros(sequence.shape[:1], jnp.float32)
    for i in range(count):
        if key is not None:
            x = x + sigma * jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        x = layer(x, jnp.full(x.shape[:1], start + i + 1, jnp.float32))
        total = total + loss(x, sequence[:, i + 1]) / count
    return total


def teacher_forced_loss(
    layer: Layer,
    sequence: ArrayLike,
    *,
    start: int = 0,
    loss: Loss = token_loss,
    sigma: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """The loss of every layer from the teacher's own tokens, all at once; arguments as `autoregressive_loss`."""
    sequence = _check(sequence, sigma, key)
    batch, count = sequence.shape[0], sequence.shape[1] - 1
    x, wanted = (part.reshape(-1, *sequence.shape[2:]) for part in (sequence[:, :-1], sequence[:, 1:]))
    if key is not None:
        x = x + sigma * jax.random.normal(key, x.shape, x.dtype)
    numbers = jnp.tile(jnp.arange(start + 1, start + count + 1, dtype=jnp.float32), batch)
    return loss(layer(x, numbers), wanted).reshape(batch, count).mean(1)


def teacher_share(step: ArrayLike, steps: int, *, anneal: float = 0.25, minimum: float = 0.0) -> jax.Array:
    """r at a step of so many: from 1 linearly to 0 in the first part `anneal` of them, never below `minimum`."""
    return jnp.maximum(minimum, 1 - jnp.asarray(step, jnp.float32) / (anneal * steps))


def _sequence() -> Example:
    sequence = jax.random.normal(jax.random.key(0), (2, 4, 3, 5))
    return Example(imitation_loss, (_fading, sequence), {"teacher_share": 0.25}, (1,), (1,))


def _fading(x: jax.Array, t: jax.Array) -> jax.Array:
    return x * (1 - 0.1 * t[:, None, None]).astype(x.dtype)


@register(
    "raptor.imitation",
    kind=Kind.OBJECTIVE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=_REPOSITORY,
    cost=Cost(time="O(L) layers", memory="O(L·N·C)"),
    summary="a block against the layers of a teacher: from the teacher's tokens, and from its own",
    small=_sequence,
)
def imitation_loss(
    layer: Layer,
    sequence: ArrayLike,
    *,
    teacher_share: ArrayLike = 0.0,
    start: int = 0,
    loss: Loss = token_loss,
    sigma: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """`teacher_share` of the teacher-forced loss, and the rest of the autoregressive one; `(B,)` float32.

    Args:
      layer: f(x `(B, N, C)`, t `(B,)`).
      sequence: the teacher's tokens, `(B, L + 1, N, C)`.
      teacher_share: r, from 0 to 1, see the function of that name.
      start: number of the layer whose tokens come first.
      loss: of tokens.
      sigma: deviation of the noise.
      key: of the noise.
    """
    first, second = (None, None) if key is None else jax.random.split(key)
    options = {"start": start, "loss": loss, "sigma": sigma}
    forced = teacher_forced_loss(layer, sequence, **options, key=first)
    return teacher_share * forced + (1 - teacher_share) * autoregressive_loss(layer, sequence, **options, key=second)
