"""CIFAR-10 from its binary files (Krizhevsky, 2009, "Learning multiple layers of features from tiny images")."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np

from attnlab.data.dataset import Dataset, Loading
from attnlab.data.errors import data_error, existing
from attnlab.data.images import ArrayImages, Augment, Scale, array_dataset

RECORDS_PER_FILE = 10_000
RECORD_BYTES = 1 + 3 * 32 * 32
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "eval": ["test_batch.bin"]}

_HELP = {
    "expected": "the directory of the binary version: data_batch_1.bin to data_batch_5.bin and test_batch.bin, each "
    f"{RECORDS_PER_FILE} records of {RECORD_BYTES} bytes (a label, then 32 x 32 red, green and blue values)",
    "get_it": "the 'CIFAR-10 binary version' at https://www.cs.toronto.edu/~kriz/cifar.html",
}


@dataclasses.dataclass(frozen=True)
class Cifar10:
    """CIFAR-10, (32, 32, 3), ten classes: 50 000 images for training and the 10 000 of the test batch for evaluation.

    Attributes:
      path: directory of the binary files, or the one that `cifar-10-batches-bin` was unpacked into.
      scale: of the values, "unit" for [0, 1] or "symmetric" for [-1, 1].
      augment: random changes in training; the usual ones are `padding=4, flip=True`.
      loading: threads and processes.
    """

    name: ClassVar[str] = "cifar10"

    path: str = ""
    scale: Scale = "unit"
    augment: Augment = dataclasses.field(default_factory=Augment)
    loading: Loading = dataclasses.field(default_factory=Loading)

    def open(self) -> Dataset:
        """Reads the six files into memory (180 MB).

        Raises:
          DataError: if a file is missing, has the wrong size, or holds a label above 9.
        """
        folder = existing(self.path, "directory", **_HELP)
        if (folder / "cifar-10-batches-bin").is_dir():
            folder = folder / "cifar-10-batches-bin"
        return array_dataset(
            self.name,
            {split: _read([folder / file for file in files]) for split, files in FILES.items()},
            num_classes=10,
            class_names=CLASS_NAMES,
            augment=self.augment,
            scale=self.scale,
            loading=self.loading,
        )


def _read(paths: list[Path]) -> ArrayImages:
    records = []
    for path in paths:
        existing(path, "file", **_HELP)
        size, right = path.stat().st_size, RECORDS_PER_FILE * RECORD_BYTES
        if size != right:
            raise data_error(path, f"holds {size} bytes instead of {right}: broken or not the binary version", **_HELP)
        records.append(np.fromfile(path, np.uint8).reshape(-1, RECORD_BYTES))
        if (worst := int(records[-1][:, 0].max())) > 9:
            raise data_error(path, f"holds the label {worst}, above 9: broken or CIFAR-100", **_HELP)
    table = np.concatenate(records)
    return ArrayImages(np.ascontiguousarray(table[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), table[:, 0])
