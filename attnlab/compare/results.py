"""What a comparison found, as plain data that JSON can hold."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from attnlab.decode_size import DecodeSize

Point = tuple[int, float]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median time of one mixer, alone, on one sequence of `tokens` tokens.

    Attributes:
      tokens: N.
      forward_ms: of a call, milliseconds.
      gradient_ms: of a call and its gradient with respect to parameters and tokens, milliseconds.
    """

    tokens: int
    forward_ms: float
    gradient_ms: float


@dataclasses.dataclass(frozen=True)
class Sample:
    """Text that a model wrote: `text` follows `prompt`."""

    prompt: str
    text: str


@dataclasses.dataclass(frozen=True)
class SeedResult:
    """What one seed gave; fields as in `Entry`."""

    seed: int
    quality: float
    train_curve: tuple[Point, ...] = ()
    eval_curve: tuple[Point, ...] = ()


@dataclasses.dataclass(frozen=True)
class Entry:
    """One mixer of a comparison.

    Attributes:
      mixer: registered name.
      status: "done", or "failed" with the `reason`.
      reason: why it failed, in a sentence.
      parameters: of the whole model.
      quality: accuracy in [0, 1], or bits per byte; of the averaged weights where training averages them.
      loss: mean cross-entropy on the evaluation split, nats.
      steps: optimizer steps taken.
      seconds: spent in training steps, compilation and evaluation left out.
      steps_per_second: in training, compilation and evaluation left out.
      items_per_second: images or tokens, in training.
      step_bytes: memory that one training step needs beyond its arguments, as the compiler plans it.
      decode_state: bytes that a token costs in all layers when decoding, in bfloat16 caches, and bytes at any length;
        None for models that do not decode.
      train_curve: (step, training loss).
      eval_curve: (step, quality).
      timings: time against length.
      lengths: (tokens, quality) on a synthetic task at other lengths than in training.
      beyond: why these end before the longest that was asked for; empty where they do not.
      sample: what the model wrote, for text.
      width: channels of its model, where mixers are compared at equal size.
      flops: operations of a forward pass on one example, where mixers are compared at an equal number of them.
      seeds: the result of each seed; `quality`, `loss` and rates are means over them, the rest is the first one's.
      half_width: of the 95 % interval of the mean quality; None of one seed.
    """

    mixer: str
    status: Literal["done", "failed"]
    reason: str = ""
    parameters: int | None = None
    quality: float | None = None
    loss: float | None = None
    steps: int = 0
    seconds: float | None = None
    steps_per_second: float | None = None
    items_per_second: float | None = None
    step_bytes: int | None = None
    decode_state: DecodeSize | None = None
    train_curve: tuple[Point, ...] = ()
    eval_curve: tuple[Point, ...] = ()
    timings: tuple[Timing, ...] = ()
    lengths: tuple[Point, ...] = ()
    beyond: str = ""
    sample: Sample | None = None
    width: str | None = None
    flops: int | None = None
    seeds: tuple[SeedResult, ...] = ()
    half_width: float | None = None


class Quality(NamedTuple):
    """What mixers are compared by.

    Attributes:
      metric: of the evaluation.
      name: in words.
      unit: behind a number in a sentence.
      factor: from the metric to that unit.
      digits: behind the point.
      more_is_better: whether it is.
      items: what a rate counts.
    """

    metric: str
    name: str
    unit: str
    factor: float
    digits: int
    more_is_better: bool
    items: str


QUALITIES = {
    "image": Quality("accuracy", "test accuracy", " %", 100, 1, True, "images"),
    "text": Quality("bits_per_byte", "bits per byte", "", 1, 3, False, "tokens"),
    "task": Quality("accuracy", "test accuracy", " %", 100, 1, True, "tokens"),
    "vectors": Quality("loss", "squared error", "", 1, 4, False, "examples"),
    "image pairs": Quality("psnr", "PSNR", " dB", 1, 2, True, "images"),
}
"""By the kind of data; "task" is text of a synthetic task, which is solved or not."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The same model, data and seed under several mixers.

    Attributes:
      title: of the report.
      kind: of the data, a key of `QUALITIES`.
      data: facts about the dataset, in words.
      setting: facts about model and training, in words.
      machine: facts about the machine, in words.
      config: the whole configuration, as saved beside the checkpoints.
      entries: one for each mixer, in the order asked for.
    """

    title: str
    kind: str
    data: dict[str, str]
    setting: dict[str, str]
    machine: dict[str, str]
    config: dict[str, Any]
    entries: tuple[Entry, ...]

    @property
    def measured(self) -> Quality:
        """What the quality of an entry is."""
        return QUALITIES[self.kind]

    @property
    def quality_label(self) -> str:
        return f"{self.measured.name} (%)" if self.measured.unit else self.measured.name

    @property
    def items(self) -> str:
        """What `items_per_second` counts."""
        return self.measured.items

    def quality_number(self, quality: float) -> float:
        """A quality in the unit of `quality_label`."""
        return self.measured.factor * quality

    @property
    def trained_length(self) -> int | None:
        """Tokens of an example in training, where examples are sequences of tokens."""
        return self.config.get("task", {}).get("sequence_length")

    def ranked(self) -> tuple[Entry, ...]:
        """Entries from the best quality to the worst; those without one come last."""
        sign = -1 if self.measured.more_is_better else 1
        return tuple(sorted(self.entries, key=lambda e: (e.quality is None, sign * (e.quality or 0.0))))


def save(comparison: Comparison, path: Path) -> None:
    """Writes `results.json`, whole or not at all."""
    write_text(path, json.dumps(dataclasses.asdict(comparison), indent=1) + "\n")


def load(path: Path) -> Comparison:
    """Reads what `save` wrote."""
    raw = json.loads(path.read_text())
    return Comparison(**raw | {"entries": tuple(map(entry_from, raw["entries"]))})


def entry_from(raw: dict[str, Any]) -> Entry:
    """An entry from `dataclasses.asdict` of it, by way of JSON."""
    size = raw.get("decode_state")
    changed = {
        "decode_state": None if size is None else DecodeSize(*size),
        "train_curve": tuple(map(tuple, raw["train_curve"])),
        "eval_curve": tuple(map(tuple, raw["eval_curve"])),
        "timings": tuple(Timing(**timing) for timing in raw["timings"]),
        "lengths": tuple(map(tuple, raw.get("lengths", ()))),
        "sample": Sample(**raw["sample"]) if raw["sample"] else None,
        "seeds": tuple(_seed_from(result) for result in raw.get("seeds", ())),
    }
    return Entry(**raw | changed)


def _seed_from(raw: dict[str, Any]) -> SeedResult:
    return SeedResult(**raw | {name: tuple(map(tuple, raw[name])) for name in ("train_curve", "eval_curve")})


def write_text(path: Path, text: str) -> None:
    """Writes a file so that an interruption leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)
