"""Orders in which the tokens of a grid are read as a sequence, and back.

An order is an array `(N,)` of flat row-major places: entry t is the token that is read at step t. `scan_order` makes
it, once for each grid; `permute` brings tokens into it, `inverse_order` gives the way back:

    order = scan_order("spiral", (14, 14))
    y = permute(recurrence(permute(x, order)), inverse_order(order))

Scans of images go through a grid by several routes: `scan_routes` gives an order, a second one that is its mirror
image, and both backwards, side by side.

- `raster`: row by row; any number of axes, the last the fastest.
- `snake`: as raster, every other row (plane, …) backwards, so that neighbours in time are neighbours on the grid.
- `diagonal`: by anti-diagonals i + j, each from its upper right end; `zigzag`: every other one from its lower left end.
- `spiral`: clockwise from the corner inwards.
- `hilbert`: the Hilbert curve of the least square whose side is a power of two, without what is outside of the grid.
- `gilbert`: the generalised Hilbert curve of rectangles and boxes (J. Červený's), without jumps where that can be.
- `window`: windows in raster order, raster inside each; those at the ends may be smaller.
- `dilated`: the sub-grids of every s-th token along each axis one after another, each in raster order.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnlab.nn.grids import Lengths, lengths
from attnlab.suggest import suggestion

Grid = tuple[int, ...]
Place = tuple[int, ...]


def scan_order(
    name: str,
    grid: Sequence[int],
    *,
    transpose: bool = False,
    mirror: int | None = None,
    reverse: bool = False,
    size: Lengths | None = None,
) -> np.ndarray:
    """An order of the tokens of a grid.

    Args:
      name: one of those in the module docstring.
      grid: lengths of the axes, two for the curves (two or three for `gilbert`), any number for the others.
      transpose: the order of the grid with its axes reversed: by columns, that is, where it is else by rows.
      mirror: axis along which the places are mirrored, of the grid itself.
      reverse: from the last to the first.
      size: sides of a window, or the steps of `dilated`.

    Returns:
      `(N,)` int32, read-only.

    Raises:
      ValueError: for another name, a grid that the order does not have, or a size where there is none or the reverse.
    """
    if name not in _ORDERS:
        raise ValueError(f"no scan is called {name!r}: {suggestion(name, _ORDERS)}")
    grid = tuple(int(length) for length in grid)
    if not grid or min(grid) < 1:
        raise ValueError(f"grid must have axes of at least 1, got {grid}")
    if (size is not None) != (name in _SIZED):
        raise ValueError(f"size is needed for {' and '.join(_SIZED)}, and for no other order; got {size} for {name}")
    if mirror is not None and not 0 <= mirror < len(grid):
        raise ValueError(f"mirror must be an axis of the grid, 0..{len(grid) - 1}, got {mirror}")
    return _order(name, grid, transpose, mirror, reverse, None if size is None else lengths(size, len(grid)))


def scan_routes(
    name: str,
    grid: Sequence[int],
    *,
    second: bool = True,
    reverse: bool = True,
    paired: bool = False,
    size: Lengths | None = None,
) -> np.ndarray:
    """The routes of a scan along an order: itself, a second one across it, and both from the last token to the first.

    The second is the transposed order, of columns where the first is of rows; that of diagonals is mirrored left to
    right, and that of a spiral upside down.

    Args:
      name: as `scan_order`.
      grid: as `scan_order`.
      second: whether there is a second order; a sequence has none.
      reverse: whether there are those backwards.
      paired: whether each is followed by its reverse, [r0, r0 backwards, r1, r1 backwards], as in MHS-VM; otherwise
        both come first, [r0, r1, r0 backwards, r1 backwards], as in VMamba.
      size: as `scan_order`.

    Returns:
      `(K, N)` int32, K of 1, 2 or 4.

    Raises:
      ValueError: as `scan_order`, and for a second order of a sequence.
    """
    if second and len(grid) < 2:
        raise ValueError(f"a sequence has no second order, got second=True for the grid {tuple(grid)}")
    first = scan_order(name, grid, size=size)
    others = {"mirror": _MIRRORED[name]} if name in _MIRRORED else {"transpose": True}
    orders = [first, scan_order(name, grid, size=size, **others)] if second else [first]
    if not reverse:
        return np.stack(orders)
    backwards = [order[::-1] for order in orders]
    if paired:
        return np.stack([each for pair in zip(orders, backwards, strict=True) for each in pair])
    return np.stack(orders + backwards)


def read_routes(x: ArrayLike, routes: np.ndarray) -> jax.Array:
    """Tokens `(B, N, K, C)`, or `(B, N, C)` for all routes, in the orders `(K, N)` of the routes: `(B, N, K, C)`."""
    x, routes = jnp.asarray(x), np.asarray(routes)
    if x.ndim == 3:
        return x[:, jnp.asarray(routes.T)]
    return x[:, jnp.asarray(routes.T), jnp.arange(len(routes))]


def write_routes(x: ArrayLike, routes: np.ndarray) -> jax.Array:
    """Undoes `read_routes`: `(B, N, K, C)` in the orders of the routes to the order of the grid."""
    inverse = np.stack([inverse_order(order) for order in np.asarray(routes)])
    return read_routes(x, inverse)


def scan_segments(name: str, grid: Sequence[int], size: Lengths) -> np.ndarray:
    """Which window or sub-grid each step of the order belongs to, `(N,)` int32 from 0: segments for a recurrence."""
    grid, size = tuple(grid), lengths(size, len(grid))
    order = scan_order(name, grid, size=size)
    places, sides = np.unravel_index(order, grid), range(len(grid))
    labels = np.stack([places[a] // size[a] if name == "window" else places[a] % size[a] for a in sides], -1)
    changes = np.any(labels[1:] != labels[:-1], axis=1)
    return np.concatenate([[0], np.cumsum(changes)]).astype(np.int32)


def inverse_order(order: np.ndarray) -> np.ndarray:
    """The order that undoes another: `(N,)` int32, the step at which each token is read."""
    inverse = np.empty(len(order), np.int32)
    inverse[order] = np.arange(len(order), dtype=np.int32)
    return inverse


def permute(x: ArrayLike, order: np.ndarray, *, axis: int = 1) -> jax.Array:
    """Tokens along `axis` in an order of them all.

    Raises:
      ValueError: if there are not as many tokens as entries of the order.
    """
    x = jnp.asarray(x)
    if x.shape[axis] != len(order):
        raise ValueError(f"the order is of {len(order)} tokens, got {x.shape[axis]} on axis {axis} of {x.shape}")
    index = (slice(None),) * (axis % x.ndim) + (jnp.asarray(order),)
    return x.at[index].get(unique_indices=True, mode="promise_in_bounds")


@functools.cache
def _order(name: str, grid: Grid, transpose: bool, mirror: int | None, reverse: bool, size: Grid | None) -> np.ndarray:
    own, sides = (grid[::-1], None if size is None else size[::-1]) if transpose else (grid, size)
    make = _ORDERS[name]
    places = np.asarray(list(make(own, sides) if name in _SIZED else make(own)), np.int64)
    places = places[:, ::-1] if transpose else places
    if mirror is not None:
        places[:, mirror] = grid[mirror] - 1 - places[:, mirror]
    order = np.ravel_multi_index(tuple(places.T), grid).astype(np.int32)
    order = np.ascontiguousarray(order[::-1] if reverse else order)
    order.setflags(write=False)
    return order


# Each yields the places of a grid in turn.


def _raster(grid: Grid) -> Iterator[Place]:
    return itertools.product(*map(range, grid))


def _snake(grid: Grid) -> Iterator[Place]:
    if not grid:
        yield ()
        return
    rest = list(_snake(grid[1:]))
    for first in range(grid[0]):
        for place in reversed(rest) if first % 2 else rest:
            yield first, *place


def _diagonal(grid: Grid) -> Iterator[Place]:
    rows, columns = _two_axes("diagonal", grid)
    for total in range(rows + columns - 1):
        for row in range(max(0, total - columns + 1), min(rows, total + 1)):
            yield row, total - row


def _zigzag(grid: Grid) -> Iterator[Place]:
    rows, columns = _two_axes("zigzag", grid)
    for total in range(rows + columns - 1):
        line = range(max(0, total - columns + 1), min(rows, total + 1))
        for row in line if total % 2 else reversed(line):
            yield row, total - row


def _spiral(grid: Grid) -> Iterator[Place]:
    rows, columns = _two_axes("spiral", grid)
    top, left, bottom, right = 0, 0, rows - 1, columns - 1
    while top <= bottom and left <= right:
        yield from ((top, column) for column in range(left, right + 1))
        yield from ((row, right) for row in range(top + 1, bottom + 1))
        if top < bottom and left < right:
            yield from ((bottom, column) for column in range(right - 1, left - 1, -1))
            yield from ((row, left) for row in range(bottom - 1, top, -1))
        top, left, bottom, right = top + 1, left + 1, bottom - 1, right - 1


def _hilbert(grid: Grid) -> Iterator[Place]:
    rows, columns = _two_axes("hilbert", grid)
    bits = (max(rows, columns) - 1).bit_length()
    for step in range(4**bits):
        row = column = 0
        # Two bits of the step choose a quarter of a square whose orientation the smaller squares have decided.
        for bit in range(bits):
            side, down, across = 1 << bit, step >> (2 * bit + 1) & 1, step >> (2 * bit) & 1
            across ^= down
            if not across:
                if down:
                    row, column = side - 1 - row, side - 1 - column
                row, column = column, row
            row, column = row + side * across, column + side * down
        if row < rows and column < columns:
            yield row, column


def _gilbert(grid: Grid) -> Iterator[Place]:
    if len(grid) not in (2, 3):
        raise ValueError(f"gilbert orders grids of two or three axes, got {grid}")
    vectors = [np.eye(len(grid), dtype=np.int64)[axis] * length for axis, length in enumerate(grid)]
    # The curve runs along the longest axis; of the others, and of equal ones, the last of the grid comes first.
    vectors.reverse()
    vectors.insert(0, vectors.pop(int(np.argmax([_length(vector) for vector in vectors]))))
    curve = _gilbert_plane if len(grid) == 2 else _gilbert_box
    return (tuple(place) for place in curve(np.zeros(len(grid), np.int64), *vectors))


def _length(vector: np.ndarray) -> int:
    return int(np.abs(vector).sum())


def _half(vector: np.ndarray) -> np.ndarray:
    """Half of a vector along an axis, rounded such that an even number of steps comes first where it can."""
    half = vector // 2
    return half + np.sign(vector) if _length(half) % 2 and _length(vector) > 2 else half


def _line(start: np.ndarray, along: np.ndarray) -> Iterator[np.ndarray]:
    return (start + step * np.sign(along) for step in range(_length(along)))


def _gilbert_plane(p: np.ndarray, a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """A curve through the rectangle of sides a and b from the corner p, that ends at the other end of a."""
    if min(_length(a), _length(b)) == 1:
        yield from _line(p, a if _length(b) == 1 else b)
    elif 2 * _length(a) > 3 * _length(b):
        first = _half(a)
        yield from _gilbert_plane(p, first, b)
        yield from _gilbert_plane(p + first, a - first, b)
    else:
        first, second = a // 2, _half(b)
        yield from _gilbert_plane(p, second, first)
        yield from _gilbert_plane(p + second, a, b - second)
        yield from _gilbert_plane(p + a - np.sign(a) + second - np.sign(b), -second, first - a)


def _gilbert_box(p: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Iterator[np.ndarray]:
    """The same through the box of sides a, b and c."""
    wide, high, deep = _length(a), _length(b), _length(c)
    da, db, dc = np.sign(a), np.sign(b), np.sign(c)
    first, second, third = _half(a), _half(b), _half(c)
    if min(wide, high, deep) == 0:
        # Half of a side of one.
        return
    if sorted((wide, high, deep))[1] == 1:
        yield from _line(p, max((a, b, c), key=_length))
    elif 2 * wide > 3 * high and 2 * wide > 3 * deep:
        yield from _gilbert_box(p, first, b, c)
        yield from _gilbert_box(p + first, a - first, b, c)
    elif 3 * high > 4 * deep:
        yield from _gilbert_box(p, second, c, first)
        yield from _gilbert_box(p + second, a, b - second, c)
        yield from _gilbert_box(p + a - da + second - db, -second, c, first - a)
    elif 3 * deep > 4 * high:
        yield from _gilbert_box(p, third, first, b)
        yield from _gilbert_box(p + third, a, b, c - third)
        yield from _gilbert_box(p + a - da + third - dc, -third, first - a, b)
    else:
        yield from _gilbert_box(p, second, third, first)
        yield from _gilbert_box(p + second, c, first, b - second)
        yield from _gilbert_box(p + second - db + c - dc, a, -second, third - c)
        yield from _gilbert_box(p + a - da + second + c - dc, -c, first - a, b - second)
        yield from _gilbert_box(p + a - da + second - db, -second, third, first - a)


def _window(grid: Grid, size: Grid) -> Iterator[Place]:
    for corner in itertools.product(*(range(0, n, s) for n, s in zip(grid, size, strict=True))):
        ends = (min(c + s, n) for c, s, n in zip(corner, size, grid, strict=True))
        yield from itertools.product(*(range(c, end) for c, end in zip(corner, ends, strict=True)))


def _dilated(grid: Grid, size: Grid) -> Iterator[Place]:
    for corner in itertools.product(*map(range, size)):
        yield from itertools.product(*(range(c, n, s) for c, n, s in zip(corner, grid, size, strict=True)))


def _two_axes(name: str, grid: Grid) -> Grid:
    if len(grid) != 2:
        raise ValueError(f"{name} orders grids of two axes, got {grid}")
    return grid


_ORDERS: dict[str, Callable[..., Iterator[Place]]] = {
    "raster": _raster,
    "snake": _snake,
    "diagonal": _diagonal,
    "zigzag": _zigzag,
    "spiral": _spiral,
    "hilbert": _hilbert,
    "gilbert": _gilbert,
    "window": _window,
    "dilated": _dilated,
}
_SIZED = ("window", "dilated")
_MIRRORED = {"diagonal": 1, "zigzag": 1, "spiral": 0}
