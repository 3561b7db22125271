"""Windows of images that are attended separately, shifted cyclically in every other layer (Swin, arXiv:2103.14030)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.nn.grids import shift_mask, window_merge, window_partition


@dataclasses.dataclass(frozen=True)
class ShiftedWindows:
    """A tiling of images `(B, Hh, Ww, C)` by windows, after a cyclic shift to the upper left.

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
            object.__setattr__(self, name, (value, value) if isinstance(value, int) else tuple(value))
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"window must be one or two numbers of at least 1, got {self.size}")
        if len(self.shift) != 2 or not all(0 <= s < w for s, w in zip(self.shift, self.size, strict=True)):
            raise ValueError(f"shift must be at least 0 and less than the window {self.size}, got {self.shift}")

    def check(self, grid: tuple[int, int]) -> None:
        """Raises `ValueError` if the windows do not tile the grid."""
        if any(length % w for length, w in zip(grid, self.size, strict=True)):
            raise ValueError(f"windows of {self.size} do not tile a grid of {tuple(grid)}")

    def partition(self, x: jax.Array) -> jax.Array:
        """`(B, Hh, Ww, C)` to windows `(B·W, h, w, C)`, the windows of an example in row-major order."""
        self.check(x.shape[1:3])
        return window_partition(x, self.size, shift=self.shift).reshape(-1, *self.size, x.shape[-1])

    def merge(self, y: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Windows `(B·W, h, w, C)` back to `(B, *grid, C)`: the inverse of `partition`."""
        tokens = self.size[0] * self.size[1]
        windows = y.reshape(-1, grid[0] * grid[1] // tokens, tokens, y.shape[-1])
        return window_merge(windows, self.size, grid, shift=self.shift)

    def same_region(self, grid: tuple[int, int]) -> np.ndarray | None:
        """Which tokens of a window were neighbours before the shift: booleans `(W, n, n)`, None without a shift."""
        return shift_mask(grid, self.size, self.shift) if any(self.shift) else None

    def scatter_map(self, weights: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Attention maps of windows `(B·W, H, n, n)` as maps of the whole image `(B, H, N, N)`, zero elsewhere."""
        tokens = grid[0] * grid[1]
        with jax.ensure_compile_time_eval():
            place = np.asarray(window_partition(np.arange(tokens).reshape(1, *grid, 1), self.size, shift=self.shift))
        place = place[0, ..., 0]
        count, inside = place.shape
        weights = jnp.moveaxis(weights.reshape(-1, count, weights.shape[1], inside, inside), 2, 1)
        whole = jnp.zeros((*weights.shape[:2], tokens, tokens), weights.dtype)
        return whole.at[:, :, place[:, :, None], place[:, None]].set(weights)


def spread_map(weights: jax.Array, key_grid: tuple[int, int], reduction: int) -> jax.Array:
    """Weights on reduced keys `(B, H, N, M)` as weights on tokens `(B, H, N, M·r²)`, even over each r x r patch."""
    if reduction == 1:
        return weights
    patches = weights.reshape(*weights.shape[:3], *key_grid) / reduction**2
    patches = jnp.repeat(jnp.repeat(patches, reduction, 3), reduction, 4)
    return patches.reshape(*weights.shape[:3], -1)
