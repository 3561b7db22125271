"""`attnlab new`: writes the skeleton of a mechanism, its description and its test in the right places.

What it writes is a working toy, registered and documented: the conformance suite passes on it from the first minute,
and the mechanism takes its place piece by piece.
"""

import dataclasses
import keyword
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import tyro

from attnlab import registry
from attnlab.cli import checkout
from attnlab.suggest import suggestion

ATTENTION = ("dense", "linear", "local", "sparse", "cross", "multimodal", "graph")
FAMILIES = {  # of a kind that stands in several; the first one unless another is asked for
    "mixer": (*ATTENTION, "mixers"),
    "module": ("multimodal", *(family for family in ATTENTION if family != "multimodal"), "nn"),
    "function": ("nn", *ATTENTION),
    "pooling": ("pooling",),
    "objective": ("objectives",),
    "intervention": ("interventions",),
    "analysis": ("analysis",),
    "task": ("tasks",),
}
MIXERS = {"dense": "dense", "cross": "dense", "linear": "linear"}  # bases with a skeleton of their own
SOURCES = {source.replace(" ", "-").replace("'", ""): source for source in registry.Source}
TOY_PAPER = 'PAPER = Paper("Title of the paper", "First et al.", 2026)'
TOY_SOURCE = "    source=Source.PAPER_TEXT,\n"

DESCRIPTION = '''\
"""The official classes of {repository} and their arrays."""

from {module} import {symbol}
from attnlab.interop.official import Official, options

OFFICIAL = [
    # The class over there, ours, the names of arguments, then of arrays; see `attnlab.interop.official`.
    Official("{symbol}", {symbol}, options()),
]
'''
ADAPTER = '''\
"""Golden adapter of `{name}`."""

from attnlab.interop.{name} import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
'''


@dataclasses.dataclass(frozen=True)
class NewOptions:
    """Write a working toy of the given kind, to be replaced by a mechanism: its file, description and test.

    Attributes:
      kind: mixer, pooling, module, function, objective, intervention, analysis or task.
      name: the paper's slug, in lower case, digits and underscores; or `slug.word` for what else comes from a paper
        that is there, which gets no description and adapter of its own.
      family: where a mixer, module or function stands: dense, linear, local, sparse, cross, multimodal or graph; mixers
        for a mixer that is not attention; nn for a module or function that many share.
      source: what it will be checked against: authors-code, third-party-code, paper-text or abstract-only. For
        the first two a description of the official classes is written too, and an adapter of golden cases.
      repository: the code that it will be checked against, owner/name.
      title: of the paper.
      authors: of the paper, such as "First et al.".
      year: of the paper.
      arxiv: number of the paper on arXiv, such as 2401.04658.
      number: row of the paper in the project's list.
    """

    kind: Annotated[str, tyro.conf.Positional]
    name: Annotated[str, tyro.conf.Positional]
    family: str = ""
    source: str = "authors-code"
    repository: str = ""
    title: str = "Title of the paper"
    authors: str = "First et al."
    year: int = 2026
    arxiv: str = ""
    number: int | None = None


def run(arguments: list[str]) -> int:
    """Runs the command; see `attnlab new --help`."""
    options = tyro.cli(NewOptions, args=arguments, prog="attnlab new")
    root, written = checkout.root(), files(options)
    if options.name in registry.names():
        raise ValueError(
            f"the name {options.name!r} is taken by {registry.get(options.name).target.__module__}; what else comes "
            f"from that paper is called '{options.name.partition('.')[0]}.word'"
        )
    if there := [str(path) for path in written if (root / path).exists()]:
        raise FileExistsError(f"{', '.join(there)}: already there, and nothing is overwritten")
    for path, text in written.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    _format(root, list(written))
    for path in written:
        print(f"{path}: written")
    print(f"\nTry it: python -m pytest tests/conformance tests/attnlab -k {options.name.partition('.')[0]}")
    print("Now replace the toy by the mechanism; then `make table`.")
    if any(path.parent.name == "adapters" for path in written):
        print(
            f"The golden cases go to tests/golden/data/{options.name}; until then the tests say that they are missing."
        )
    return 0


