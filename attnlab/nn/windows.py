"""Windows of images that are attended separately, shifted cyclically in every other layer (Swin, arXiv:2103.14030)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.nn.dense_mixer import Heads
from attnlab.nn.grids import shift_mask, window_merge, window_partition


@dataclasses.dataclass(frozen=True)
class ShiftedWindows:
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
            value = getattr(self, name)
            object.__setattr__(self, name, (value, value) if isinstance(value, int | np.integer) else tuple(value))
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

    def heads(self, heads: Heads, grid: tuple[int, int]) -> Heads:
        """Queries, keys and values inside windows; `extra` as it is."""
        return Heads(*(self.partition(part, grid) for part in heads[:3]), heads.extra)

    def same_region(self, grid: tuple[int, int]) -> np.ndarray | None:
        """Which tokens of a window were neighbours before the shift: booleans `(W, n, n)`, None without a shift."""
        return shift_mask(grid, self.size, self.shift) if any(self.shift) else None

    def scatter_map(self, weights: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Attention maps of windows `(B·W, H, n, n)` as maps of the whole image `(B, H, N, N)`, zero elsewhere."""
        if self._is_whole(grid):
            return weights
        tokens = math.prod(grid)
        with jax.ensure_compile_time_eval():
            place = np.asarray(window_partition(np.arange(tokens).reshape(1, *grid, 1), self.size, shift=self.shift))
        place = place[0, ..., 0]
        count, inside = place.shape
        weights = jnp.moveaxis(weights.reshape(-1, count, weights.shape[1], inside, inside), 2, 1)
        whole = jnp.zeros((*weights.shape[:2], tokens, tokens), weights.dtype)
        return whole.at[:, :, place[:, :, None], place[:, None]].set(weights)

    def _is_whole(self, grid: tuple[int, int]) -> bool:
        return self.size == tuple(grid) and not any(self.shift)
