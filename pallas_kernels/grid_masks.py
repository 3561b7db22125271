"""Masks of tokens that lie on a grid of several axes: a mask for each axis, on the coordinates along it."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from pallas_kernels.masks import EMPTY, FULL, PARTIAL, UNKNOWN, Full, Index, Interval, Mask, quotient, remainder


@dataclasses.dataclass(frozen=True)
class Grid(Mask):
    """Tokens of a grid in row-major order: a pair is allowed where the mask of every axis allows its coordinates.

    Attributes:
      shape: lengths of the axes, of queries and keys alike, outermost first.
      masks: one per axis, on coordinates along that axis.
    """

    shape: tuple[int, ...]
    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.masks) or not self.masks:
            raise ValueError(f"Grid needs one mask per axis, got shape {self.shape} and {len(self.masks)} masks")

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        allowed = Full()(q_idx, k_idx)
        for mask, length, stride in self._axes():
            allowed = allowed & mask(q_idx // stride % length, k_idx // stride % length)
        return allowed

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        verdict = Full().judge(q, k)
        for mask, length, stride in self._axes():
            axis = mask.judge(*(_coordinates(x, length, stride) for x in (q, k)))
            axis = np.where(axis == PARTIAL, UNKNOWN, axis)  # coordinates of a block are a subset of their product
            verdict = np.where((verdict == EMPTY) | (axis == EMPTY), EMPTY, np.maximum(verdict, axis))
        return verdict.astype(np.int8)

    def _axes(self) -> Iterator[tuple[Mask, int, int]]:
        for axis, (mask, length) in enumerate(zip(self.masks, self.shape, strict=True)):
            yield mask, length, math.prod(self.shape[axis + 1 :])


@dataclasses.dataclass(frozen=True)
class TiledGrid(Mask):
    """As `Grid`, of tokens in the order of tiles: near in the order is near in all axes, so that blocks are boxes.

    Tiles are in row-major order, and so are the tokens of each. Where a tile reaches beyond the grid it has tokens that
    see nothing and are not seen.

    Attributes:
      shape: lengths of the axes, outermost first.
      masks: one per axis, on coordinates along that axis.
      tile: lengths of a tile.
    """

    shape: tuple[int, ...]
    masks: tuple[Mask, ...]
    tile: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.shape) == len(self.masks) == len(self.tile) or not self.masks:
            raise ValueError(f"TiledGrid needs a mask and a length of tiles per axis, got {self}")

    @property
    def tiles(self) -> tuple[int, ...]:
        """Tiles along each axis."""
        return tuple(-(-length // size) for length, size in zip(self.shape, self.tile, strict=True))

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        allowed = Full()(q_idx, k_idx)
        for mask, length, tiles, stride, size, inner in self._axes():
            q, k = (
                remainder(quotient(x, stride * math.prod(self.tile)), tiles) * size
                + remainder(quotient(x, inner), size)
                for x in (q_idx, k_idx)
            )
            allowed = allowed & (q < length) & (k < length) & mask(q, k)
        return allowed

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        verdict, tokens = Full().judge(q, k), math.prod(self.tile)
        for mask, length, tiles, stride, size, _ in self._axes():
            boxes, outside = [], np.zeros(verdict.shape, bool)
            for x in (q, k):
                at = _coordinates(Interval(x.lo // tokens, x.hi // tokens), tiles, stride)
                outside = outside | (at.hi * size + size > length)
                boxes.append(Interval(at.lo * size, np.minimum(at.hi * size + size, length) - 1))
            axis = mask.judge(*boxes)
            axis = np.where((axis == PARTIAL) | ((axis == FULL) & outside), UNKNOWN, axis)
            verdict = np.where((verdict == EMPTY) | (axis == EMPTY), EMPTY, np.maximum(verdict, axis))
        return verdict.astype(np.int8)

    def _axes(self) -> Iterator[tuple[Mask, int, int, int, int, int]]:
        """Mask, length, tiles, tiles to the next along the axis, length of a tile, and tokens to the next in it."""
        for axis, (mask, length) in enumerate(zip(self.masks, self.shape, strict=True)):
            stride, inner = (math.prod(x[axis + 1 :]) for x in (self.tiles, self.tile))
            yield mask, length, self.tiles[axis], stride, self.tile[axis], inner


def _coordinates(x: Interval, length: int, stride: int) -> Interval:
    """An interval that holds the coordinates, along one axis, of the flat indices of `x`."""
    lo, hi = x.lo // stride, x.hi // stride
    wraps = lo // length != hi // length
    return Interval(np.where(wraps, 0, lo % length), np.where(wraps, length - 1, hi % length))
