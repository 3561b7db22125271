"""Datasets, deterministic and resumable to the example, read through grain.

A source is a small frozen dataclass of settings, so that a configuration can hold it; `open` gives its `Dataset`:

    dataset = attnlab.data.open("digits", augment=attnlab.data.Augment(padding=1))
    dataset.info                                      # kind, sizes, classes or vocabulary, digest
    batches = dataset.train(batch_size=128, seed=0)   # without end, shuffled anew in every epoch
    batch = next(batches)                             # {"image": (128, 8, 8, 1), "label": (128,), "weight": (128,)}
    state = batches.get_state()                       # a dict for JSON; `set_state` continues to the example
    for batch in dataset.eval(batch_size=128): ...    # every example once; blank ones of weight 0 fill the last batch

Batches of images hold `image` float32 (B, H, W, C), `label` int32 (B,) and `weight` float32 (B,). Batches of text hold
`inputs` and `targets` int32 (B, N) and `weight` float32 (B, N), packed text also `segment_ids` and `positions` int32
(B, N); `sequence_length=N` is then an argument of `train` and `eval`. See `attnlab.data.text`. Batches of vectors hold
`inputs` float32 (B, N, F), `targets` float32 (B, R) and `weight` float32 (B,). Batches of image pairs hold `image`
float32 (B, H, W, C), `target` float32 (B, f·H, f·W, C), `weight` float32 (B,), and maybe `labels` int32 (B, H, W).

Grain, scikit-learn and pillow are imported when they are first needed.
"""

import dataclasses
from typing import Any

from attnlab.data.cifar10 import Cifar10
from attnlab.data.dataset import Batch, Batches, Dataset, DatasetInfo, Loading
from attnlab.data.degraded import DegradedImages
from attnlab.data.digits import Digits
from attnlab.data.errors import DataError
from attnlab.data.folder import ImageFolder
from attnlab.data.images import Augment
from attnlab.data.npz import NpzImages
from attnlab.data.stdlib_text import StdlibText
from attnlab.data.tasks import TaskData
from attnlab.data.text import TextFiles
from attnlab.suggest import suggestion

Source = Digits | Cifar10 | NpzImages | ImageFolder | StdlibText | TextFiles | TaskData | DegradedImages

SOURCES: dict[str, type[Source]] = {
    source.name: source
    for source in (Digits, Cifar10, NpzImages, ImageFolder, StdlibText, TextFiles, TaskData, DegradedImages)
}

__all__ = [
    "SOURCES",
    "Augment",
    "Batch",
    "Batches",
    "Cifar10",
    "DataError",
    "Dataset",
    "DatasetInfo",
    "DegradedImages",
    "Digits",
    "ImageFolder",
    "Loading",
    "NpzImages",
    "Source",
    "StdlibText",
    "TaskData",
    "TextFiles",
    "open",
]


def open(source: Source | str, **settings: Any) -> Dataset:
    """Opens a source.

    Args:
      source: settings of a source, or its name in `SOURCES`.
      **settings: fields of the source that differ from what `source` says.

    Raises:
      KeyError: for a name that no source has, with the nearest ones.
      TypeError: for a setting that the source does not have, with the nearest ones.
      DataError: if a file or directory is missing or broken.
    """
    if isinstance(source, str):
        if source not in SOURCES:
            raise KeyError(f"no data source is called {source!r}: {suggestion(source, SOURCES)}")
        source = SOURCES[source]()
    fields = [field.name for field in dataclasses.fields(source)]
    for name in settings:
        if name not in fields:
            raise TypeError(f"{source.name} has no setting {name!r}: {suggestion(name, fields)}")
    return dataclasses.replace(source, **settings).open()
