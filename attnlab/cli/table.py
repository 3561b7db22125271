"""The table of variants, for the terminal and for the README."""

from collections.abc import Sequence
from pathlib import Path

from attnlab.registry import Kind, Paper, Variant

START = "<!-- variants:start (written by `make table`; do not edit by hand) -->"
END = "<!-- variants:end -->"
HEADINGS = {Kind.MIXER: "Token mixers", Kind.POOLING: "Poolings", Kind.BACKBONE: "Backbones"}
COLUMNS = ("name", "what it does", "paper", "patterns", "layouts", "time", "kernel", "checked against")


def paper_url(paper: Paper) -> str | None:
    """Address of the paper on arXiv, None where it is not there."""
    return f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else None


def row(variant: Variant) -> tuple[str, ...]:
    """The cells of `COLUMNS` as plain text."""
    return (
        variant.name,
        variant.summary,
        f"{variant.paper.authors.split(',')[0]} {variant.paper.year}",
        ", ".join(sorted(variant.patterns)),
        ", ".join(sorted(variant.layouts)),
        variant.cost.time,
        variant.kernel or "",
        variant.source.value,
    )


def markdown(variants: Sequence[Variant]) -> str:
    """The tables of the README, one for each kind, without markers."""
    parts = []
    for kind, heading in HEADINGS.items():
        chosen = [variant for variant in variants if variant.kind == kind]
        # Poolings and backbones have no patterns and layouts.
        empty = {i for i in range(len(COLUMNS)) if not any(row(variant)[i] for variant in chosen)}
        kept = [i for i in range(len(COLUMNS)) if i not in empty]
        lines = [_line([COLUMNS[i] for i in kept]), "|" + " --- |" * len(kept)]
        for variant in chosen:
            cells = [cell.replace("|", "\\|") for cell in row(variant)]
            cells[0] = f"`{variant.name}`"
            cells[2] = f"[{cells[2]}]({url})" if (url := paper_url(variant.paper)) else cells[2]
            cells[6] = f"`{variant.kernel}`" if variant.kernel else ""
            lines.append(_line([cells[i] for i in kept]))
        if chosen:
            parts.append(f"### {heading} ({len(chosen)})\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def with_table(readme: str, table: str) -> str:
    """The text of a README with `table` between its markers.

    Raises:
      ValueError: if the text does not hold both markers, once each and in order.
    """
    if readme.count(START) != 1 or readme.count(END) != 1 or readme.index(END) < readme.index(START):
        raise ValueError(f"the README must hold the line {START} and after it the line {END}, once each")
    before, _, rest = readme.partition(START)
    return f"{before}{START}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


def readme_path() -> Path:
    """The README of the checkout that this package is run from.

    Raises:
      FileNotFoundError: if the package was installed without one.
    """
    path = Path(__file__).resolve().parents[2] / "README.md"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no README there; the table is written in a checkout of the repository")
    return path
