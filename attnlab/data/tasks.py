"""Synthetic tasks as a data set: nothing is stored, each example is made when it is asked for.

A task is a registered frozen dataclass with `sample(generator, batch)` and `oracle(inputs)`, see `attnlab.tasks`.
Example i of a split is drawn with a generator of its own, seeded by the split, i and `seed`: it is the same in every
epoch, in every process and on every machine, and the splits share none.
"""

import ast
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from attnlab.data.dataset import SPLITS, Dataset, DatasetInfo, Example, Loading, Split
from attnlab.suggest import suggestion


@dataclasses.dataclass(frozen=True)
class TaskData:
    """Examples of a registered task, as its attributes say.

    With `vocab_size` and `length` they are text, `inputs` and `targets` int32 (N,). With `image_shape` and
    `class_names` they are images with a `label`, and `caption` int32 (T,) beside them. With `token_features`,
    `responses` and `length` they are vectors, `inputs` float32 (N, F) and `targets` float32 (R,).

    Attributes:
      task: name of the task, as `attnlab list --kind task` prints it.
      options: its settings, each as `name=value`: `("vocab_size=32",)`.
      train_size: examples of the training split.
      eval_size: examples of the evaluation split.
      seed: another one gives other examples, 0 to 2**32 - 1.
      loading: threads and processes.
    """

    name: ClassVar[str] = "task"

    task: str = ""
    options: tuple[str, ...] = ()
    train_size: int = 65536
    eval_size: int = 1024
    seed: int = 0
    loading: Loading = dataclasses.field(default_factory=Loading)

    def open(self) -> Dataset:
        """The data set; of text, its `sequence_length` becomes the task's `length`.

        Raises:
          KeyError: for a name that no task has, with the nearest ones.
          ValueError: for a setting out of range, one that the task does not have, or a task of another kind.
        """
        from attnlab import registry

        known = registry.names(kind=registry.Kind.TASK)
        if self.task not in known:
            raise KeyError(f"no task is called {self.task!r}: {suggestion(self.task, known)}")
        return open_task(registry.get(self.task).cls, self)


def open_task(cls: type, source: TaskData) -> Dataset:
    """The data set of a task by its class.

    Raises:
      ValueError: as `TaskData.open`.
    """
    for setting in ("train_size", "eval_size"):
        if getattr(source, setting) < 1:
            raise ValueError(f"{setting} must be at least 1, got {getattr(source, setting)}")
    if not 0 <= source.seed < 2**32:
        raise ValueError(f"seed must lie in 0..2**32 - 1, got {source.seed}")
    settings = _settings(cls, source.options)
    task = cls(**settings)
    facts_of_kind = _facts(task)
    facts = f"{cls.__module__}.{cls.__qualname__} {sorted(settings.items())} {source.seed} {source.train_size}"
    info = DatasetInfo(
        name=source.name,
        train_size=source.train_size * (task.length if facts_of_kind["kind"] == "text" else 1),
        eval_size=source.eval_size * (task.length if facts_of_kind["kind"] == "text" else 1),
        digest=hashlib.sha256(f"{facts} {source.eval_size}".encode()).hexdigest(),
        **facts_of_kind,
        details={"task": source.task or cls.__name__} | {name: str(value) for name, value in settings.items()},
    )
    sizes = {"train": source.train_size, "eval": source.eval_size}

    def examples(split: Split, length: int | None) -> Sequence[Example]:
        sized = task if length is None else dataclasses.replace(task, length=length)
        return _Examples(sized, sizes[split], (source.seed, SPLITS.index(split)))

    return Dataset(info, examples, None, source.loading)


def _facts(task: Any) -> dict[str, Any]:
    """What the data set says of the task's examples, by its attributes."""

    def has(*names: str) -> bool:
        return all(hasattr(task, name) for name in names)

    if has("image_shape", "class_names"):
        names = tuple(task.class_names)
        shape = tuple(task.image_shape)
        return {"kind": "image", "image_shape": shape, "num_classes": len(names), "class_names": names}
    if has("token_features", "responses", "length"):
        return {"kind": "vectors", "token_features": task.token_features, "responses": task.responses}
    if has("vocab_size", "length"):
        return {"kind": "text", "vocab_size": task.vocab_size}
    raise ValueError(
        f"{type(task).__name__} must have vocab_size and length, or image_shape and class_names, or token_features, "
        f"responses and length"
    )


class _Examples(Sequence[Example]):
    """Examples by index."""

    def __init__(self, task: Any, size: int, seed: tuple[int, int]):
        self._task, self._size, self._seed = task, size, seed

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Example:
        if not 0 <= index < self._size:
            raise IndexError(f"example {index} of {self._size}")
        batch = self._task.sample(np.random.default_rng((*self._seed, int(index))), 1)
        example = {name: array[0] for name, array in batch.items()}
        if hasattr(self._task, "image_shape"):
            image, label, caption = (example[name] for name in ("inputs", "label", "targets"))
            return {"image": image, "label": label, "weight": np.float32(1), "caption": caption}
        return example


def _settings(cls: type, options: Sequence[str]) -> dict[str, Any]:
    fields = [field.name for field in dataclasses.fields(cls)]
    settings = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals:
            raise ValueError(f"options are name=value, got {option!r}")
        if name not in fields:
            raise ValueError(f"{cls.__name__} has no setting {name!r}: {suggestion(name, fields)}")
        try:
            settings[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            settings[name] = text
    return settings
