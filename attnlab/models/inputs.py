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
