"""`attnlab compare`: the same model, data and seed under several mixers."""

import dataclasses
from pathlib import Path

from attnlab.cli import configs, qualify
from attnlab.compare import runner
from attnlab.compare.report import columns, numbers
from attnlab.compare.results import Comparison
from attnlab.experiment import Experiment

EXPLANATION = """\
usage: attnlab compare CONFIG --mixers NAME NAME ... [OPTIONS]

Trains a configuration (see `attnlab train --help`) once for each mixer, and writes results.json, figures and
report.html to --out-dir (runs/compare_NAME when not given). The same command again goes on from what is there;
a mixer that cannot be trained is reported with the reason."""


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
    """

    mixers: tuple[str, ...] = ()
    out_dir: str | None = None
    title: str | None = None
    lengths: tuple[int, ...] | None = None
    prompt: str = runner.Options.prompt
    sample_tokens: int = runner.Options.sample_tokens


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
        options=runner.Options(options.lengths, options.prompt, options.sample_tokens),
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
    for entry in comparison.entries:
        if entry.status == "failed":
            console.print(f"{entry.mixer} was not trained: {entry.reason}")
