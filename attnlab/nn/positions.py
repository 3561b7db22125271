"""Where tokens are: rotary embedding, sine-cosine and learned tables, relative biases, ALiBi.

Positions are integers (or reals), `(N,)` or `(B, N)` along one axis, `(B|1, N, A)` along A axes; `grid_positions` lists
those of an image or a video. Angles and biases are computed in float32.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.linear import trunc_normal
from attnlab.nn.resampling import resize_bilinear


def grid_positions(grid: Sequence[int]) -> np.ndarray:
    """Coordinates `(1, N, A)` int32 of the tokens of a grid with A axes, in row-major order."""
    axes = np.meshgrid(*(np.arange(length, dtype=np.int32) for length in grid), indexing="ij")
    return np.stack(axes, -1).reshape(1, -1, len(grid))


# Rotary embedding


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Options of `rotary`, as a value that modules can keep.

    Attributes:
      theta: base of the frequencies.
      split: pairs of channels for each axis; evenly when None.
      interleaved: whether pairs are neighbours (2i, 2i+1) rather than (i, i + D/2).
      regroup: whether pairs that are neighbours come out as (i, i + D/2).
    """

    theta: float = 10000.0
    split: tuple[int, ...] | None = None
    interleaved: bool = False
    regroup: bool = False

    def __call__(self, x: ArrayLike, positions: ArrayLike) -> jax.Array:
        """`rotary` with these options."""
        return rotary(
            x, positions, theta=self.theta, split=self.split, interleaved=self.interleaved, regroup=self.regroup
        )

    def check(self, size: int, axes: int) -> None:
        """Raises `ValueError` if these options do not fit heads of `size` channels and positions along `axes` axes."""
        _pairs(size, axes, self.split)


