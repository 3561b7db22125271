"""An image file to what a classifier takes, as the authors of published weights evaluate them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from attnlab.data.folder import read_image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Upright, resized, cut to the middle and standardised.

    Attributes:
      size: (rows, columns) of the result.
      crop: share of the resized image's sides that the middle takes.
      mean: of each channel, subtracted from values in [0, 1]; one number, or one for each channel.
      std: of each channel, by which the difference is divided.
      channels: 3 for colours, 1 for grey.
    """

    size: tuple[int, int] = (224, 224)
    crop: float = 0.875
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    channels: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must lie above 0 and be at most 1, got {self.crop}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(f"{name} must be one number or {self.channels}, got {tuple(getattr(self, name))}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {tuple(self.std)}")

    def __call__(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """The image `(rows, columns, channels)` in [0, 1], to be shown, and the same standardised; both float32.

        Raises:
          FileNotFoundError: if there is no such file.
          attnlab.data.DataError: if it cannot be decoded.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        whole = [max(side, round(side / self.crop)) for side in self.size]
        image = read_image(path, (whole[0], whole[1]), self.channels)
        top, left = ((have - want) // 2 for have, want in zip(whole, self.size, strict=True))
        shown = image[top : top + self.size[0], left : left + self.size[1]].astype(np.float32) / np.float32(255)
        return shown, (shown - np.float32(self.mean)) / np.float32(self.std)
