"""`attnlab list`: the table of variants."""

import dataclasses
import sys
from typing import Literal

import tyro

from attnlab import registry
from attnlab.cli import table
from attnlab.contract import Layout, Pattern


@dataclasses.dataclass(frozen=True)
class ListOptions:
    """Print the registered variants: what they do, where they come from, what they support and cost.

    Attributes:
      kind: show only variants of this kind.
      pattern: show only variants that have this attention pattern.
      layout: show only variants that take tokens laid out so.
      names: print the names alone, one on a line.
      write_readme: write the table of all variants into README.md, between its two markers.
      check: fail if the table in README.md is not what --write-readme would write.
    """

    kind: str | None = None
    pattern: Literal["self", "causal-self", "cross", "causal-cross"] | None = None
    layout: Literal["sequence", "image", "video"] | None = None
    names: bool = False
    write_readme: bool = False
    check: bool = False


def run(arguments: list[str]) -> int:
    """Runs the command; see `attnlab list --help`."""
    options = tyro.cli(ListOptions, args=arguments, prog="attnlab list", config=(tyro.conf.FlagCreatePairsOff,))
    if options.write_readme or options.check:
        return _readme(check=options.check)
    variants = registry.variants(
        kind=options.kind,
        pattern=Pattern(options.pattern.replace("-", " ")) if options.pattern else None,
        layout=Layout(options.layout) if options.layout else None,
    )
    if options.names:
        print("\n".join(variant.name for variant in variants))
    else:
        _print(variants)
    return 0


def _readme(*, check: bool) -> int:
    path = table.readme_path()
    old = path.read_text()
    new = table.with_table(old, table.markdown(registry.variants()))
    if check:
        if old != new:
            print(f"{path.name}: the table of variants is stale; `make table` writes it anew", file=sys.stderr)
        return int(old != new)
    path.write_text(new)
    print(f"{path}: {'unchanged' if old == new else 'written'}")
    return 0


def _print(variants: tuple[registry.Variant, ...]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a file or a pipe has no width: do not fold
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.COLUMNS:
        grid.add_column(column, no_wrap=column == "name", style="bold" if column == "name" else "")
    for variant in variants:
        cells = list(table.row(variant))
        if url := table.paper_url(variant.paper):
            cells[2] = f"[link={url}]{cells[2]}[/link]"
        grid.add_row(*cells)
    console.print(grid)
    count = f"{len(variants)} variant{'' if len(variants) == 1 else 's'}"
    console.print(f"{count}; `attnlab show NAME` prints everything about one", highlight=False)
