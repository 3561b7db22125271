"""What all image sources share: the settings, the transform, images held in memory, and a fixed split.

An example is `image` (H, W, C), `label` (int32) and `weight` (float32, 1). Sources give uint8, or float32 in [0, 1];
batches hold float32, scaled by the transform.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from attnlab.data.dataset import Dataset, DatasetInfo, Example, Loading
from attnlab.data.errors import check_fraction
from attnlab.suggest import suggestion

Scale = Literal["unit", "symmetric"]


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random changes of training images; none by default.

    Attributes:
      padding: black pixels put on every side before a crop of the image's size is taken at a random place.
      flip: mirror left and right with probability one half.
    """

    padding: int = 0
    flip: bool = False

    def __post_init__(self):
        if self.padding < 0:
            raise ValueError(f"padding must be at least 0, not {self.padding}")


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Crop, flip and scaling of one example.

    Attributes:
      size: (H, W) of the crop: at a random place in training, in the middle in evaluation.
      augment: random changes, in training alone.
      scale: "unit" for values in [0, 1], "symmetric" for [-1, 1].
    """

    size: tuple[int, int]
    augment: Augment
    scale: Scale

    def __post_init__(self):
        if self.scale not in get_args(Scale):
            raise ValueError(f"no scale is called {self.scale!r}: {suggestion(self.scale, get_args(Scale))}")

    def __call__(self, example: Example, rng: np.random.Generator | None) -> Example:
        """Transforms an example, randomly if there is a generator."""
        image = example["image"]
        if rng is not None and self.augment.padding:
            image = np.pad(image, ((self.augment.padding,) * 2, (self.augment.padding,) * 2, (0, 0)))
        room = [have - want for have, want in zip(image.shape[:2], self.size, strict=True)]
        top, left = (r // 2 if rng is None else int(rng.integers(r + 1)) for r in room)
        image = image[top : top + self.size[0], left : left + self.size[1]]
        if rng is not None and self.augment.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        unit = image.astype(np.float32) * np.float32(1 / 255 if image.dtype == np.uint8 else 1)
        return {**example, "image": unit if self.scale == "unit" else 2 * unit - 1}


class ArrayImages(Sequence[Example]):
    """Images (N, H, W, C), uint8 or float32 in [0, 1], and labels (N,), in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels.astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": self.labels[index], "weight": np.float32(1)}


def array_dataset(
    name: str,
    splits: dict[str, ArrayImages],
    *,
    num_classes: int,
    augment: Augment,
    scale: Scale,
    loading: Loading,
    class_names: tuple[str, ...] = (),
    details: dict[str, str] | None = None,
) -> Dataset:
    """A dataset of images in memory; its digest is that of all pixels and labels."""
    digest = hashlib.sha256()
    for split in splits.values():
        digest.update(np.ascontiguousarray(split.images))
        digest.update(split.labels)
    shape = splits["train"].images.shape[1:]
    info = DatasetInfo(
        name=name,
        kind="image",
        train_size=len(splits["train"]),
        eval_size=len(splits["eval"]),
        digest=digest.hexdigest(),
        image_shape=shape,
        num_classes=num_classes,
        class_names=class_names,
        details=details or {},
    )
    return Dataset(info, lambda split, _: splits[split], ImageTransform(shape[:2], augment, scale), loading)


def stratified_split(labels: np.ndarray, eval_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the evaluation examples, (N_train,) and (N_eval,), in rising order.

    Of each class, the evaluation examples are spread evenly over its examples in their given order (every fifth for a
    fraction of 0.2): no random numbers, so that the split is the same for ever.

    Raises:
      ValueError: if `eval_fraction` is not between 0 and 1.
    """
    check_fraction("eval_fraction", eval_fraction)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        quota = np.floor((np.arange(len(members)) + 1) * eval_fraction + 1e-9)
        chosen[members] = np.diff(quota, prepend=0) > 0
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
