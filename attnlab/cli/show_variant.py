"""`attnlab show`: everything about one variant."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from attnlab import registry
from attnlab.cli import describe


@dataclasses.dataclass(frozen=True)
class ShowOptions:
    """Print everything about one variant: paper, equations, options, patterns, decode state, cost, kernel.

    Attributes:
      name: of the variant, as `attnlab list` prints it.
    """

    name: Annotated[str, tyro.conf.Positional]


def run(arguments: list[str]) -> int:
    """Runs the command; see `attnlab show --help`."""
    options = tyro.cli(ShowOptions, args=arguments, prog="attnlab show")
    _print(registry.get(options.name))
    return 0


def facts(variant: registry.Variant) -> dict[str, str]:
    """What is known of a variant, in words, in the order of printing."""
    paper = variant.paper
    answers = {
        "kind": variant.kind.value,
        "family": variant.family,
        "paper": f"{paper.title}\n{paper.authors}, {paper.year}",
        "on arXiv": describe.paper_url(paper) or "",
        "in the project's list": "" if paper.number is None else f"number {paper.number}",
        "checked against": variant.source.value,
        "repository": f"https://github.com/{variant.repository}" if variant.repository else "",
        "class" if isinstance(variant.target, type) else "function": describe.address(variant),
        "file": _nearby(describe.source_file(variant)),
        **describe.calls(variant),
        "patterns": ", ".join(sorted(variant.patterns)),
        "layouts": ", ".join(sorted(variant.layouts)),
        "time": variant.cost.time,
        "memory": variant.cost.memory,
        "decode state": describe.decode_state(variant),
        "cache": describe.token_bytes(variant),
        "kernel": kernel_path(variant.kernel),
    }
    return {name: answer for name, answer in answers.items() if answer}


def kernel_path(op: str | None) -> str:
    """Which op carries a variant, and which of its implementations run on this machine."""
    if op is None:
        return "plain XLA"
    import pallas_kernels.dispatch

    if op not in pallas_kernels.dispatch.ops():
        return f"pallas_kernels.{op}"
    usable = [choice.name for choice in pallas_kernels.dispatch.explain(op) if choice.ok]
    return f"pallas_kernels.{op}; on this machine: {', '.join(usable) or 'none'} (`attnlab doctor` says why)"


def _nearby(path: Path) -> str:
    """The path as seen from here, where that is shorter."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _print(variant: registry.Variant) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    console.print(Text.assemble((variant.name, "bold"), ": ", variant.summary, "\n"))
    grid = Table.grid(padding=(0, 2))
    for name, answer in facts(variant).items():
        grid.add_row(Text(name, "cyan", no_wrap=True), Text(answer))
    console.print(grid)
    if found := describe.options(variant.target):
        console.print("\n[bold]Options[/bold]" if isinstance(variant.target, type) else "\n[bold]Arguments[/bold]")
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        grid.add_column("option", no_wrap=True)
        grid.add_column("type", max_width=36)
        grid.add_column("default")
        grid.add_column("meaning")
        for option in found:
            grid.add_row(*map(Text, (option.name, option.type, option.default, option.meaning)))
        console.print(grid)
    for text in (describe.equations(variant), describe.prose(variant)):
        if text:
            console.rule(characters="─", style="dim")
            console.print(Text(text))
