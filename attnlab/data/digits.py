"""scikit-learn's digit images: 1797 handwritten digits of 8 x 8 pixels, part of the library, so nothing is downloaded.

They are the test set of "Optical recognition of handwritten digits" (Alpaydin and Kaynak, 1998, UCI repository).
"""

import dataclasses
from typing import ClassVar

import numpy as np

from attnlab.data.dataset import Dataset, Loading
from attnlab.data.images import ArrayImages, Augment, Scale, array_dataset, stratified_split


@dataclasses.dataclass(frozen=True)
class Digits:
    """Digit images, (8, 8, 1), ten classes.

    The split is fixed: of each class every fifth image is for evaluation (`images.stratified_split`), 1442 for training
    and 355 for evaluation. Both hold digits of the same 13 writers.

    Attributes:
      eval_fraction: share of each class that is for evaluation.
      scale: of the values, "unit" for [0, 1] or "symmetric" for [-1, 1].
      augment: random changes in training. A `padding` of 1 suits digits; a flip does not.
      loading: threads and processes.
    """

    name: ClassVar[str] = "digits"

    eval_fraction: float = 0.2
    scale: Scale = "unit"
    augment: Augment = dataclasses.field(default_factory=Augment)
    loading: Loading = dataclasses.field(default_factory=Loading)

    def open(self) -> Dataset:
        """Loads the images.

        Raises:
          ValueError: for a setting out of range.
        """
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = (bunch.images[..., None] / 16).astype(np.float32)
        train, held_out = stratified_split(bunch.target, self.eval_fraction)
        return array_dataset(
            self.name,
            {split: ArrayImages(images[i], bunch.target[i]) for split, i in (("train", train), ("eval", held_out))},
            num_classes=10,
            class_names=tuple("0123456789"),
            augment=self.augment,
            scale=self.scale,
            loading=self.loading,
        )
