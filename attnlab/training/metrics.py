"""What a run reports: lines of JSON, TensorBoard's files, and a live line on the terminal.

`metrics.jsonl` has one line per measurement:

    {"step": 200, "split": "train", "values": {"loss": 0.31, "accuracy": 0.91}, "time": 12.4}

`split` is "train" (the batch of that step), "eval" (the whole evaluation split) or "eval_ema" (the same with averaged
parameters); `time` is seconds spent on training steps until then, over all runs that were resumed, without compilation,
evaluation and saving.
"""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class MetricsLog:
    """Writes a run's measurements; `history` has them all, those of the runs before included.

    Args:
      directory: of `metrics.jsonl` and `tensorboard/`.
      step: at which the run begins. Lines after it, of a run that was stopped beyond its last checkpoint, are dropped,
        so that the curve has no step twice.
      tensorboard: whether to write TensorBoard's files.
      write: False on all processes but the first, which keep the history alone.
    """

    def __init__(self, directory: Path, step: int, *, tensorboard: bool = True, write: bool = True):
        path = directory / "metrics.jsonl"
        self.history = [record for record in read_metrics(path) if record["step"] <= step] if path.exists() else []
        self._file, self._board = None, None
        if not write:
            return
        shorter = path.with_suffix(".jsonl.new")
        shorter.write_text("".join(map(_line, self.history)))
        shorter.replace(path)
        self._file = path.open("a")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, split: str, values: Mapping[str, float], seconds: float) -> None:
        """Adds a measurement, on disk at once. What is not finite is text in the file: "nan", "inf", "-inf"."""
        record = {"step": step, "split": split, "values": dict(values), "time": round(seconds, 3)}
        self.history.append(record)
        if self._file is not None:
            self._file.write(_line(record))
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{split}/{name}", float(value), step)

    def last(self, split: str, step: int) -> dict[str, float] | None:
        """The values of a split at a step; None if it was not measured then."""
        for record in reversed(self.history):
            if (record["split"], record["step"]) == (split, step):
                return record["values"]
        return None

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _line(record: Record) -> str:
    """A record as a line of JSON, which has no words for what is not finite: there it is text."""
    values = {name: value if math.isfinite(value) else str(value) for name, value in record["values"].items()}
    return json.dumps(record | {"values": values}) + "\n"


def read_metrics(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`, all values numbers; a last line that was cut off in writing is left out.

    Raises:
      ValueError: for any other line that is not JSON, with its number.
    """
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append(record | {"values": {name: float(value) for name, value in record["values"].items()}})
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is not JSON: {line[:80]!r}") from error
    return records


class Stopwatch:
    """Seconds spent on training steps.

    Attributes:
      seconds: up to the last `stop`, over all resumed runs.
    """

    def __init__(self, seconds: float = 0.0):
        self.seconds, self._since = seconds, None

    def start(self) -> None:
        """Goes on counting; nothing happens if it does already."""
        self._since = time.perf_counter() if self._since is None else self._since

    def stop(self) -> None:
        """Ends counting until the next `start`."""
        self.seconds, self._since = self.read(), None

    def read(self) -> float:
        """Seconds until now."""
        return self.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)


class ProgressLine:
    """The state of training in one live line; on what is no terminal, a plain line every now and then.

    Args:
      total: steps of the whole training.
      step: at which it begins.
      units_per_step: examples or tokens of a step.
      unit: their name.
      show: False for silence, as on all processes but the first.
      every: seconds between plain lines.
    """

    def __init__(self, total: int, step: int, units_per_step: int, unit: str, *, show: bool = True, every: float = 20):
        self._total, self._first, self._units, self._unit = total, step, units_per_step, unit
        self._show, self._every, self._last = show, every, time.monotonic()
        self._progress = None
        if show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = ("{task.description}", BarColumn(None), "{task.completed}/{task.total}", "{task.fields[words]}")
            columns = [TextColumn(column) if isinstance(column, str) else column for column in columns]
            self._progress = Progress(*columns, console=Console(stderr=True), refresh_per_second=4, expand=True)
            self._task = self._progress.add_task("training", total=total, completed=step, words="compiling")
            self._progress.start()

    def update(self, step: int, loss: float, seconds: float) -> None:
        """Shows that `step` is done.

        Args:
          step: number of steps done.
          loss: of the latest batch.
          seconds: spent on the steps since the one at which this run began.
        """
        if not self._show:
            return
        pace = max(seconds, 1e-9) / max(step - self._first, 1)
        left = _clock(pace * (self._total - step))
        words = f"loss {loss:.4g} · {_si(self._units / pace)} {self._unit}/s · {left} left"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, words=words)
        elif time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self.say(f"step {step}/{self._total} · {words}")

    def say(self, message: str) -> None:
        """Prints a line of its own."""
        if self._progress is not None:
            self._progress.console.print(message, markup=False, highlight=False)
        elif self._show:
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the line as it stands."""
        if self._progress is not None:
            self._progress.stop()


def _si(value: float) -> str:
    """Three digits and a prefix: 12345 is 12.3k."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
