"""`attnlab list`: the variants, by kind and family."""

import dataclasses
import itertools
from typing import Annotated

import tyro

from attnlab import registry
from attnlab.cli import describe

HOME = {  # the one family of a kind, which a heading need not repeat
    registry.Kind.POOLING: "pooling",
    registry.Kind.BACKBONE: "models",
    registry.Kind.OBJECTIVE: "objectives",
    registry.Kind.INTERVENTION: "interventions",
    registry.Kind.ANALYSIS: "analysis",
    registry.Kind.TASK: "tasks",
}
LEAST = 40  # columns of a summary, below which the paper gives way


@dataclasses.dataclass(frozen=True)
class ListOptions:
    """Print the registered variants, one on a line, by kind and family.

    Attributes:
      words: show only variants that have all of these words in name, summary or paper.
      kind: show only this kind: mixer, pooling, backbone, module, function, objective, intervention, analysis or task.
      family: show only those of this family, such as dense, linear, local, sparse or mixers.
      pattern: show only those with this attention pattern: self, causal-self, cross or causal-cross.
      layout: show only those that take tokens laid out so: sequence, image or video.
      source: show only those that were checked against this: authors-code, third-party-code, paper-text, abstract-only.
      kernel: show only those that this op of pallas_kernels computes.
      names: print the names alone.
    """

    words: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    kind: str = ""
    family: str = ""
    pattern: str = ""
    layout: str = ""
    source: str = ""
    kernel: str = ""
    names: bool = False


def run(arguments: list[str]) -> int:
    """Runs the command; see `attnlab list --help`."""
    options = tyro.cli(ListOptions, args=arguments, prog="attnlab list", config=(tyro.conf.FlagCreatePairsOff,))
    sources = {source.replace(" ", "-").replace("'", ""): source for source in registry.Source}
    variants = registry.variants(
        kind=options.kind or None,
        family=options.family or None,
        pattern=options.pattern.replace("-", " ") or None,
        layout=options.layout or None,
        source=sources.get(options.source, options.source) or None,
        kernel=options.kernel or None,
        search=" ".join(options.words),
    )
    if options.names:
        print("\n".join(variant.name for variant in variants))
    else:
        _print(variants)
    return 0


def groups(variants: tuple[registry.Variant, ...]) -> list[tuple[registry.Kind, str, list[registry.Variant]]]:
    """The variants of each kind and family, kinds in their own order, families and names in alphabetical order."""
    order = list(registry.Kind)

    def place(variant: registry.Variant) -> tuple[int, str]:
        return order.index(variant.kind), variant.family

    ordered = sorted(variants, key=lambda variant: (*place(variant), variant.name))
    return [(order[kind], family, list(group)) for (kind, family), group in itertools.groupby(ordered, key=place)]


def heading(kind: registry.Kind, family: str) -> str:
    """The kind, and the family where the kind has several."""
    return kind.value if HOME.get(kind) == family else f"{kind}: {family}"


def _print(variants: tuple[registry.Variant, ...]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    # A file or a pipe has no width: nothing is cut there.
    width = console.width if console.is_terminal else 10_000
    name_width = max((len(variant.name) for variant in variants), default=0)
    paper_width = max((len(describe.paper_short(variant.paper)) for variant in variants), default=0)
    summary_width = width - name_width - paper_width - 6
    if summary_width < LEAST:
        summary_width, paper_width = width - name_width - 4, 0
    summary_width = min(summary_width, max((len(variant.summary) for variant in variants), default=0))
    for kind, family, group in groups(variants):
        console.print(Text(heading(kind, family), "bold cyan"))
        for variant in group:
            line = Text.assemble("  ", (f"{variant.name:{name_width}}", "bold"), "  ")
            summary = Text(variant.summary)
            summary.truncate(max(summary_width, 1), overflow="ellipsis", pad=paper_width > 0)
            line.append_text(summary)
            if paper_width:
                url = describe.paper_url(variant.paper)
                line.append("  ").append(describe.paper_short(variant.paper), f"link {url}" if url else "dim")
            console.print(line, no_wrap=True, crop=False, soft_wrap=True)
            if sizes := describe.sizes_of(variant):
                below = Text(", ".join(sizes), "dim")
                if console.is_terminal:
                    console.print(Padding(below, (0, 0, 0, 4)))
                else:
                    console.print(Text("    ") + below, soft_wrap=True)
    if variants:
        console.print()
    if any(variant.kind is registry.Kind.BACKBONE for variant in variants):
        console.print("below a backbone its named sizes: `attnlab.models.create(NAME, num_classes=…)`")
    count = f"{len(variants)} variant{'' if len(variants) == 1 else 's'}"
    console.print(f"{count}; `attnlab show NAME` prints everything about one")
