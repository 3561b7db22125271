"""Image folders: one directory per class, as ImageNet and many others are kept.

ImageNet (ILSVRC 2012) is such a folder once its archives are unpacked, with the validation images sorted into classes:

    imagenet/train/n01440764/n01440764_10026.JPEG       1 281 167 files in 1000 directories
    imagenet/val/n01440764/ILSVRC2012_val_00000293.JPEG    50 000 files in the same 1000 directories
"""

import dataclasses
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from attnlab.data.dataset import Dataset, DatasetInfo, Example, Loading
from attnlab.data.errors import DataError, data_error, existing
from attnlab.data.images import Augment, ImageTransform, Scale, stratified_split
from attnlab.suggest import suggestion

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

_GET_IT = "your own images, or for ImageNet https://www.image-net.org (registration needed)"
_HELP = {
    "expected": f"images in one directory per class, PATH/train/CLASS/* and PATH/val/CLASS/*, or PATH/CLASS/* with "
    f"eval_fraction set; file names end in {', '.join(sorted(SUFFIXES))}",
    "get_it": _GET_IT,
}


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Labelled images in directories, decoded when they are read; labels number the sorted directory names.

    An image is resized, its shorter side to `resize` pixels, and cut to the middle square. A square of `size` pixels
    of it is used: at a random place in training, the middle one in evaluation. It stands upright, as the camera's note
    of its orientation says (EXIF). The digest is that of the relative
    paths and sizes of all files, not of their contents.

    Attributes:
      path: directory that holds `train_dir` and `eval_dir`, or with `eval_fraction` the classes themselves.
      train_dir: directory of the training classes in `path`.
      eval_dir: directory of the evaluation classes in `path`; they must all be training classes.
      eval_fraction: if given, `path` holds the classes, and this share of each is for evaluation
        (`images.stratified_split` over the sorted files).
      size: pixels of a side.
      resize: pixels of a side before the crop, at least `size`; as `size` when None. 256 for `size` 224 is usual.
      channels: 3 for colours, 1 for grey.
      scale: of the values, "unit" for [0, 1] or "symmetric" for [-1, 1].
      augment: random changes in training.
      on_broken: what happens at an image that cannot be decoded: "raise", or "skip": a warning names it and counts
        those so far, and an example of weight 0 takes its place, which counts nowhere.
      loading: threads and processes; decoding large images is worth several.
    """

    name: ClassVar[str] = "image_folder"

    path: str = ""
    train_dir: str = "train"
    eval_dir: str = "val"
    eval_fraction: float | None = None
    size: int = 224
    resize: int | None = None
    channels: Literal[1, 3] = 3
    scale: Scale = "unit"
    augment: Augment = dataclasses.field(default_factory=Augment)
    on_broken: Literal["raise", "skip"] = "raise"
    loading: Loading = dataclasses.field(default_factory=Loading)

    def open(self) -> Dataset:
        """Lists the files; each is read when its turn comes.

        Raises:
          DataError: if a directory is missing or empty, or the splits differ in classes; while batches are read, if
            an image cannot be decoded.
          ValueError: for a setting out of range.
        """
        resize = self.size if self.resize is None else self.resize
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, not {self.channels}")
        if not 1 <= self.size <= resize:
            raise ValueError(f"size must be at least 1 and at most resize, not {self.size} with resize {resize}")
        if self.on_broken not in ("raise", "skip"):
            raise ValueError(f"on_broken must be 'raise' or 'skip', not {self.on_broken!r}")
        root = existing(self.path, "directory", **_HELP)
        splits, classes = self._split_by_fraction(root) if self.eval_fraction is not None else self._split_by_dir(root)
        digest = hashlib.sha256()
        for file, label in (pair for split in splits.values() for pair in split):
            digest.update(f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0{label}\n".encode())
        info = DatasetInfo(
            name=self.name,
            kind="image",
            train_size=len(splits["train"]),
            eval_size=len(splits["eval"]),
            digest=digest.hexdigest(),
            image_shape=(self.size, self.size, self.channels),
            num_classes=len(classes),
            class_names=tuple(classes),
            details={"folder": root.name},
        )
        examples = {split: _Files(files, resize, self.channels, self.on_broken) for split, files in splits.items()}
        transform = ImageTransform((self.size, self.size), self.augment, self.scale)
        return Dataset(info, lambda split, _: examples[split], transform, self.loading)

    def _split_by_dir(self, root: Path) -> tuple[dict[str, list[tuple[Path, int]]], list[str]]:
        folders = {
            "train": existing(root / self.train_dir, "directory", **_HELP),
            "eval": existing(root / self.eval_dir, "directory", **_HELP),
        }
        classes = _classes(folders["train"])
        for name in sorted(set(_classes(folders["eval"])) - set(classes)):
            problem = f"is a class without training images: {suggestion(name, classes)}"
            raise data_error(folders["eval"] / name, problem, **_HELP)
        return {split: _labelled(folder, classes, split == "eval") for split, folder in folders.items()}, classes

    def _split_by_fraction(self, root: Path) -> tuple[dict[str, list[tuple[Path, int]]], list[str]]:
        classes = _classes(root)
        pairs = _labelled(root, classes, False)
        train, held_out = stratified_split(np.array([label for _, label in pairs]), self.eval_fraction)
        if not len(train) or not len(held_out):
            problem = f"{len(pairs)} images leave a split empty with eval_fraction {self.eval_fraction}"
            raise data_error(root, problem, **_HELP)
        return {"train": [pairs[i] for i in train], "eval": [pairs[i] for i in held_out]}, classes


class _Files(Sequence[Example]):
    """Image files decoded by index."""

    def __init__(self, files: list[tuple[Path, int]], size: int, channels: int, on_broken: str = "raise"):
        self._files, self._size, self._channels, self._on_broken = files, size, channels, on_broken
        self._skipped: set[int] = set()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        path, label = self._files[index]
        try:
            image = read_image(path, self._size, self._channels)
        except DataError as error:
            if self._on_broken == "raise":
                raise
            if index not in self._skipped:
                self._skipped.add(index)
                problem = str(error).splitlines()[0]
                warnings.warn(f"{problem}; skipped, {len(self._skipped)} of {len(self)} so far", stacklevel=2)
            blank = np.zeros((self._size, self._size, self._channels), np.uint8)
            return {"image": blank, "label": np.int32(label), "weight": np.float32(0)}
        return {"image": image, "label": np.int32(label), "weight": np.float32(1)}


def read_image(path: Path, size: int | tuple[int, int], channels: int) -> np.ndarray:
    """Decodes a file to the middle of the image, uint8 (rows, columns, channels), resized with antialiasing.

    Grey images of 16 or 32 bits keep their brightness; what is transparent has the colour that the file gives it.

    Args:
      path: of the file.
      size: (rows, columns), or one number for both.
      channels: 3 for colours, 1 for grey.

    Raises:
      DataError: if it is not an image, or is cut off.
    """
    from PIL import Image, ImageOps

    rows, columns = (size, size) if isinstance(size, int) else size
    try:
        with Image.open(path) as image:
            upright = _eight_bits(ImageOps.exif_transpose(image)).convert("RGB" if channels == 3 else "L")
            middle = ImageOps.fit(upright, (columns, rows), Image.Resampling.BICUBIC)
    except Exception as error:  # a broken file makes decoders raise anything: struct.error, KeyError, SyntaxError, ...
        expected = f"an image that pillow can decode ({', '.join(sorted(SUFFIXES))})"
        problem = f"cannot be decoded as an image ({error})"
        raise data_error(path, problem, expected=expected, get_it=f"{_GET_IT}; or remove the file") from error
    return np.asarray(middle, np.uint8).reshape(rows, columns, channels)


def _eight_bits(image: "Image.Image") -> "Image.Image":
    """Wider grey values brought to a byte, which Pillow's own conversion would cut off at 255."""
    from PIL import Image as images

    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, np.float64)
    top = 65535.0 if image.mode.startswith("I") else max(1.0, float(values.max(initial=0)))
    return images.fromarray(np.clip(values * 255 / top, 0, 255).astype(np.uint8))


def _classes(folder: Path) -> list[str]:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise data_error(folder, "holds no directories of classes", **_HELP)
    return classes


def _labelled(folder: Path, classes: list[str], may_lack: bool) -> list[tuple[Path, int]]:
    pairs = []
    for label, name in enumerate(classes):
        if may_lack and not (folder / name).is_dir():
            continue
        files = sorted(file for file in (folder / name).rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise data_error(folder / name, "holds no images", **_HELP)
        pairs += [(file, label) for file in files]
    return pairs
