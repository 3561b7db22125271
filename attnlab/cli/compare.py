"""`attnlab compare`: the same model, data and seed under several mixers."""

import dataclasses
from pathlib import Path

from attnlab.cli import configs, qualify
from attnlab.compare import noise, runner
from attnlab.compare.report import beyond, columns, numbers
from attnlab.compare.results import Comparison
from attnlab.compare.size import Measure
from attnlab.experiment import Experiment

EXPLANATION = """\
usage: attnlab compare CONFIG --mixers NAME NAME ... [OPTIONS]

Trains a configuration (see `attnlab train --help`) once for each mixer, and writes results.json, figures and
report.html to --out-dir (runs/compare_NAME when not given). The same command again goes on from what is there;
a mixer that cannot be trained is reported with the reason. --seeds N trains each N times and says which differences
are within noise; --match parameters (or flops) adjusts widths so that all models are equally large. On a synthetic
task (`attnlab list --kind task`) accuracy is drawn against length, beyond that in training too: --task-lengths."""


@dataclasses.dataclass(frozen=True)
class CompareOptions(Experiment):
    """Compare mixers.

    Attributes:
      mixers: names of registered mixers.
      out_dir: directory of the comparison; runs/compare_NAME when None.
      title: of the report.
      lengths: numbers of tokens at which mixers are timed alone; usual ones when None.
      prompt: what language models continue in the report.
      sample_tokens: how far they continue it; 0 for no samples.
      task_lengths: numbers of tokens at which models of a synthetic task are evaluated besides; when None a half, 1, 2,
        4 and 8 times those in training.
      seeds: how many seeds each mixer is trained with, `train.seed` and those after it; from 2 on, means with their
        95 % intervals, and which differences are within noise.
      match: adjusts the width of each mixer's model so that it has as many parameters, or floating-point operations of
        a forward pass, as that of the first; all have the configured width when None.
    """

    mixers: tuple[str, ...] = ()
    out_dir: str | None = None
    title: str | None = None
    lengths: tuple[int, ...] | None = None
    prompt: str = runner.Options.prompt
    sample_tokens: int = runner.Options.sample_tokens
    task_lengths: tuple[int, ...] | None = None
    seeds: int = 1
    match: Measure | None = None


def run(arguments: list[str]) -> int:
    """Runs the command; see `attnlab compare --help`."""
    name, rest = configs.take_name(arguments, "compare", lambda: EXPLANATION)
    config = configs.load(name)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(Experiment)}
    default = CompareOptions(**fields)
    prog = f"attnlab compare {name}"
    options = configs.parse(CompareOptions, rest, default, prog, "Every setting of the comparison.")
    if not options.mixers:
        raise ValueError("--mixers is missing: name at least one registered mixer (`attnlab list --kind mixer`)")
    chosen = Experiment(**{field: getattr(options, field) for field in fields})
    directory = configs.directory(options.out_dir or f"runs/compare_{Path(name).stem}")
    configs.show(chosen)
    print(f"mixers = {options.mixers!r}\nout_dir = {str(directory)!r}\n", flush=True)
    qualify.on_new_device()
    section = runner.compare(
        chosen,
        options.mixers,
        directory,
        title=options.title or f"{Path(name).stem}: {len(options.mixers)} mixers",
        options=runner.Options(
            options.lengths,
            options.prompt,
            options.sample_tokens,
            seeds=options.seeds,
            match=options.match,
            task_lengths=options.task_lengths,
        ),
    )
    print_table(section.comparison)
    print(f"report: {directory / 'report.html'}")
    return int(all(entry.status == "failed" for entry in section.comparison.entries))


def print_table(comparison: Comparison) -> None:
    """Prints what the report's table says."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, emoji=False, highlight=False, width=120)
    grid = Table(box=box.SIMPLE_HEAD, title=comparison.title, title_justify="left", pad_edge=False)
    shown = [column for column in columns(comparison) if column[1]]
    grid.add_column("mixer", no_wrap=True)
    for title, _ in shown:
        grid.add_column(title, justify="right")
    for entry in comparison.ranked():
        if entry.status != "failed":
            grid.add_row(entry.mixer, *numbers(comparison, entry))
    console.print(grid)
    if ends := beyond(comparison):
        console.print(ends)
    if any(len(entry.seeds) > 1 for entry in comparison.entries):
        console.print(noise.sentences(comparison))
    for entry in comparison.entries:
        if entry.status == "failed":
            console.print(f"{entry.mixer} was not trained: {entry.reason}")
