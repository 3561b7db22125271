"""Pictures of coloured shapes with captions, made for training what looks at images and words together.

    a red circle left of a blue square

Each picture holds one or two shapes on a black ground, side by side or one above the other. The caption names them in
that order, the first one on the left or above. Words are token ids of their own vocabulary. As data for classification
the label is the colour and shape of the object that is named first; the caption stands beside it.

A task of this library, after synthetic captions of coloured shapes such as ShapeWorld's (Kuhnle and Copestake, 2017,
arXiv:1704.04517).
"""

import dataclasses
from typing import ClassVar

import numpy as np

from attnlab.registry import Cost, Kind, Paper, Source, register
from attnlab.tasks.words import Words

COLORS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "white": (1, 1, 1)}
SHAPES = ("square", "circle", "triangle", "cross")
WORDS = Words.of(("a", "left", "above", "of"), COLORS, SHAPES)
CAPTION = 8
KINDS = tuple((color, shape) for color in COLORS for shape in SHAPES)


@register(
    "captioned_shapes",
    kind=Kind.TASK,
    paper=Paper(
        "ShapeWorld: A New Test Methodology for Multimodal Language Understanding",
        "Kuhnle and Copestake",
        2017,
        "1704.04517",
    ),
    source=Source.PAPER_TEXT,
    cost=Cost("O(H·W)", "O(H·W)"),
    summary="one or two coloured shapes, and the words that say which and where",
    small={"size": 16},
)
@dataclasses.dataclass(frozen=True)
class CaptionedShapes:
    """The task; see the module docstring. It opens as images.

    Attributes:
      size: side of a picture in pixels, even and at least 16.
      objects: 1 or 2 shapes in each; either when 0.
    """

    size: int = 32
    objects: int = 0

    vocab_size: ClassVar[int] = len(WORDS)
    class_names: ClassVar[tuple[str, ...]] = tuple(" ".join(kind) for kind in KINDS)

    def __post_init__(self) -> None:
        if self.size < 16 or self.size % 2:
            raise ValueError(f"size must be even and at least 16, got {self.size}")
        if self.objects not in (0, 1, 2):
            raise ValueError(f"objects must be 1 or 2, or 0 for either, got {self.objects}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""
        return self.size, self.size, 3

    def sample(self, generator: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        """Pictures, captions, the weight of each word, and labels.

        Returns:
          `inputs` (batch, H, W, 3) float32 in 0..1; `targets` (batch, 8) int32, padded in front; `weight` (batch, 8)
          float32; `label` (batch,) int32, an index of `class_names`.
        """
        images = np.zeros((batch, *self.image_shape), np.float32)
        targets, labels, half = np.zeros((batch, CAPTION), np.int32), np.zeros(batch, np.int32), self.size // 2
        for index in range(batch):
            count = self.objects or int(generator.integers(1, 3))
            kinds, above = generator.integers(len(KINDS), size=count), bool(generator.integers(2))
            # Quarters: one of the four, or the first and that below it or to its right.
            quarters = [(0, 0), (1, 0) if above else (0, 1)] if count == 2 else [tuple(generator.integers(0, 2, 2))]
            for quarter, kind in zip(quarters, kinds, strict=True):
                row, column = half * np.asarray(quarter) + generator.integers(0, half - self._side + 1, 2)
                color, shape = KINDS[kind]
                window = images[index, row : row + self._side, column : column + self._side]
                window[_mask(self._side, shape)] = COLORS[color]
            labels[index] = kinds[0]
            targets[index] = WORDS.ids(_caption([KINDS[kind] for kind in kinds], above), CAPTION)
        return {"inputs": images, "targets": targets, "weight": (targets > 0).astype(np.float32), "label": labels}

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """The captions (B, 8) that are read off the pictures, quarter by quarter."""
        half, captions = self.size // 2, []
        for image in np.asarray(inputs):
            found = {}
            for row, column in np.ndindex(2, 2):
                quarter = image[row * half : (row + 1) * half, column * half : (column + 1) * half]
                if (filled := quarter.any(-1)).any():
                    top, left = filled.any(1).argmax(), filled.any(0).argmax()
                    there = filled[top : top + self._side, left : left + self._side]
                    shape = next(s for s in SHAPES if np.array_equal(there, _mask(self._side, s)))
                    value = tuple(int(level) for level in quarter[filled][0])
                    found[row, column] = next(name for name, color in COLORS.items() if color == value), shape
            captions.append(WORDS.ids(_caption(list(found.values()), (1, 0) in found), CAPTION))
        return np.stack(captions)

    def text(self, ids: np.ndarray) -> str:
        """The words of one caption."""
        return WORDS.text(ids)

    @property
    def _side(self) -> int:
        """Side of a shape: three quarters of a quarter's, odd, so that it has a middle."""
        return (3 * self.size // 8 - 1) | 1


def _mask(side: int, shape: str) -> np.ndarray:
    """Pixels of a shape, which reaches all four sides of its square."""
    rows, columns = np.mgrid[:side, :side]
    middle = side // 2
    if shape == "circle":
        return (rows - middle) ** 2 + (columns - middle) ** 2 <= middle**2
    if shape == "triangle":
        return np.abs(columns - middle) * 2 <= rows
    if shape == "cross":
        return (rows == middle) | (columns == middle)
    return np.ones((side, side), bool)


def _caption(kinds: list[tuple[str, str]], above: bool) -> list[str]:
    if len(kinds) == 1:
        return ["a", *kinds[0]]
    return ["a", *kinds[0], *(["above"] if above else ["left", "of"]), "a", *kinds[1]]
