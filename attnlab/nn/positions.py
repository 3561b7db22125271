"""Where tokens are, as tables that are added to them: sine-cosine and learned.

Positions are integers (or reals), `(N,)` or `(B, N)` along one axis, `(B|1, N, A)` along A axes; `grid_positions` lists
those of an image or a video. Rotary positions are in `attnlab.nn.rotary`, biases of scores in `position_bias`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.linear import trunc_normal
from attnlab.nn.resampling import RESIZES


def grid_positions(grid: Sequence[int]) -> np.ndarray:
    """Coordinates `(1, N, A)` int32 of the tokens of a grid with A axes, in row-major order."""
    axes = np.meshgrid(*(np.arange(length, dtype=np.int32) for length in grid), indexing="ij")
    return np.stack(axes, -1).reshape(1, -1, len(grid))


def euclidean_buckets(grid: Sequence[int], ratio: float) -> np.ndarray:
    """Buckets of the distances between tokens of an image, finer near than far (iRPE, arXiv:2107.14222).

        r = round √(dy² + dx²);     α = ratio,  β = 2 ratio,  γ = 8 ratio
        b = r  up to α,     ⌊min(round(α + (β - α) ln(r/α) / ln(γ/α)), β)⌋  beyond

    Halves are rounded to even. The bucket of a distance is b + ⌊β⌋, so that of 2 ⌊β⌋ + 1 the lower half is not used.

    Args:
      grid: rows and columns.
      ratio: α, above 0.

    Returns:
      `(N, N)` int32, tokens in row-major order.

    Raises:
      ValueError: for a ratio that is not positive, or a grid of another number of axes.
    """
    if len(grid) != 2 or ratio <= 0:
        raise ValueError(f"grid must be (rows, columns) and ratio positive, got {tuple(grid)} and {ratio}")
    places = grid_positions(grid)[0]
    apart = np.square(places[:, None] - places[None]).sum(-1)
    distance = np.round(np.sqrt(apart.astype(np.float32)))
    alpha, beta, gamma = ratio, 2 * ratio, 8 * ratio
    far = np.log(np.maximum(distance, alpha).astype(np.float32) / np.float32(alpha)) / math.log(gamma / alpha)
    far = np.minimum(np.round(alpha + far * (beta - alpha)), beta)
    return (np.where(distance <= alpha, distance, far).astype(np.int32) + int(beta)).astype(np.int32)


def even_split(total: int, parts: int) -> tuple[int, ...]:
    """`total` things among `parts`, as evenly as can be; the first take the remainder."""
    return tuple(total // parts + (part < total % parts) for part in range(parts))


def sincos_table(
    grid: int | Sequence[int], features: int, *, theta: float = 10000.0, interleaved: bool = False
) -> jax.Array:
    """Sine-cosine positions (Vaswani et al., 2017, arXiv:1706.03762) of a sequence, an image or a video.

    The channels are divided among the axes as in `rotary`, and each axis has [sin | cos] of position · theta^(-i/p).

    Args:
      grid: length of a sequence, or lengths of the axes.
      features: channels C, even.
      theta: base of the frequencies.
      interleaved: whether sine and cosine alternate in the channels of an axis, as in the paper.

    Returns:
      `(*grid, C)` float32.

    Raises:
      ValueError: if C is odd.
    """
    grid = (grid,) if isinstance(grid, int | np.integer) else tuple(grid)
    if features % 2:
        raise ValueError(f"features must be even, got {features}")
    parts = []
    for axis, pairs in enumerate(even_split(features // 2, len(grid))):
        # In float64: angles grow with the length of the axis.
        angles = np.arange(grid[axis])[:, None] * float(theta) ** -(np.arange(pairs) / max(pairs, 1))
        part = _sin_and_cos(np, angles, interleaved)
        shape = [1] * len(grid) + [2 * pairs]
        shape[axis] = grid[axis]
        parts.append(np.broadcast_to(part.reshape(shape), (*grid, 2 * pairs)))
    return jnp.asarray(np.concatenate(parts, -1), jnp.float32)


def sine_positions(
    positions: ArrayLike, features: int, *, theta: float = 10000.0, interleaved: bool = True
) -> jax.Array:
    """Sines and cosines of real positions along A axes, each with a block of channels of its own.

    A block has c = 2 ⌈C / 2A⌉ channels: sine and cosine of position · theta^(-2i/c), for i below c/2. What exceeds C
    is cut off at the end.

    Args:
      positions: `(…, A)`, in any unit.
      features: channels C.
      theta: base of the frequencies.
      interleaved: whether sine and cosine alternate; else all sines of an axis come first.

    Returns:
      `(…, C)` float32.
    """
    positions = jnp.asarray(positions, jnp.float32)
    pairs = -(-features // (2 * positions.shape[-1]))
    frequencies = np.asarray(float(theta) ** -(np.arange(pairs) / pairs), np.float32)
    blocks = _sin_and_cos(jnp, positions[..., None] * frequencies, interleaved)
    return blocks.reshape(*positions.shape[:-1], -1)[..., :features]


def masked_grid_positions(
    real: ArrayLike, features: int, *, theta: float = 10000.0, extent: float = 2 * math.pi, eps: float = 1e-6
) -> jax.Array:
    """Sine positions of images with padding (DETR, Carion et al., 2020, arXiv:2005.12872).

    A token's coordinate along an axis is the number of real tokens up to it, itself included, over that of all in its
    row or column, times `extent`: the real part of every image spans the same range.

    Args:
      real: `(B, *S)` boolean, False at padding.
      features: channels C, a multiple of twice the number of axes.
      theta: base of the frequencies.
      extent: coordinate of the last token.
      eps: added to the number of tokens that divides.

    Returns:
      `(B, *S, C)` float32: a block of alternating sines and cosines for each axis, first axis first.

    Raises:
      ValueError: if C is no such multiple.
    """
    real = jnp.asarray(real)
    axes = real.ndim - 1
    if features % (2 * axes):
        raise ValueError(f"features must be a multiple of {2 * axes} for {axes} axes, got {features}")
    counts = [jnp.cumsum(real, axis, dtype=jnp.float32) for axis in range(1, axes + 1)]
    where = [
        count / (jax.lax.index_in_dim(count, -1, axis) + eps) * extent for axis, count in enumerate(counts, start=1)
    ]
    return sine_positions(jnp.stack(where, -1), features, theta=theta)


def _sin_and_cos(xp: Any, angles: Any, interleaved: bool) -> Any:
    """Sines and cosines `(…, 2p)` of angles `(…, p)`, alternating or sines first; `xp` is NumPy or its twin in JAX."""
    both = xp.stack([xp.sin(angles), xp.cos(angles)], -1 if interleaved else -2)
    return both.reshape(*angles.shape[:-1], 2 * angles.shape[-1])


class PositionTable(nnx.Module):
    """A learned vector for each place of a sequence, an image or a video, to be added to the tokens.

    Args:
      grid: lengths of the token axes.
      features: channels C.
      prefix: class tokens in front of the grid's, which have vectors of their own; the tokens are then a sequence, and
        so is the table, `(prefix + N, C)`.
      unplaced: further tokens of the prefix, behind those, that have none.
      resize: `"bilinear"` or `"bicubic"`, how tokens of another grid get a table; None refuses them.
      init: initialiser, normal of deviation 0.02 (truncated) unless given.
      param_dtype: of the table.
      rngs: stream `params`.
    """

    def __init__(
        self,
        grid: Sequence[int],
        features: int,
        *,
        prefix: int = 0,
        unplaced: int = 0,
        resize: str | None = None,
        init: nnx.Initializer = trunc_normal,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.grid, self.placed, self.prefix = tuple(grid), prefix, prefix + unplaced
        self.resize = _known_resize(resize)
        shape = (prefix + math.prod(grid),) if self.prefix else self.grid
        table = init(rngs.params(), (*shape, features), param_dtype)
        self.table = nnx.Param(table, logical_axes=(*[None] * len(shape), "embed"), weight_decay=False)

    def __call__(self, x: ArrayLike, grid: Sequence[int] | None = None) -> jax.Array:
        """The table for tokens `(B, *S, C)`, `(*S, C)` in their dtype.

        Behind a prefix the tokens are a sequence: `grid` is then that of those behind it, the table's own when None.

        Raises:
          ValueError: for tokens of another grid, unless it is resized.
        """
        x = jnp.asarray(x)
        front, table = self.table[: self.placed], self.table[self.placed :] if self.prefix else self.table[...]
        table = _fitted(table.reshape(*self.grid, -1), x, self.prefix, grid, self.resize)
        if not self.prefix:
            return table.astype(x.dtype)
        unplaced = jnp.zeros((self.prefix - self.placed, x.shape[-1]), table.dtype)
        return jnp.concatenate([front, unplaced, table.reshape(-1, x.shape[-1])]).astype(x.dtype)


class SinePositions(nnx.Module):
    """`sincos_table` of the grid of the tokens, behind zeros for a prefix, to be added to them.

    Args:
      grid: lengths of the token axes.
      prefix: number of class tokens and registers in front, with which the tokens are a sequence.
      resize: `"bilinear"` or `"bicubic"`, how tokens of another grid get a table; None refuses them.
    """

    def __init__(self, grid: Sequence[int], *, prefix: int = 0, resize: str | None = None):
        self.grid, self.prefix, self.resize = tuple(grid), prefix, _known_resize(resize)

    def __call__(self, x: ArrayLike, grid: Sequence[int] | None = None) -> jax.Array:
        """The table for tokens `(B, *S, C)`, or with a prefix `(B, prefix + N, C)`; arguments as `PositionTable`."""
        x = jnp.asarray(x)
        table = _fitted(sincos_table(self.grid, x.shape[-1]), x, self.prefix, grid, self.resize).astype(x.dtype)
        return jnp.pad(table.reshape(-1, x.shape[-1]), ((self.prefix, 0), (0, 0))) if self.prefix else table


def _known_resize(resize: str | None) -> str | None:
    if resize is not None and resize not in RESIZES:
        raise ValueError(f"resize must be one of {', '.join(RESIZES)} or None, got {resize!r}")
    return resize


def _fitted(table: jax.Array, x: jax.Array, prefix: int, grid: Sequence[int] | None, resize: str | None) -> jax.Array:
    """A table `(*S, C)` for the grid of tokens `x`, which is `grid` if they are a sequence behind a prefix."""
    own = table.shape[:-1]
    wanted = x.shape[1:-1] if not prefix else own if grid is None else tuple(grid)
    if prefix and x.shape[1:-1] != (prefix + math.prod(wanted),):
        raise ValueError(f"tokens must be (B, {prefix + math.prod(wanted)}, {table.shape[-1]}), got {x.shape}")
    if wanted == own:
        return table
    if resize is None:
        raise ValueError(f"tokens must be (B, {', '.join(map(str, table.shape))}), got {x.shape}")
    return RESIZES[resize](table[None], wanted)[0]
