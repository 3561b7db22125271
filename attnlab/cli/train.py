"""`attnlab train`: trains a configuration, or goes on with it."""

import dataclasses
import sys
from pathlib import Path

from attnlab import experiment
from attnlab.cli import configs, qualify
from attnlab.experiment import Experiment
from attnlab.training import NonFiniteError

EXPLANATION = """\
usage: attnlab train CONFIG [OPTIONS]

Trains a configuration: the name of one in experiments/, the path of a Python file with CONFIG or config(), or the
directory of an earlier run. Every setting is an option, such as --train.steps 100 or --model.mixer agent_attention.
The run is written to --out-dir (runs/NAME when not given); the same command again goes on from what is there."""


@dataclasses.dataclass(frozen=True)
class TrainOptions(Experiment):
    """Train a configuration, or go on with it.

    Attributes:
      out_dir: directory of the run; runs/NAME when None.
      dry_run: print the configuration, and do not train.
    """

    out_dir: str | None = None
    dry_run: bool = False


def run(arguments: list[str]) -> int:
    """Runs the command; see `attnlab train --help`."""
    name, rest = configs.take_name(arguments, "train", lambda: EXPLANATION)
    config = configs.load(name)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(Experiment)}
    default = TrainOptions(**fields)
    options = configs.parse(TrainOptions, rest, default, f"attnlab train {name}", "Every setting of the configuration.")
    chosen = Experiment(**{field: getattr(options, field) for field in fields})
    chosen.check()
    directory = configs.directory(options.out_dir or (name if Path(name).is_dir() else f"runs/{Path(name).stem}"))
    configs.show(chosen)
    print(f"out_dir = {str(directory)!r}\n", flush=True)
    if options.dry_run:
        return 0
    qualify.on_new_device()
    try:
        result = experiment.run(chosen, directory)
    except NonFiniteError as error:
        print(f"attnlab train: {error}", file=sys.stderr)
        return 1
    for split, metrics in result.metrics.items():
        print(f"{split}: {', '.join(f'{metric} {value:.4g}' for metric, value in metrics.items())}")
    print(f"{result.steps} steps in {result.seconds:.1f} s of training; checkpoints, settings and metrics: {directory}")
    return 0