def files(options: NewOptions) -> dict[Path, str]:
    """The files of a skeleton, by their paths in the checkout.

    Raises:
      ValueError: for a kind, family or source that there is not, or a name that is none.
    """
    for what, value, known in (("kind", options.kind, FAMILIES), ("source", options.source, SOURCES)):
        if value not in known:
            raise ValueError(f"no {what} is called {value!r}: {suggestion(value, known)}")
    family = options.family or FAMILIES[options.kind][0]
    if family not in FAMILIES[options.kind]:
        raise ValueError(f"no {options.kind} stands in {family!r}: {suggestion(family, FAMILIES[options.kind])}")
    name, further = _stem(options.name), "." in options.name
    if not registry.NAME.fullmatch(options.name) or keyword.iskeyword(name):
        raise ValueError(
            f"a name is `slug` or `slug.word` in lower case, digits and underscores, and no word of Python, "
            f"got {options.name!r}"
        )
    home = ("attention", family) if family in ATTENTION else (family,)
    skeleton = MIXERS.get(family, "mixer") if options.kind == "mixer" else options.kind
    source = SOURCES[options.source]
    found = {
        Path("attnlab", *home, f"{name}.py"): _named(skeleton, options, home),
        Path("tests", "attnlab", home[0], f"test_{name}.py"): _named(f"{skeleton}_test", options, home),
    }
    described = source in (registry.Source.AUTHORS_CODE, registry.Source.THIRD_PARTY)
    if described and not further and options.kind not in ("intervention", "task"):
        symbol = name if options.kind in ("function", "objective", "analysis") else _camel(name)
        found[Path("attnlab", "interop", f"{name}.py")] = DESCRIPTION.format(
            repository=options.repository or "the authors' code",
            module=".".join(("attnlab", *home, name)),
            symbol=symbol,
        )
        found[Path("tests", "golden", "adapters", f"{name}.py")] = ADAPTER.format(name=name)
    return found


def _named(skeleton: str, options: NewOptions, home: tuple[str, ...]) -> str:
    """The text of a skeleton under its new name, with the paper and the source that were given."""
    text = (Path(__file__).parent / "skeletons" / f"{skeleton}.py").read_text()
    base = skeleton.removesuffix("_test")
    name = _stem(options.name)
    text = text.replace(f"attnlab.cli.skeletons.{base}", ".".join(("attnlab", *home, name)))
    facts = [options.title, options.authors, options.year]
    paper = ", ".join(_quoted(fact) for fact in facts)
    paper += f", arxiv={_quoted(options.arxiv)}" if options.arxiv else ""
    paper += f", number={options.number}" if options.number is not None else ""
    source = f"    source=Source.{SOURCES[options.source].name},\n"
    source += f"    repository={_quoted(options.repository)},\n" if options.repository else ""
    text = text.replace(TOY_PAPER, f"PAPER = Paper({paper})").replace(TOY_SOURCE, source)
    text = text.replace('"skeleton"', f'"{options.name}"')
    return re.sub(r"\bskeleton\b", name, re.sub(r"\bSkeleton\b", _camel(name), text))


def _stem(name: str) -> str:
    """A variant's name as that of a file or a function."""
    return name.replace(".", "_")


def _quoted(value: object) -> str:
    return str(value) if isinstance(value, int) else '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _camel(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _format(root: Path, paths: list[Path]) -> None:
    """Sorts imports and breaks lines for the new name, where ruff is installed."""
    for command in (["check", "--quiet", "--fix"], ["format", "--quiet"]):
        subprocess.run(
            [sys.executable, "-m", "ruff", *command, *map(str, paths)], cwd=root, check=False, capture_output=True
        )
