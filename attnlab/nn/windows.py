"""Groups of an image's tokens that are attended separately: windows side by side, or tokens at a distance.

Windows may be shifted cyclically in every other layer (Swin, arXiv:2103.14030).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.nn.dense_mixer import Heads
from attnlab.nn.grids import shift_mask, window_merge, window_partition


class Windows:
    """Base of tilings of images: into which groups of tokens, all of one size.

    Attributes:
      size: rows and columns of a group.
    """

    size: tuple[int, int]

    def check(self, grid: tuple[int, int]) -> None:
        """Raises `ValueError` if the groups do not tile the grid."""
        raise NotImplementedError

    def partition(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Tokens of the grid `(B, N, *C)` to those of groups `(B·W, n, *C)`, tokens in row-major order."""
        raise NotImplementedError

    def merge(self, y: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """The inverse of `partition`."""
        raise NotImplementedError

    def heads(self, heads: Heads, grid: tuple[int, int]) -> Heads:
        """Queries, keys and values inside groups; `extra` as it is."""
        return Heads(*(self.partition(part, grid) for part in heads[:3]), heads.extra)

    def scatter_map(self, weights: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Attention maps of groups `(B·W, H, n, n)` as maps of the whole image `(B, H, N, N)`, zero elsewhere."""
        if self._is_whole(grid):
            return weights
        tokens = math.prod(grid)
        with jax.ensure_compile_time_eval():
            place = np.asarray(self.partition(jnp.arange(tokens).reshape(1, tokens, 1), grid))[..., 0]
        count, inside = place.shape
        weights = jnp.moveaxis(weights.reshape(-1, count, weights.shape[1], inside, inside), 2, 1)
        whole = jnp.zeros((*weights.shape[:2], tokens, tokens), weights.dtype)
        return whole.at[:, :, place[:, :, None], place[:, None]].set(weights)

    def _is_whole(self, grid: tuple[int, int]) -> bool:
        return self.size == tuple(grid)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int | np.integer) else tuple(value)


@dataclasses.dataclass(frozen=True)
class ShiftedWindows(Windows):
    """A tiling of images by windows, after a cyclic shift to the upper left.

    Attributes:
      size: rows and columns of a window, or one number for both.
      shift: rows and columns of the shift, or one number for both, at least 0 and less than the size.

    Raises:
      ValueError: if a size is less than 1, or a shift is not within the window.
    """

    size: tuple[int, int]
    shift: tuple[int, int] = (0, 0)

    def __post_init__(self):
        for name in ("size", "shift"):
            object.__setattr__(self, name, _pair(getattr(self, name)))
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"window must be one or two numbers of at least 1, got {self.size}")
        if len(self.shift) != 2 or not all(0 <= s < w for s, w in zip(self.shift, self.size, strict=True)):
            raise ValueError(f"shift must be at least 0 and less than the window {self.size}, got {self.shift}")

    def check(self, grid: tuple[int, int]) -> None:
        """Raises `ValueError` if the windows do not tile the grid."""
        if any(length % w for length, w in zip(grid, self.size, strict=True)):
            raise ValueError(f"windows of {self.size} do not tile a grid of {tuple(grid)}")

    def partition(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Tokens of the grid `(B, N, *C)` to those of windows `(B·W, n, *C)`, windows and tokens in row-major order.

        One window that covers the grid leaves the tokens as they are, with class tokens in front too.
        """
        if self._is_whole(grid):
            return x
        self.check(grid)
        image = x.reshape(x.shape[0], *grid, -1)
        return window_partition(image, self.size, shift=self.shift).reshape(-1, math.prod(self.size), *x.shape[2:])

    def merge(self, y: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """The inverse of `partition`."""
        if self._is_whole(grid):
            return y
        count, inside = math.prod(grid) // math.prod(self.size), math.prod(self.size)
        image = window_merge(y.reshape(-1, count, inside, math.prod(y.shape[2:])), self.size, grid, shift=self.shift)
        return image.reshape(image.shape[0], -1, *y.shape[2:])

    def same_region(self, grid: tuple[int, int]) -> np.ndarray | None:
        """Which tokens of a window were neighbours before the shift: booleans `(W, n, n)`, None without a shift."""
        return shift_mask(grid, self.size, self.shift) if any(self.shift) else None

    def _is_whole(self, grid: tuple[int, int]) -> bool:
        return self.size == tuple(grid) and not any(self.shift)


@dataclasses.dataclass(frozen=True)
class DilatedWindows(Windows):
    """Groups of tokens at a distance: every `interval`-th of a tile of `size · interval` tokens is of one group.

    Token (a, b) of group (u, v) of a tile is at (a · interval + u, b · interval + v); groups are in row-major order,
    tile by tile.

    Attributes:
      size: rows and columns of a group, or one number for both.
      interval: between its neighbours along each axis, or one number for both; so much that one tile is the image when
        None.

    Raises:
      ValueError: if a size or an interval is less than 1.
    """

    size: tuple[int, int]
    interval: tuple[int, int] | None = None

    def __post_init__(self):
        for name in ("size", "interval"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _pair(value))
        if min(*self.size, *(self.interval or ())) < 1:
            raise ValueError(f"size and interval must be at least 1, got {self.size} and {self.interval}")

    def check(self, grid: tuple[int, int]) -> None:
        """Raises `ValueError` if the tiles do not tile the grid."""
        self._steps(grid)

    def partition(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        (tiles, steps), batch = self._steps(grid), x.shape[0]
        inner = [n for row in zip(tiles, self.size, steps, strict=True) for n in row]
        y = x.reshape(batch, *inner, -1).transpose(0, 1, 4, 3, 6, 2, 5, 7)
        return y.reshape(-1, math.prod(self.size), *x.shape[2:])

    def merge(self, y: jax.Array, grid: tuple[int, int]) -> jax.Array:
        tiles, steps = self._steps(grid)
        x = y.reshape(-1, *tiles, *steps, *self.size, math.prod(y.shape[2:])).transpose(0, 1, 5, 3, 2, 6, 4, 7)
        return x.reshape(-1, math.prod(grid), *y.shape[2:])

    def _steps(self, grid: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tiles along each axis, and the interval there."""
        steps = self.interval
        if steps is None:
            steps = tuple(max(length // side, 1) for length, side in zip(grid, self.size, strict=True))
        spans = [side * step for side, step in zip(self.size, steps, strict=True)]
        if any(length % span for length, span in zip(grid, spans, strict=True)):
            raise ValueError(f"groups of {self.size} at intervals of {steps} do not tile a grid of {tuple(grid)}")
        return tuple(length // span for length, span in zip(grid, spans, strict=True)), steps
