"""`attnlab show`: everything about one variant."""

import dataclasses
import inspect
from typing import Annotated, Any

import tyro

from attnlab import registry
from attnlab.cli.table import paper_url
from attnlab.contract import Site, TokenMixer


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
    cls, paper = variant.cls, variant.paper
    answers = {
        "kind": variant.kind.value,
        "paper": f"{paper.title}\n{paper.authors}, {paper.year}",
        "on arXiv": paper_url(paper) or "",
        "in the project's list": "" if paper.number is None else f"number {paper.number}",
        "checked against": variant.source.value,
        "authors' code": f"https://github.com/{variant.repository}" if variant.repository else "",
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "patterns": ", ".join(sorted(variant.patterns)),
        "layouts": ", ".join(sorted(variant.layouts)),
        "arguments of a call": "",
        "time": variant.cost.time,
        "memory": variant.cost.memory,
        "decode state": variant.cost.state or "",
        "kernel": kernel_path(variant.kernel),
    }
    if issubclass(cls, TokenMixer):
        accepts = getattr(cls, "accepts", frozenset())
        accepts = accepts if isinstance(accepts, frozenset) else frozenset()
        answers["arguments of a call"] = ", ".join(["x", *sorted(accepts)])
        answers["decode state"] = answers["decode state"] or "does not decode"
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


def constructor_options(cls: type) -> list[tuple[str, str, str, str]]:
    """Name, type, default, and meaning of every argument of a constructor; the meaning as its docstring has it."""
    from docstring_parser import parse

    documented = {p.arg_name: " ".join((p.description or "").split()) for p in parse(inspect.getdoc(cls) or "").params}
    told = {field.name for field in dataclasses.fields(Site)}
    options = []
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = "" if parameter.default is parameter.empty else _short(parameter.default)
        note = documented.get(name, "")
        if name in told and issubclass(cls, TokenMixer):
            note = f"{note} (a model fills it in)".strip()
        options.append((name, _type(parameter.annotation), default, note))
    return options


def _short(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)


def _type(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    for prefix in ("typing.", "collections.abc.", "flax.nnx.rnglib.", "attnlab.contract."):
        text = text.replace(prefix, "")
    return text


def _print(variant: registry.Variant) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    console.print(f"[bold]{variant.name}[/bold]: {variant.summary}\n")
    grid = Table.grid(padding=(0, 2))
    for name, answer in facts(variant).items():
        grid.add_row(Text(name, "cyan"), Text(answer))
    console.print(grid)
    console.print("\n[bold]Options[/bold]")
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("option", "type", "default", "meaning"):
        grid.add_column(column, no_wrap=column == "option")
    for cells in constructor_options(variant.cls):
        grid.add_row(*map(Text, cells))
    console.print(grid)
    for text in (inspect.getdoc(inspect.getmodule(variant.cls)), inspect.getdoc(variant.cls)):
        if text:
            console.rule(characters="─", style="dim")
            console.print(Text(text))
