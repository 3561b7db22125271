"""Where tokens are, as angles by which queries and keys turn: rotary embedding and its learned, linearised kin.

Positions are integers (or reals), `(N,)` or `(B, N)` along one axis, `(B|1, N, A)` along A axes. Angles are computed in
float32.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnlab.nn.positions import even_split
from pallas_kernels.dtypes import at_least_float32


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Frequencies for longer sequences than those of the training (YaRN, Peng et al., 2023, arXiv:2309.00071).

    A pair of channels that turns often within the old length keeps its frequency, one that turns seldom is slowed down
    by `factor`, and between the two the change is linear in the index of the pair.

    Attributes:
      factor: new length over old one, at least 1.
      original_length: the old length, in tokens.
      beta_fast: turns within the old length from which on a pair is kept.
      beta_slow: turns up to which a pair is slowed down by the whole factor.
      magnitude: factor of rotated queries and keys; `yarn_magnitude(factor)` when None.
      truncate: whether the two bounds are rounded to whole pairs, outwards.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_length < 1 or self.beta_slow > self.beta_fast:
            raise ValueError(f"factor and original_length must be at least 1, beta_slow at most beta_fast, got {self}")

    def slowed(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Frequencies theta^(-i/p) of p pairs to those of the longer sequence."""
        pairs = len(frequencies)

        def bound(turns: float) -> float:
            return pairs * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(theta)

        low, high = bound(self.beta_fast), bound(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        # The least distance is that of the authors' code, for bounds that coincide.
        ramp = np.clip((np.arange(pairs) - low) / (high - low if high > low else 0.001), 0, 1)
        return frequencies * (1 - ramp) + frequencies / self.factor * ramp

    def size(self) -> float:
        """The factor of rotated queries and keys."""
        return yarn_magnitude(self.factor) if self.magnitude is None else self.magnitude


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """0.1 · weight · ln(factor) + 1: how much longer YaRN makes queries and keys; DeepSeek's scores take its square."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Options of `rotary`, as a value that modules can keep.

    Attributes:
      theta: base of the frequencies.
      split: pairs of channels for each axis; evenly when None.
      interleaved: whether pairs are neighbours (2i, 2i+1) rather than (i, i + D/2).
      regroup: whether pairs that are neighbours come out as (i, i + D/2).
      channels: how many channels turn, the first ones; all when None.
      inclusive: whether the last of an axis' frequencies is 1/theta itself.
      yarn: frequencies for longer sequences; as they are when None.
    """

    theta: float = 10000.0
    split: tuple[int, ...] | None = None
    interleaved: bool = False
    regroup: bool = False
    channels: int | None = None
    inclusive: bool = False
    yarn: Yarn | None = None

    def __call__(self, x: ArrayLike, positions: ArrayLike) -> jax.Array:
        """`rotary` with these options."""
        return rotary(x, positions, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    @classmethod
    def of(cls, rotary: "Rotary | float | None", **options: Any) -> "Rotary | None":
        """What an argument `rotary` means: itself, none, or theta for a `Rotary` with these options.

        Raises:
          ValueError: for a boolean.
        """
        if isinstance(rotary, bool | np.bool_):
            raise ValueError(f"rotary must be a Rotary or theta, got {rotary}")
        return cls(float(rotary), **options) if isinstance(rotary, int | float | np.number) else rotary

    def check(self, size: int, axes: int) -> None:
        """Raises `ValueError` if these options do not fit heads of `size` channels and positions along `axes` axes."""
        _pairs(_turning(size, self.channels), axes, self.split)


def rotary(
    x: ArrayLike,
    positions: ArrayLike,
    *,
    theta: float = 10000.0,
    split: Sequence[int] | None = None,
    interleaved: bool = False,
    regroup: bool = False,
    channels: int | None = None,
    inclusive: bool = False,
    yarn: Yarn | None = None,
) -> jax.Array:
    """Rotary position embedding (Su et al., 2021, arXiv:2104.09864) along one or several axes.

    The D/2 pairs of channels are divided among the axes, first axis first; pair i of the p pairs of an axis turns by
    position · theta^(-i/p). A product of a rotated query and a rotated key depends on the differences of their
    positions only.

    Args:
      x: `(B, N, H, D)`.
      positions: `(N,)` or `(B, N)` for one axis, `(B|1, N, A)` for A axes.
      theta: base of the frequencies.
      split: pairs of channels for each axis, D/2 in sum; evenly when None, the first axes taking the remainder.
      interleaved: pairs are the channels (2i, 2i+1), as in the paper; else (i, i + D/2), as in Llama's code.
      regroup: pairs that are neighbours come out as (i, i + D/2). Where queries and keys are both rotated, this changes
        nothing; where queries alone are, some authors' weights need it.
      channels: how many of the channels turn, the first ones, which then stand for D; all when None.
      inclusive: exponents are -i/(p-1), up to -1, as in RetNet (Sun et al., 2023, arXiv:2307.08621).
      yarn: frequencies for longer sequences.

    Returns:
      `(B, N, H, D)` in the dtype of `x`.

    Raises:
      ValueError: if the number of turning channels is odd, or `split` does not fit the axes and that number.
    """
    x = jnp.asarray(x)
    turning = _turning(x.shape[-1], channels)
    angles = rotary_angles(positions, turning, theta=theta, split=split, inclusive=inclusive, yarn=yarn)[:, :, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if yarn is not None:
        cos, sin = cos * yarn.size(), sin * yarn.size()
    wide = x[..., :turning].astype(at_least_float32(x.dtype))
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    turned = first * cos - second * sin, first * sin + second * cos
    together = interleaved and not regroup
    y = jnp.stack(turned, -1).reshape(wide.shape) if together else jnp.concatenate(turned, -1)
    y = y.astype(x.dtype)
    return y if turning == x.shape[-1] else jnp.concatenate([y, x[..., turning:]], -1)


def rotary_angles(
    positions: ArrayLike,
    size: int,
    *,
    theta: float = 10000.0,
    split: Sequence[int] | None = None,
    inclusive: bool = False,
    yarn: Yarn | None = None,
) -> jax.Array:
    """Angles `(B|1, N, size/2)` in float32 of `rotary` for heads of which `size` channels turn."""
    positions = jnp.asarray(positions)
    if positions.ndim not in (1, 2, 3):
        raise ValueError(f"positions must be (N,), (B, N) or (B, N, axes), got shape {positions.shape}")
    if positions.ndim == 1:
        positions = positions[None]
    if positions.ndim == 2:
        positions = positions[..., None]
    split = _pairs(size, positions.shape[-1], split)
    where = positions.astype(jnp.float32)
    frequencies = (_frequencies(pairs, theta, inclusive, yarn) for pairs in split)
    return jnp.concatenate([where[..., a, None] * one for a, one in enumerate(frequencies)], -1)


def _turning(size: int, channels: int | None) -> int:
    if channels is None:
        return size
    if not 2 <= channels <= size:
        raise ValueError(f"channels must be in 2..{size}, the head size, got {channels}")
    return channels


def _pairs(size: int, axes: int, split: Sequence[int] | None) -> tuple[int, ...]:
    if size % 2:
        raise ValueError(f"rotary positions turn pairs of channels: their number must be even, got {size}")
    split = even_split(size // 2, axes) if split is None else tuple(split)
    if len(split) != axes or sum(split) != size // 2 or min(split) < 0:
        raise ValueError(f"split must give {axes} axes {size // 2} pairs in sum, got {split}")
    return split


def _frequencies(pairs: int, theta: float, inclusive: bool, yarn: Yarn | None) -> np.ndarray:
    steps = max(pairs - 1 if inclusive else pairs, 1)
    frequencies = float(theta) ** -(np.arange(pairs) / steps)
    return np.asarray(frequencies if yarn is None else yarn.slowed(frequencies, theta), np.float32)


# Linearised relative positions


def lrpe(x: ArrayLike, theta: ArrayLike, positions: ArrayLike) -> jax.Array:
    """Linearised relative positions (Qin et al., 2023, arXiv:2307.09270; several axes, 2024, arXiv:2405.21022).

        y = [x cos Θ, x sin Θ],   Θ(n) = n θ,   along m axes Θ(n_1, ..., n_m) = (n_1 θ, ..., n_m θ), cut to D angles

    so that a product of queries and keys depends on the cosines of angle differences.

    Args:
      x: queries or keys, (B, N, H, D).
      theta: angles per step, (H, e), in radians; e = D for one axis, at least ⌈D/m⌉ for m.
      positions: (B|1, N), or (B|1, N, m) integers; a token at 0 is not turned.

    Returns:
      (B, N, H, 2D) in the dtype of `x`; angles are computed in float32.

    Raises:
      ValueError: if the angles of all axes are fewer than D.
    """
    x = jnp.asarray(x)
    angle = _axis_angles(theta, positions, x.shape[-1], at_least_float32(x.dtype))
    return jnp.concatenate([x * jnp.cos(angle), x * jnp.sin(angle)], axis=-1).astype(x.dtype)


def lrpe_rotation(x: ArrayLike, theta: ArrayLike, positions: ArrayLike) -> jax.Array:
    """The form of `lrpe` that keeps the size: pairs of channels (2i, 2i+1) turn by learned angles of their head.

    The D/2 pairs are divided evenly among m axes, each of which uses the first D/(2m) angles of θ (H, D/2).

    Returns:
      (B, N, H, D) in the dtype of `x`.

    Raises:
      ValueError: if 2m does not divide D, or there are too few angles.
    """
    x, positions = jnp.asarray(x), jnp.asarray(positions)
    axes = positions.shape[-1] if positions.ndim == 3 else 1
    if x.shape[-1] % (2 * axes):
        raise ValueError(f"the head size must be a multiple of {2 * axes} for {axes} axes, got {x.shape[-1]}")
    wide = at_least_float32(x.dtype)
    share = x.shape[-1] // (2 * axes)
    angle = _axis_angles(jnp.asarray(theta)[:, :share], positions, x.shape[-1] // 2, wide)
    first, second = x[..., 0::2].astype(wide), x[..., 1::2].astype(wide)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([first * cos - second * sin, first * sin + second * cos], -1).reshape(x.shape).astype(x.dtype)


def _axis_angles(theta: ArrayLike, positions: ArrayLike, size: int, dtype: Any) -> jax.Array:
    """`(B|1, N, H, size)`: angles of each axis one after the other, cut to `size`."""
    theta, where = jnp.asarray(theta, dtype), jnp.asarray(positions, dtype)
    where = where[..., None] if where.ndim == 2 else where
    if theta.shape[-1] * where.shape[-1] < size:
        raise ValueError(
            f"theta of shape {theta.shape} has too few angles for {where.shape[-1]} axes and {size} channels"
        )
    angles = where[:, :, None, :, None] * theta[:, None]
    return angles.reshape(*angles.shape[:3], -1)[..., :size]


def initial_theta(num_heads: int, head_dim: int) -> jax.Array:
    """Angles (H, D) in float32 before training: 10000^(-2m / (H·D)), m = 0..H·D-1 through the heads."""
    size = num_heads * head_dim
    return (10000.0 ** (-2 * jnp.arange(size) / size)).reshape(num_heads, head_dim)
