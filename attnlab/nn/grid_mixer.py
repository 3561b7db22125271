"""A token mixer of images around a core that attends inside windows, or in the image as a whole.

Mechanisms differ in their core and in what their projections hand to it. The call, windows, class tokens in front,
points and the recorded map are here, once.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.contract import Given, Layout, TokenMixer, UnsupportedArgument, View, record
from attnlab.nn.dense_mixer import Core, Heads
from attnlab.nn.grids import to_tokens
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.windows import ShiftedWindows, Windows
from attnlab.points import visit


class GridMixer(TokenMixer):
    """Base of mixers of images. A subclass sets `core` at the end of its constructor.

    Args:
      features: channels C.
      num_heads: heads H.
      grid: rows and columns of the image; needed without a window.
      window: rows and columns of the windows that are attended separately, one number for both; the grid when None.
      shift: by how much the windows are shifted, cyclically.
      padded: whether images that the windows do not tile are padded with zeros at the end of their axes. These tokens
        are attended to like others (with the biases as keys and values), and the points `qkv` and `heads` have them.
      prefix: tokens in front of the image's, which have no place on its grid: the mixer takes sequences
        `(B, prefix + N, C)` then.
      qkv_bias: whether queries, keys and values have a bias.
      projection_dropout: rate on the result.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if heads do not divide the channels, windows do not tile the grid, or there is neither.
      UnsupportedArgument: for windows with a prefix.
    """

    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE
    points = frozenset({"qkv", "heads"})
    core: Core
    windows: Windows

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        grid: tuple[int, int] | None = None,
        window: int | tuple[int, int] | None = None,
        shift: int | tuple[int, int] = 0,
        padded: bool = False,
        prefix: int = 0,
        qkv_bias: bool = True,
        projection_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
        if grid is None and (prefix or window is None):
            raise ValueError(f"{name} needs the grid (rows, columns) of its tokens")
        if prefix and window is not None:
            raise UnsupportedArgument(f"{name} has no windows with tokens in front, got {prefix=} and {window=}")
        if window is None and (shift != 0 or padded):
            raise ValueError(f"{name} shifts and pads windows only, got {shift=} and {padded=} without a window")
        self.features, self.num_heads, self.prefix, self.dtype = features, num_heads, prefix, dtype
        self.layout = Layout.SEQUENCE if prefix else Layout.IMAGE
        self.windows = ShiftedWindows(grid if window is None else window, shift)
        self.padded = padded
        if grid is not None and not padded:
            self.windows.check(grid)
        # In windows the mixer takes any image that they tile.
        self.grid = tuple(grid) if window is None else None
        size = features // num_heads
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query, self.key, self.value = (
            ToHeads(features, num_heads, size, use_bias=qkv_bias, **common) for _ in range(3)
        )
        self.out = FromHeads(num_heads, size, features, **common)
        self.dropout = nnx.Dropout(projection_dropout, rngs=rngs) if projection_dropout > 0 else nnx.data(None)

    def project(self, x: jax.Array, grid: tuple[int, int]) -> Heads:
        """Heads of the tokens `(B, N, C)`; `extra` as the core needs it, inside windows."""
        return Heads(self.query(x), self.key(x), self.value(x))

    def windows_on(self, grid: tuple[int, int]) -> Windows:
        """The windows of an image of that grid, padded or not."""
        return self.windows

    def padding(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        """How many zeros a padded mixer puts before and behind each axis of an image, so that windows tile it."""
        return [(0, -length % side) for length, side in zip(grid, self.windows.size, strict=True)]

    def view(self, grid: tuple[int, int], batch: int, real: np.ndarray | None = None) -> View:
        """Who sees whom inside the windows of all `batch` images; `real` `(*grid,)` is False at padding."""
        return View()

    def inside(self, heads: Heads, view: View, *, deterministic: bool = True) -> jax.Array:
        """`(B·W, n, H, E)` from heads inside windows."""
        return self.core(heads, view, deterministic=deterministic)[0]

    def attention(self, heads: Heads, grid: tuple[int, int], real: np.ndarray | None = None) -> jax.Array:
        """The map `(B, H, N, N)` of the image, zero between windows."""
        view, windows = self.view(grid, heads.q.shape[0], real), self.windows_on(grid)
        return windows.scatter_map(self.core.attention(windows.heads(heads, grid), view), grid)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        whole = x.shape[1:-1]
        widths = self.padding(whole) if self.padded else []
        if not any(sum(pair) for pair in widths):
            return self._mix(x, None, given)
        real = np.pad(np.ones(whole, bool), widths)
        y = self._mix(jnp.pad(x, [(0, 0), *widths, (0, 0)]), real, given)
        rows, columns = (slice(front, front + n) for (front, _), n in zip(widths, whole, strict=True))
        return y[:, rows, columns]

    def _mix(self, x: jax.Array, real: np.ndarray | None, given: Given) -> jax.Array:
        grid = self._grid(x)
        heads = visit(self, given.edits, "qkv", self.project(to_tokens(x), grid))

        def seen() -> jax.Array:
            weights = self.attention(heads, grid, real)
            return weights if real is None else weights[:, :, real.ravel()][..., real.ravel()]

        record(self, "attention", seen)
        view, windows = self.view(grid, x.shape[0], real), self.windows_on(grid)
        y = self.inside(windows.heads(heads, grid), view, deterministic=given.deterministic)
        y = self.out(visit(self, given.edits, "heads", windows.merge(y, grid))).reshape(x.shape)
        return y if self.dropout is None else self.dropout(y, deterministic=given.deterministic)

    def _grid(self, x: jax.Array) -> tuple[int, int]:
        if self.grid is None:
            return x.shape[1:3]
        expected = (self.prefix + math.prod(self.grid),) if self.prefix else self.grid
        if x.shape[1:-1] != expected:
            raise ValueError(f"{type(self).__name__} was built for tokens {expected}, got x of shape {x.shape}")
        return self.grid
