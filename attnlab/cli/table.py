"""The tables of variants in the README, one for each family."""

from collections.abc import Sequence

from attnlab.cli import describe
from attnlab.cli.list_variants import groups, heading
from attnlab.registry import Kind, Variant

START = "<!-- variants:start (written by `make table`; do not edit by hand) -->"
END = "<!-- variants:end -->"
PLURAL = {Kind.ANALYSIS: "analyses"}
COLUMNS = ("name", "what it does", "paper", "checked against")


def markdown(variants: Sequence[Variant]) -> str:
    """The tables of the README, one for each family, without markers."""
    parts = []
    for kind, family, group in groups(tuple(variants)):
        title = heading(kind, family).replace(kind, PLURAL.get(kind, f"{kind}s"), 1)
        rows = "\n".join(line([f"[`{v.name}`](docs/mechanisms/{v.name}.md)", *_cells(v)]) for v in group)
        parts.append(f"### {title[0].upper()}{title[1:]}\n\n{line(COLUMNS)}\n|{' --- |' * len(COLUMNS)}\n{rows}")
    return "\n\n".join(parts)


def _cells(variant: Variant) -> list[str]:
    paper, url = describe.paper_short(variant.paper), describe.paper_url(variant.paper)
    return [cell(variant.summary), f"[{paper}]({url})" if url else paper, variant.source.value]


def cell(text: str) -> str:
    """Text for one cell of a table in Markdown."""
    return text.replace("|", "\\|").replace("\n", " ")


def line(cells: Sequence[str]) -> str:
    """A row of a table in Markdown."""
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