def rotary(
    x: ArrayLike,
    positions: ArrayLike,
    *,
    theta: float = 10000.0,
    split: Sequence[int] | None = None,
    interleaved: bool = False,
    regroup: bool = False,
) -> jax.Array:
    """Rotary position embedding (Su et al., 2021, arXiv:2104.09864) along one or several axes.

    The D/2 pairs of channels are divided among the axes, first axis first; pair i of the p pairs of an axis turns by
    position · theta^(-i/p). A product of a rotated query and a rotated key depends on the differences of their
    positions only.

    Args:
      x: `(B, N, H, D)`, D even.
      positions: `(N,)` or `(B, N)` for one axis, `(B|1, N, A)` for A axes.
      theta: base of the frequencies.
      split: pairs of channels for each axis, D/2 in sum; evenly when None, the first axes taking the remainder.
      interleaved: pairs are the channels (2i, 2i+1), as in the paper; else (i, i + D/2), as in Llama's code.
      regroup: pairs that are neighbours come out as (i, i + D/2). Where queries and keys are both rotated, this changes
        nothing; where queries alone are, some authors' weights need it.

    Returns:
      `(B, N, H, D)` in the dtype of `x`.

    Raises:
      ValueError: if D is odd, or `split` does not fit the axes and D.
    """
    x = jnp.asarray(x)
    angles = rotary_angles(positions, x.shape[-1], theta=theta, split=split)[:, :, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    turned = first * cos - second * sin, first * sin + second * cos
    together = interleaved and not regroup
    y = jnp.stack(turned, -1).reshape(x.shape) if together else jnp.concatenate(turned, -1)
    return y.astype(x.dtype)


def rotary_angles(
    positions: ArrayLike, size: int, *, theta: float = 10000.0, split: Sequence[int] | None = None
) -> jax.Array:
    """Angles `(B|1, N, size/2)` in float32 of `rotary` for heads of `size` channels."""
    positions = jnp.asarray(positions)
    if positions.ndim not in (1, 2, 3):
        raise ValueError(f"positions must be (N,), (B, N) or (B, N, axes), got shape {positions.shape}")
    if positions.ndim == 1:
        positions = positions[None]
    if positions.ndim == 2:
        positions = positions[..., None]
    split = _pairs(size, positions.shape[-1], split)
    where = positions.astype(jnp.float32)
    return jnp.concatenate([where[..., a, None] * _frequencies(pairs, theta) for a, pairs in enumerate(split)], -1)


def _pairs(size: int, axes: int, split: Sequence[int] | None) -> tuple[int, ...]:
    if size % 2:
        raise ValueError(f"rotary positions turn pairs of channels: the head size must be even, got {size}")
    split = _even_split(size // 2, axes) if split is None else tuple(split)
    if len(split) != axes or sum(split) != size // 2 or min(split) < 0:
        raise ValueError(f"split must give {axes} axes {size // 2} pairs in sum, got {split}")
    return split


def _even_split(total: int, parts: int) -> tuple[int, ...]:
    return tuple(total // parts + (part < total % parts) for part in range(parts))


def _frequencies(pairs: int, theta: float) -> np.ndarray:
    return np.asarray(float(theta) ** -(np.arange(pairs) / max(pairs, 1)), np.float32)


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
    angle = _axis_angles(theta, positions, x.shape[-1], jnp.promote_types(x.dtype, jnp.float32))
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
    wide = jnp.promote_types(x.dtype, jnp.float32)
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


# Tables that are added to tokens


def sincos_table(grid: int | Sequence[int], features: int, *, theta: float = 10000.0) -> jax.Array:
    """Sine-cosine positions (Vaswani et al., 2017, arXiv:1706.03762) of a sequence, an image or a video.

    The channels are divided among the axes as in `rotary`, and each axis has [sin | cos] of position · theta^(-i/p).

    Args:
      grid: length of a sequence, or lengths of the axes.
      features: channels C, even.
      theta: base of the frequencies.

    Returns:
      `(*grid, C)` float32.

    Raises:
      ValueError: if C is odd.
    """
    grid = (grid,) if isinstance(grid, int) else tuple(grid)
    if features % 2:
        raise ValueError(f"features must be even, got {features}")
    parts = []
    for axis, pairs in enumerate(_even_split(features // 2, len(grid))):
        # In float64: angles grow with the length of the axis.
        angles = np.arange(grid[axis])[:, None] * float(theta) ** -(np.arange(pairs) / max(pairs, 1))
        part = np.concatenate([np.sin(angles), np.cos(angles)], -1)
        shape = [1] * len(grid) + [2 * pairs]
        shape[axis] = grid[axis]
        parts.append(np.broadcast_to(part.reshape(shape), (*grid, 2 * pairs)))
    return jnp.asarray(np.concatenate(parts, -1), jnp.float32)


class PositionTable(nnx.Module):
    """A learned vector for each place of a sequence, an image or a video, to be added to the tokens.

    Args:
      grid: lengths of the token axes.
      features: channels C.
      resize: whether tokens of another grid get a table that is interpolated linearly; else they are refused.
      init: initialiser, normal of deviation 0.02 (truncated) unless given.
      param_dtype: of the table.
      rngs: stream `params`.
    """

    def __init__(
        self,
        grid: Sequence[int],
        features: int,
        *,
        resize: bool = False,
        init: nnx.Initializer = trunc_normal,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.resize = resize
        table = init(rngs.params(), (*grid, features), param_dtype)
        self.table = nnx.Param(table, logical_axes=(*[None] * len(grid), "embed"))

    def __call__(self, x: ArrayLike) -> jax.Array:
        """The table for tokens `(B, *S, C)`, `(*S, C)` in their dtype.

        Raises:
          ValueError: for tokens of another grid, unless it is resized.
        """
        x, table = jnp.asarray(x), self.table[...]
        if x.shape[1:-1] != table.shape[:-1]:
            if not self.resize:
                raise ValueError(f"tokens must be (B, {', '.join(map(str, table.shape))}), got {x.shape}")
            table = resize_bilinear(table[None], x.shape[1:-1])[0]
        return table.astype(x.dtype)


class SinePositions(nnx.Module):
    """`sincos_table` of the grid of the tokens, behind zeros for a prefix, to be added to them.

    Args:
      grid: lengths of the token axes.
      prefix: number of class tokens and registers in front, with which the tokens are a sequence.
    """

    def __init__(self, grid: Sequence[int], *, prefix: int = 0):
        self.grid, self.prefix = tuple(grid), prefix

    def __call__(self, x: ArrayLike) -> jax.Array:
        """The table for tokens `(B, *S, C)`, or with a prefix `(B, prefix + N, C)`, in their dtype."""
        x = jnp.asarray(x)
        table = sincos_table(self.grid, x.shape[-1]).astype(x.dtype)
        return jnp.pad(table.reshape(-1, x.shape[-1]), ((self.prefix, 0), (0, 0))) if self.prefix else table


# Biases that are added to scores


def relative_position_index(window: Sequence[int]) -> np.ndarray:
    """Row of the bias table for each pair of tokens of a window (Liu et al., 2021, arXiv:2103.14030).

    Args:
      window: lengths (w_1, ..., w_A) of the axes.

    Returns:
      `(P, P)` int32 [query, key]: the offsets query - key + w - 1 per axis, in row-major order over the (2 w - 1) each.
    """
    coordinates = grid_positions(window)[0]
    offsets = coordinates[:, None] - coordinates[None] + np.asarray(window) - 1
    index = np.zeros(offsets.shape[:2], np.int64)
    for axis, length in enumerate(window):
        index = index * (2 * length - 1) + offsets[..., axis]
    return index.astype(np.int32)


class RelativePositionBias(nnx.Module):
    """Learned bias per head and offset between two tokens of a window: `(H, P, P)` float32.

    Args:
      window: lengths of the window's axes.
      num_heads: heads H.
      param_dtype: of the table, `(prod(2 w - 1), H)`.
      rngs: stream `params`.
    """

    def __init__(self, window: Sequence[int], num_heads: int, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.window = tuple(window)
        rows = math.prod(2 * length - 1 for length in self.window)
        table = trunc_normal(rngs.params(), (rows, num_heads), param_dtype)
        self.table = nnx.Param(table, logical_axes=(None, "heads"))

    def __call__(self) -> jax.Array:
        table = self.table[...]
        table = table.astype(jnp.promote_types(table.dtype, jnp.float32))
        return jnp.moveaxis(table[relative_position_index(self.window)], -1, 0)


def t5_bucket(
    offset: ArrayLike, *, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> jax.Array:
    """Bucket of an offset key - query (Raffel et al., 2020, arXiv:1910.10683).

    Half of the buckets hold one distance each, the others grow logarithmically up to `max_distance`; beyond it all
    share the last. Bidirectional, the upper half is for keys after the query; else those are in bucket 0.

    Args:
      offset: integers of any shape.
      num_buckets: number of buckets.
      max_distance: distance from which on the last bucket is taken.
      bidirectional: whether keys after the query are told apart.

    Returns:
      int32 in the shape of `offset`.
    """
    offset = jnp.asarray(offset, jnp.int32)
    first = jnp.zeros_like(offset)
    if bidirectional:
        num_buckets //= 2
        first = jnp.where(offset > 0, num_buckets, 0)
        distance = jnp.abs(offset)
    else:
        distance = jnp.maximum(-offset, 0)
    exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = jnp.minimum(exact + (ratio * (num_buckets - exact)).astype(jnp.int32), num_buckets - 1)
    return (first + jnp.where(distance < exact, distance, far)).astype(jnp.int32)


class BucketedBias(nnx.Module):
    """T5's learned bias per head and bucket of offset: `(H, N, M)` float32. Arguments as `t5_bucket`."""

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        table = trunc_normal(rngs.params(), (num_buckets, num_heads), param_dtype)
        self.table = nnx.Param(table, logical_axes=(None, "heads"))

    def __call__(self, query_positions: ArrayLike, key_positions: ArrayLike) -> jax.Array:
        """Positions `(N,)` and `(M,)`."""
        offset = jnp.asarray(key_positions)[None] - jnp.asarray(query_positions)[:, None]
        bucket = t5_bucket(
            offset,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
            bidirectional=self.bidirectional,
        )
        table = self.table[...]
        table = table.astype(jnp.promote_types(table.dtype, jnp.float32))
        return jnp.moveaxis(table[bucket], -1, 0)


def alibi_slopes(num_heads: int) -> jax.Array:
    """Slopes `(H,)` float32 of ALiBi (Press et al., 2022, arXiv:2108.12409), also the decays of lightning attention.

    2^(-8 (h+1) / H) for a power of two H; otherwise those of the largest power of two P < H, and then the first H - P
    of every other slope of 2P heads.

    Raises:
      ValueError: if `num_heads` is less than 1.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    power = 2 ** (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    slopes += [2.0 ** (-8 * (head + 1) / (2 * power)) for head in range(0, 2 * power, 2)][: num_heads - power]
    return jnp.asarray(slopes, jnp.float32)


def alibi_bias(slopes: ArrayLike, query_positions: ArrayLike, key_positions: ArrayLike) -> jax.Array:
    """-slope · |query - key|, float32.

    Args:
      slopes: `(H,)`.
      query_positions: `(N,)`, or `(B, N)`.
      key_positions: `(M,)`, or `(B, M)`.

    Returns:
      `(1, H, N, M)`, or `(B, H, N, M)`.
    """
    query_positions, key_positions = (jnp.atleast_2d(p) for p in (query_positions, key_positions))
    distance = jnp.abs(query_positions[:, None, :, None] - key_positions[:, None, None, :])
    return -jnp.asarray(slopes, jnp.float32)[:, None, None] * distance.astype(jnp.float32)
