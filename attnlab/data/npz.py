"""Images and labels from a NumPy `.npz` file, under any names."""

import dataclasses
import zipfile
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np

from attnlab.data.dataset import Dataset, Loading
from attnlab.data.errors import DataError, data_error, existing
from attnlab.data.images import ArrayImages, Augment, Scale, array_dataset, stratified_split
from attnlab.suggest import suggestion

_HELP = {
    "expected": "a file of numpy.savez with images, (N, H, W) or (N, H, W, C), uint8 or floats in [0, 1], and integer "
    "labels (N,)",
    "get_it": "write it with numpy.savez(path, images=..., labels=...), or name the arrays of yours with "
    "train_images, train_labels, eval_images and eval_labels",
}


@dataclasses.dataclass(frozen=True)
class NpzImages:
    """Labelled images of one `.npz` file.

    Attributes:
      path: of the file.
      train_images: name of the images, (N, H, W) or (N, H, W, C), uint8 or floats in [0, 1].
      train_labels: name of the labels, (N,), integers from 0.
      eval_images: name of the images for evaluation; None splits off a share of the others.
      eval_labels: name of their labels.
      eval_fraction: that share, of each class (`images.stratified_split`); unused where `eval_images` is named.
      scale: of the values, "unit" for [0, 1] or "symmetric" for [-1, 1].
      augment: random changes in training.
      loading: threads and processes.
    """

    name: ClassVar[str] = "npz"

    path: str = ""
    train_images: str = "images"
    train_labels: str = "labels"
    eval_images: str | None = None
    eval_labels: str | None = None
    eval_fraction: float = 0.2
    scale: Scale = "unit"
    augment: Augment = dataclasses.field(default_factory=Augment)
    loading: Loading = dataclasses.field(default_factory=Loading)

    def open(self) -> Dataset:
        """Reads the arrays into memory.

        Raises:
          DataError: if the file is missing or broken, lacks an array, or an array has another shape, dtype or range.
          ValueError: for a setting out of range.
        """
        if (self.eval_images is None) != (self.eval_labels is None):
            raise ValueError(
                f"eval_images and eval_labels go together, not {self.eval_images!r} and {self.eval_labels!r}"
            )
        path = existing(self.path, "file", **_HELP)
        images, labels = _arrays(path, self.train_images, self.train_labels)
        if self.eval_images is None:
            train, held_out = stratified_split(labels, self.eval_fraction)
            splits = {split: (images[i], labels[i]) for split, i in (("train", train), ("eval", held_out))}
        else:
            splits = {"train": (images, labels), "eval": _arrays(path, self.eval_images, self.eval_labels)}
            shapes = {split: arrays[0].shape[1:] for split, arrays in splits.items()}
            if shapes["train"] != shapes["eval"]:
                raise data_error(path, f"training and evaluation images differ in shape: {shapes}", **_HELP)
        if empty := [split for split, arrays in splits.items() if not len(arrays[1])]:
            raise data_error(path, f"{len(labels)} images leave the {empty[0]} split empty", **_HELP)
        return array_dataset(
            self.name,
            {split: ArrayImages(*arrays) for split, arrays in splits.items()},
            num_classes=1 + max(int(arrays[1].max()) for arrays in splits.values()),
            augment=self.augment,
            scale=self.scale,
            loading=self.loading,
            details={"file": path.name},
        )


def _arrays(path: Path, images_key: str, labels_key: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise data_error(path, "is a single array, not an .npz archive", **_HELP)
        with archive:
            for key in (images_key, labels_key):
                if key not in archive.files:
                    raise data_error(path, f"has no array {key!r}: {suggestion(key, archive.files)}", **_HELP)
            images, labels = archive[images_key], archive[labels_key]
    except DataError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise data_error(path, f"cannot be read as .npz ({error})", **_HELP) from error
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise data_error(path, f"{images_key!r} has the shape {images.shape}", **_HELP)
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise data_error(path, f"{labels_key!r} is {labels.dtype} {labels.shape} beside {len(images)} images", **_HELP)
    if labels.size and labels.min() < 0:
        raise data_error(path, f"{labels_key!r} holds the negative label {labels.min()}", **_HELP)
    if np.issubdtype(images.dtype, np.floating):
        if images.size and not (images.min() >= 0 and images.max() <= 1):
            raise data_error(path, f"{images_key!r} runs from {images.min()} to {images.max()}", **_HELP)
        images = images.astype(np.float32)
    elif images.dtype != np.uint8:
        raise data_error(path, f"{images_key!r} is {images.dtype}", **_HELP)
    return images, labels
