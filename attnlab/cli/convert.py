"""`attnlab convert`: makes another model of the language model of a run, with most of its weights."""

import sys

import tyro

from attnlab.cli import qualify
from attnlab.convert import runner

EXPLANATION = """\
usage: attnlab convert RUN_DIR [--to TARGET] [OPTIONS]

Makes another model of a trained language model, with most of its weights; prints its quality before, after conversion
and after fine-tuning, and writes a run for `attnlab generate` and `attnlab train` to --out-dir (RUN_DIR_TARGET when not
given). The same command again goes on from what is there."""


def run(arguments: list[str]) -> int:
    """Runs the command; see `attnlab convert --help`."""
    if not arguments or arguments in (["-h"], ["--help"]):
        stream = sys.stdout if arguments else sys.stderr
        print(f"{EXPLANATION}\n\nTargets: {', '.join(runner.targets())}", file=stream)
        print("`attnlab convert --to TARGET --help` prints every option of one.", file=stream)
        return 0 if arguments else 2
    target = runner.target(chosen(arguments, default=runner.ConvertOptions.to))
    options = tyro.cli(target.Options, args=arguments, prog="attnlab convert")
    qualify.on_new_device()
    report = runner.convert(options)
    print_table(report)
    print(f"the converted model: {report.directory}")
    return 0


def chosen(arguments: list[str], default: str) -> str:
    """What follows `--to`."""
    for index, argument in enumerate(arguments):
        if argument.startswith("--to="):
            return argument.removeprefix("--to=")
        if argument == "--to" and index + 1 < len(arguments):
            return arguments[index + 1]
    return default


def print_table(report: runner.Report) -> None:
    """Prints the metrics of each stage."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("", no_wrap=True)
    for name in next(iter(report.quality.values())):
        grid.add_column(name.replace("_", " "), justify="right")
    for stage, metrics in report.quality.items():
        grid.add_row(stage, *(f"{value:.4g}" for value in metrics.values()))
    Console(markup=False, emoji=False, highlight=False).print(grid)
