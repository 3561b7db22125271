"""What `attnlab predict` and `attnlab attend` share: a classifier by name or of a run, and the images it is shown."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro


@dataclasses.dataclass(frozen=True)
class ClassifierOptions:
    """Which classifier looks at which images.

    Attributes:
      images: files that Pillow can read; colours, grey, palettes and transparency alike.
      model: a name that `attnlab list --kind backbone` prints, or the directory of a run of `attnlab train`.
      weights: a file in the layout of the authors' code or of timm, safetensors or of torch.save; a run has its own.
      num_classes: logits of the weights.
      image_size: pixels on a side; the model's own when None.
      crop: share of the resized image's sides that the middle takes; 0.875, and all of it for a run, when None.
      mean: of each channel in [0, 1]; ImageNet's, or as a run was trained, when None.
      std: of each channel; the same.
      key: where the state dict stands in a file of torch.save that holds more.
    """

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    model: str
    weights: str | None = None
    num_classes: int = 1000
    image_size: int | None = None
    crop: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    key: str | None = None


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model, what brings images to it, and the names of its classes as far as they are known."""

    model: Any
    preprocess: Any
    class_names: Sequence[str] = ()


def classifier(options: ClassifierOptions, *, drawn: bool = False) -> Classifier:
    """Builds the classifier that was asked for.

    Args:
      options: of the command.
      drawn: whether a named model may do without weights.

    Raises:
      FileNotFoundError, KeyError, ValueError, attnlab.interop.names.StateDictError: for what does not fit.
    """
    if not options.images:
        raise ValueError("images: name at least one file")
    if Path(options.model).is_dir():
        return _of_run(options)
    if options.weights is None and not drawn:
        raise ValueError(f"--weights is missing: without them {options.model} knows no classes")
    from attnlab.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
    from attnlab.models import create

    model = create(
        options.model,
        num_classes=options.num_classes,
        weights=options.weights,
        image_size=options.image_size,
        key=options.key,
    )
    grey = model.image_shape[-1] == 1
    preprocess = Preprocess(
        _size(model, options),
        0.875 if options.crop is None else options.crop,
        options.mean or ((0.5,) if grey else IMAGENET_MEAN),
        options.std or ((0.5,) if grey else IMAGENET_STD),
        model.image_shape[-1],
    )
    return Classifier(model, preprocess)


def _of_run(options: ClassifierOptions) -> Classifier:
    from attnlab import experiment
    from attnlab.data.preprocess import Preprocess

    for name in ("weights", "image_size", "key"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: the run in {options.model} has its own")
    config, info = experiment.load(options.model)
    if info.image_shape is None or info.num_classes is None:
        raise ValueError(f"{options.model} holds a model on {info.name}, no classifier of images")
    model = experiment.load_trained(options.model)
    scale = (0.5,) if getattr(config.data, "scale", "unit") == "symmetric" else None
    rows, columns, channels = info.image_shape
    preprocess = Preprocess(
        (rows, columns),
        1.0 if options.crop is None else options.crop,
        options.mean or scale or (0.0,),
        options.std or scale or (1.0,),
        channels,
    )
    return Classifier(model, preprocess, info.class_names)


def _size(model: Any, options: ClassifierOptions) -> tuple[int, int]:
    rows, columns, _ = model.image_shape
    if rows is None or columns is None:
        side = options.image_size
        return getattr(model, "image_size", (224, 224)) if side is None else (side, side)
    return rows, columns


def read(options: ClassifierOptions, preprocess: Any) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
    """Each file's path, the image as it is shown and as the model takes it; broken ones are named on standard error."""
    from attnlab.data import DataError

    for name in options.images:
        path = Path(name)
        try:
            shown, standardised = preprocess(path)
        except (DataError, OSError) as error:
            print(f"attnlab: {error}", file=sys.stderr)
        else:
            yield path, shown, standardised
