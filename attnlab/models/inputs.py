"""What a model takes: its class says so in `inputs`, and with it which constructor arguments follow from the data."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from attnlab.data import DatasetInfo


@dataclasses.dataclass(frozen=True)
class Images:
    """Images `(B, H, W, channels)`, to logits `(B, num_classes)`.

    Attributes:
      kind: of the data, as `DatasetInfo` has it.
      sizes: constructor arguments that follow from the data.
    """

    kind: ClassVar[str] = "image"
    sizes: ClassVar[tuple[str, ...]] = ("image_size", "channels", "num_classes")

    def sizes_of(self, info: "DatasetInfo") -> Mapping[str, Any]:
        """The arguments `sizes` for images of a dataset."""
        rows, columns, channels = info.image_shape
        return {"image_size": (rows, columns), "channels": channels, "num_classes": info.num_classes}


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Token ids `(B, N)`, to logits `(B, N, vocab_size)`; attributes as `Images`."""

    kind: ClassVar[str] = "text"
    sizes: ClassVar[tuple[str, ...]] = ("vocab_size",)

    def sizes_of(self, info: "DatasetInfo") -> Mapping[str, Any]:
        """The arguments `sizes` for the texts of a dataset."""
        return {"vocab_size": info.vocab_size}


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Sequences of vectors `(B, N, token_features)`, to predictions `(B, responses)`; attributes as `Images`."""

    kind: ClassVar[str] = "vectors"
    sizes: ClassVar[tuple[str, ...]] = ("token_features", "responses")

    def sizes_of(self, info: "DatasetInfo") -> Mapping[str, Any]:
        """The arguments `sizes` for the sequences of a dataset."""
        return {"token_features": info.token_features, "responses": info.responses}


@dataclasses.dataclass(frozen=True)
class ImagePairs:
    """Images `(B, h, w, channels)`, to images `(B, f·h, f·w, channels)`: restoration, and with f > 1 super-resolution.

    Attributes:
      kind: of the data, as `DatasetInfo` has it.
      sizes: constructor arguments that follow from the data; without `upscale` for models that keep the size.
    """

    sizes: tuple[str, ...] = ("channels", "upscale")
    kind: ClassVar[str] = "image pairs"

    def sizes_of(self, info: "DatasetInfo") -> Mapping[str, Any]:
        """The arguments `sizes` for pairs of a dataset.

        Raises:
          ValueError: for data that is finer than its input, where the model keeps the size.
        """
        found = {"channels": info.image_shape[-1], "upscale": info.upscale}
        if "upscale" not in self.sizes and info.upscale != 1:
            raise ValueError(f"the model keeps the size of images; those of {info.name} are to be {info.upscale} finer")
        return {name: found[name] for name in self.sizes}
