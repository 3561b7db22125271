"""The table of variants: a name for every mechanism, with its paper, what it supports, its cost and its kernel.

A class enters the table by the decorator `register`, in its own file; the families in `FAMILIES` are imported at the
first question, not at `import attnlab`. A paper with one mixer uses its slug as the name (`agent_attention`); further
classes of the same paper add a word (`efficient_probing.aim`).
"""

import dataclasses
import enum
import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

from flax import nnx

from attnlab.contract import Layout, Pattern, Site, TokenMixer
from attnlab.suggest import suggestion

FAMILIES = ("attnlab.attention", "attnlab.pooling", "attnlab.models")

ClassT = TypeVar("ClassT", bound=type)


class Source(enum.StrEnum):
    """What an implementation was checked against."""

    AUTHORS_CODE = "authors' code"
    PAPER_TEXT = "paper text"
    ABSTRACT_ONLY = "abstract only"


class Kind(enum.StrEnum):
    """What a variant does to tokens."""

    MIXER = "token mixer"  # tokens to tokens, the contract of attnlab.contract
    POOLING = "pooling"  # (B, N, C) to (B, C')
    BACKBONE = "backbone"  # images or token ids to features or logits


@dataclasses.dataclass(frozen=True)
class Paper:
    """Where a mechanism comes from. `number` is its row in the project's list of papers, None if it is not there."""

    title: str
    authors: str
    year: int
    arxiv: str | None = None
    number: int | None = None

    def __str__(self) -> str:
        return f"{self.title} ({self.authors}, {self.year}{f', arXiv:{self.arxiv}' if self.arxiv else ''})"


@dataclasses.dataclass(frozen=True)
class Cost:
    """Asymptotic cost of one head or layer, in the axis names of the library, e.g. `O(N·n·C)`.

    `state` is what decoding carries per sequence, None for a mechanism that does not decode.
    """

    time: str
    memory: str
    state: str | None = None


@dataclasses.dataclass(frozen=True)
class Variant:
    """One line of the table. `kernel` names the op of `pallas_kernels` that carries it, None for plain XLA."""

    name: str
    cls: type
    kind: Kind
    paper: Paper
    source: Source
    repository: str | None
    cost: Cost
    kernel: str | None
    summary: str

    @property
    def slug(self) -> str:
        return self.name.partition(".")[0]

    @property
    def patterns(self) -> frozenset[Pattern]:
        return getattr(self.cls, "patterns", frozenset())

    @property
    def layouts(self) -> frozenset[Layout]:
        return getattr(self.cls, "layouts", frozenset())

    def create(self, site: Site, *, rngs: nnx.Rngs, **options: Any) -> nnx.Module:
        """Builds the variant for a place in a model; see `TokenMixer.for_site`."""
        return self.cls.for_site(site, rngs=rngs, **options)


_variants: dict[str, Variant] = {}


def register(
    name: str,
    *,
    paper: Paper,
    source: Source,
    cost: Cost,
    summary: str,
    repository: str | None = None,
    kernel: str | None = None,
    kind: Kind | None = None,
) -> Callable[[ClassT], ClassT]:
    """Enters a class into the table of variants.

    Args:
      name: the paper's slug, or `slug.word` for a further class of the same paper.
      paper: title, authors, year.
      source: what the implementation was checked against.
      cost: asymptotic cost in the library's axis names.
      summary: one line that says what the mechanism does.
      repository: the authors' code, `owner/name`.
      kernel: op of `pallas_kernels` that computes it.
      kind: `MIXER` for a `TokenMixer` when None.

    Raises:
      ValueError: if the name is taken, or the kind is not given for a class that is no `TokenMixer`.
    """

    def enter(cls: ClassT) -> ClassT:
        if name in _variants and _variants[name].cls.__qualname__ != cls.__qualname__:
            raise ValueError(f"the name {name!r} is taken by {_variants[name].cls.__qualname__}")
        if kind is None and not issubclass(cls, TokenMixer):
            raise ValueError(f"{cls.__qualname__} is no TokenMixer: say which kind it is")
        _variants[name] = Variant(
            name, cls, Kind.MIXER if kind is None else kind, paper, source, repository, cost, kernel, summary
        )
        return cls

    return enter


@functools.cache
def _load() -> None:
    for family in FAMILIES:
        package = importlib.import_module(family)
        for module in pkgutil.walk_packages(package.__path__, family + "."):
            importlib.import_module(module.name)


def variants(
    *, kind: Kind | None = None, pattern: Pattern | None = None, layout: Layout | None = None
) -> tuple[Variant, ...]:
    """The registered variants by name, all or those of a kind, a pattern and a layout."""
    _load()
    return tuple(
        v
        for _, v in sorted(_variants.items())
        if (kind is None or v.kind == kind)
        and (pattern is None or pattern in v.patterns)
        and (layout is None or layout in v.layouts)
    )


def names(*, kind: Kind | None = None, pattern: Pattern | None = None, layout: Layout | None = None) -> tuple[str, ...]:
    """The names of `variants(...)`."""
    return tuple(v.name for v in variants(kind=kind, pattern=pattern, layout=layout))


def get(name: str) -> Variant:
    """The variant of that name.

    Raises:
      KeyError: with the nearest names, if there is none.
    """
    _load()
    if name not in _variants:
        raise KeyError(f"no variant is called {name!r}: {suggestion(name, sorted(_variants))}")
    return _variants[name]


def create(name: str, site: Site, *, rngs: nnx.Rngs, **options: Any) -> nnx.Module:
    """Builds a registered variant for a place in a model.

    Args:
      name: as `attnlab list` prints it.
      site: what the model tells its mixers.
      rngs: streams for parameters and dropout.
      **options: constructor arguments of the variant's class.

    Raises:
      KeyError: for an unknown name.
      UnsupportedArgument: if the variant has no form with the site's pattern or layout.
    """
    return get(name).create(site, rngs=rngs, **options)
