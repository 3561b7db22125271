"""Pairs of images for restoration: those of another source, and what is left of them.

    noise       x + σ n                              n normal, σ the strength
    downscale   means over squares of f × f pixels   the target is f times as fine
    haze        t x + (1 - t) a                      t from 1 - strength to 1, a light a near 1
    rain        x + bright streaks in one direction, their share of the pixels up to the strength
    snow        bright discs over x, as many as cover a share of the pixels up to the strength
    weather     one of haze, rain and snow

Every draw follows from the image and `seed` in evaluation, and is new in training.
"""

import dataclasses
import hashlib
import zlib
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from attnlab.data.cifar10 import Cifar10
from attnlab.data.dataset import Dataset, Example, Loading
from attnlab.data.digits import Digits
from attnlab.data.folder import ImageFolder
from attnlab.data.npz import NpzImages
from attnlab.data.tasks import TaskData
from attnlab.suggest import suggestion

Degradation = Literal["noise", "downscale", "haze", "rain", "snow", "weather"]
_WEATHER = ("haze", "rain", "snow")


@dataclasses.dataclass(frozen=True)
class DegradedImages:
    """Degraded images with what they were, see the module docstring.

    An example is `image` (h, w, C), `target` (H, W, C) and `weight`; with `regions` also `labels` (h, w), int32.

    Attributes:
      images: the source of the images, of values from 0 to 1; its augmentation is that of the pairs.
      degradation: what is done to them.
      strength: how much of it, from 0 to 1; of no effect on "downscale".
      factor: f of "downscale".
      regions: levels of brightness of the degraded image, smoothed, by which regions are labelled; 0 for no labels.
      seed: of the draws in evaluation.
      loading: threads and processes.
    """

    name: ClassVar[str] = "degraded"

    images: Digits | Cifar10 | NpzImages | ImageFolder | TaskData = dataclasses.field(default_factory=Digits)
    degradation: Degradation = "noise"
    strength: float = 0.2
    factor: int = 2
    regions: int = 0
    seed: int = 0
    loading: Loading = dataclasses.field(default_factory=Loading)

    def open(self) -> Dataset:
        """Opens the source and degrades its images when they are read.

        Raises:
          DataError: if files are missing or broken.
          ValueError: for a setting out of range, a source of no images or of values below 0, or images that the factor
            does not divide.
        """
        if self.degradation not in get_args(Degradation):
            near = suggestion(self.degradation, get_args(Degradation))
            raise ValueError(f"no degradation is called {self.degradation!r}: {near}")
        if not 0 <= self.strength <= 1 or self.factor < 1 or self.regions < 0 or self.seed < 0:
            raise ValueError(
                f"strength must lie in 0..1, factor be at least 1, regions and seed at least 0, got {self.strength}, "
                f"{self.factor}, {self.regions}, {self.seed}"
            )
        source = self.images.open()
        shape = source.info.image_shape
        if source.info.kind != "image" or shape is None:
            raise ValueError(f"images must be a source of images, {source.info.name} is {source.info.kind}")
        if getattr(self.images, "scale", "unit") != "unit":
            raise ValueError("images must be of values from 0 to 1: give their source scale='unit'")
        factor = self.factor if self.degradation == "downscale" else 1
        if any(side % factor for side in shape[:2]):
            raise ValueError(f"factor must divide the images {shape[:2]}, got {factor}")
        facts = (source.info.digest, self.degradation, self.strength, factor, self.regions, self.seed)
        info = dataclasses.replace(
            source.info,
            name=self.name,
            kind="image pairs",
            digest=hashlib.sha256(repr(facts).encode()).hexdigest(),
            image_shape=(shape[0] // factor, shape[1] // factor, shape[2]),
            upscale=factor,
            num_classes=None,
            class_names=(),
            details={"images": source.info.name, "degradation": self.degradation, **source.info.details},
        )
        return Dataset(info, source.examples, _Pair(self, source.transform), self.loading)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """From an example of the source to a pair."""

    source: DegradedImages
    transform: Any

    def __call__(self, example: Example, rng: np.random.Generator | None) -> Example:
        example = example if self.transform is None else self.transform(example, rng)
        target = np.asarray(example["image"], np.float32)
        if rng is None:
            rng = np.random.default_rng((self.source.seed, zlib.crc32(np.ascontiguousarray(target))))
        image = _degraded(target, self.source, rng).astype(np.float32)
        pair = {"image": image, "target": target, "weight": np.float32(example["weight"])}
        return pair | ({"labels": _levels(image, self.source.regions)} if self.source.regions else {})


def _degraded(x: np.ndarray, source: DegradedImages, rng: np.random.Generator) -> np.ndarray:
    kind, strength = source.degradation, source.strength
    kind = _WEATHER[rng.integers(len(_WEATHER))] if kind == "weather" else kind
    if kind == "noise":
        return x + strength * rng.standard_normal(x.shape)
    if kind == "downscale":
        rows, columns = (side // source.factor for side in x.shape[:2])
        return x.reshape(rows, source.factor, columns, source.factor, -1).mean((1, 3))
    if kind == "haze":
        through = 1 - strength * rng.random()
        return through * x + (1 - through) * rng.uniform(0.8, 1.0)
    share = strength * rng.random()
    mask = _streaks(x.shape[:2], share, rng) if kind == "rain" else _discs(x.shape[:2], share, rng)
    bright = rng.uniform(0.7, 1.0)
    return x + mask[..., None] * (bright - x) * (0.6 if kind == "rain" else 0.9)


def _streaks(grid: tuple[int, ...], share: float, rng: np.random.Generator) -> np.ndarray:
    """Lines of a quarter of the image's length in one direction, 0 or 1."""
    length = max(2, grid[0] // 4)
    slope = rng.uniform(-0.5, 0.5)
    start = rng.random(grid) < share / length
    mask = np.zeros(grid, bool)
    for step in range(length):
        mask |= np.roll(start, (step, round(slope * step)), (0, 1))
    return mask.astype(np.float32)


def _discs(grid: tuple[int, ...], share: float, rng: np.random.Generator) -> np.ndarray:
    """Discs of up to a tenth of the image's height, with soft borders, from 0 to 1."""
    rows, columns = np.mgrid[: grid[0], : grid[1]]
    mask, largest = np.zeros(grid), max(1.0, grid[0] / 10)
    for _ in range(max(1, round(share * grid[0] * grid[1] / (2 * largest**2)))):
        centre, radius = rng.random(2) * grid, rng.uniform(0.5, largest)
        apart = np.hypot(rows - centre[0], columns - centre[1])
        mask = np.maximum(mask, np.clip(radius + 0.5 - apart, 0, 1))
    return mask


def _levels(image: np.ndarray, count: int) -> np.ndarray:
    """Labels (h, w) by the brightness of the means over 3 × 3 pixels."""
    grey = np.pad(image.mean(-1), 1, mode="edge")
    rows, columns = image.shape[:2]
    smooth = sum(grey[i : i + rows, j : j + columns] for i in range(3) for j in range(3)) / 9
    return np.clip(np.floor(smooth * count), 0, count - 1).astype(np.int32)
