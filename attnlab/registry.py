"""The table of variants: a name for everything that comes from a paper, with its kind, its paper, source and cost.

A class or a function enters the table by the decorator `register`, in its own file; there is no list to edit. The
packages in `HOMES` are imported at the first question, not at `import attnlab`. A paper with one mechanism uses its
slug as the name (`agent_attention`); what else comes from the same paper adds a word (`efficient_probing.aim`).
"""

import dataclasses
import enum
import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from flax import nnx

from attnlab.contract import Layout, Pattern, Pooling, Site, SiteModule, TokenMixer
from attnlab.suggest import suggestion

HOMES = ("attention", "mixers", "pooling", "interventions", "analysis", "objectives", "tasks", "models", "nn")
NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)?")

TargetT = TypeVar("TargetT", bound=Callable[..., Any])
WordT = TypeVar("WordT", bound=enum.StrEnum)


class Source(enum.StrEnum):
    """What an implementation was checked against."""

    AUTHORS_CODE = "authors' code"
    THIRD_PARTY = "third-party code"
    PAPER_TEXT = "paper text"
    ABSTRACT_ONLY = "abstract only"


class Kind(enum.StrEnum):
    """What a variant is, and so what it promises; CONTRIBUTING.md says how to add one of each."""

    MIXER = "mixer"  # tokens to tokens of the same shape, the contract of attnlab.contract
    POOLING = "pooling"  # tokens (B, N, C) to one vector (B, C')
    BACKBONE = "backbone"  # images, tokens or videos to features or logits
    MODULE = "module"  # several streams or sources in, one output for each stream out
    FUNCTION = "function"  # arrays to arrays
    OBJECTIVE = "objective"  # predictions and targets to one loss per example (B,)
    INTERVENTION = "intervention"  # a training-free edit of a model at named points
    ANALYSIS = "analysis"  # recorded arrays to measures of them
    TASK = "task"  # synthetic examples with an oracle that solves them


# Kinds whose small form is given by options of the constructor; the others give an `Example`.
BUILT_FROM_OPTIONS = (Kind.MIXER, Kind.POOLING, Kind.BACKBONE, Kind.TASK)


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
class Example:
    """One small call, `call(*args, **kwargs)`, to which tests hold a variant that no model builds.

    A variant is registered with a function that makes its example, so that importing it computes nothing:

        @register("slug", kind=Kind.FUNCTION, ..., small=lambda: Example(softmax_free, (jnp.ones((2, 5, 4)),)))

    Attributes:
      call: a registered function, or a module built small: of a registered class, or a model under an intervention.
      args: positional arguments; arrays, or lists, tuples and dictionaries of arrays.
      kwargs: keyword arguments; arrays are traced, and anything else is static and hashable.
      batched: the arguments with a leading batch axis, by position or by keyword. Unless there are none, every array of
        the result has that axis too, and no example depends on the others.
      differentiable: the arguments that have gradients, by position or by keyword.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batched: tuple[int | str, ...] = (0,)
    differentiable: tuple[int | str, ...] = (0,)

    def __post_init__(self) -> None:
        for field in ("batched", "differentiable"):
            for argument in getattr(self, field):
                known = argument in self.kwargs if isinstance(argument, str) else argument in range(len(self.args))
                if not known:
                    there = [*range(len(self.args)), *self.kwargs]
                    raise ValueError(f"{field} names the argument {argument!r}; this example has {there}")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One line of the table.

    Attributes:
      name: the paper's slug, or `slug.word`.
      target: the class or function.
      kind: what it is.
      paper: title, authors, year.
      source: what it was checked against.
      repository: the code that it was checked against, `owner/name`.
      cost: in the library's axis names.
      kernel: the op of `pallas_kernels` that carries it, None for plain XLA.
      summary: one line on what it does.
      small: options that build it small (a backbone: all its arguments; a mixer or pooling: those beside what the site
        says), or a function that makes an `Example`, see `BUILT_FROM_OPTIONS`.
    """

    name: str
    target: Callable[..., Any]
    kind: Kind
    paper: Paper
    source: Source
    repository: str | None
    cost: Cost
    kernel: str | None
    summary: str
    small: Mapping[str, Any] | Callable[[], Example] = dataclasses.field(compare=False)

    @property
    def slug(self) -> str:
        return self.name.partition(".")[0]

    @property
    def family(self) -> str:
        """The package it stands in: `dense`, `linear`, ... of `attnlab.attention`, or `mixers`, `pooling`, `models`...

        What is registered from outside of attnlab has its own top-level package as its family.
        """
        package, *below = self.target.__module__.split(".")
        if package != "attnlab" or not below:
            return package
        return below[1] if below[0] == "attention" and len(below) > 1 else below[0]

    @property
    def cls(self) -> type:
        """The class.

        Raises:
          TypeError: if the variant is a function.
        """
        if not isinstance(self.target, type):
            raise TypeError(f"{self.name} is a function, not a class")
        return self.target

    @property
    def patterns(self) -> frozenset[Pattern]:
        return getattr(self.target, "patterns", frozenset())

    @property
    def layouts(self) -> frozenset[Layout]:
        return getattr(self.target, "layouts", frozenset())

    @property
    def options(self) -> Mapping[str, Any]:
        """The options that build it small.

        Raises:
          TypeError: if its kind has an example instead, see `BUILT_FROM_OPTIONS`.
        """
        if not isinstance(self.small, Mapping):
            raise TypeError(f"{self.name} is of kind {self.kind}, which has an example and no options")
        return self.small

    def example(self) -> Example:
        """Makes its small example.

        Raises:
          TypeError: if it is built from options instead, see `BUILT_FROM_OPTIONS`.
        """
        if isinstance(self.small, Mapping):
            raise TypeError(f"{self.name} is of kind {self.kind}, which has options and no example")
        return self.small()

    @property
    def site_class(self) -> type[SiteModule]:
        """The class of a mixer or pooling, which are built for a place in a model.

        Raises:
          TypeError: if it is of another kind.
        """
        if self.kind not in (Kind.MIXER, Kind.POOLING) or not issubclass(self.cls, SiteModule):
            raise TypeError(f"{self.name} is of kind {self.kind}: only mixers and poolings are built for a site")
        return self.cls

    def create(self, site: Site, *, rngs: nnx.Rngs, **options: Any) -> nnx.Module:
        """Builds a mixer or pooling for a place in a model; see `TokenMixer.for_site`.

        Raises:
          TypeError: if it is of another kind.
        """
        return self.site_class.for_site(site, rngs=rngs, **options)


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
    small: Mapping[str, Any] | Callable[[], Example] | None = None,
) -> Callable[[TargetT], TargetT]:
    """Enters a class or a function into the table of variants. Its family follows from the package it stands in.

    Args:
      name: the paper's slug, or `slug.word` for what else comes from the same paper.
      paper: title, authors, year.
      source: what the implementation was checked against.
      cost: asymptotic cost in the library's axis names.
      summary: one line that says what it does.
      repository: the code that it was checked against, `owner/name`.
      kernel: op of `pallas_kernels` that computes it.
      kind: follows from the class for a `TokenMixer` and a `Pooling`; for anything else it must be given.
      small: how tests, pages and benchmarks build or call it at miniature size. For a mixer or a pooling options of its
        constructor, none by default; for a backbone all its arguments, for a task its fields; for the other kinds a
        function without arguments that makes an `Example`.

    Raises:
      ValueError: if the name is taken or no name, the kind is not known, or `small` is missing or of the wrong form.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"a name is `slug` or `slug.word` in lower case, digits and underscores, got {name!r}")

    def enter(target: TargetT) -> TargetT:
        known = _variants.get(name)
        if known is not None and _address(known.target) != _address(target):
            raise ValueError(f"the name {name!r} is taken by {_address(known.target)}")
        what = _kind(target) if kind is None else kind
        _variants[name] = Variant(
            name, target, what, paper, source, repository, cost, kernel, summary, _small(name, what, small)
        )
        return target

    return enter


def _address(target: Callable[..., Any]) -> str:
    return f"{target.__module__}.{target.__qualname__}"


def _kind(target: Callable[..., Any]) -> Kind:
    for base, kind in ((TokenMixer, Kind.MIXER), (Pooling, Kind.POOLING)):
        if isinstance(target, type) and issubclass(target, base):
            return kind
    raise ValueError(f"{_address(target)} is no TokenMixer and no Pooling: say which kind it is")


def _small(name: str, kind: Kind, small: Any) -> Mapping[str, Any] | Callable[[], Example]:
    if small is None and kind in (Kind.MIXER, Kind.POOLING):
        return {}
    if kind in BUILT_FROM_OPTIONS:
        if not isinstance(small, Mapping):
            raise ValueError(f"{name} is a {kind}: small must be the options that build it small, got {small!r}")
    elif not callable(small):
        raise ValueError(f"{name} is of kind {kind}: small must be a function that makes an Example, got {small!r}")
    return small


@functools.cache
def _load() -> None:
    for home in HOMES:
        package = importlib.import_module(f"attnlab.{home}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def variants(
    *,
    kind: Kind | str | None = None,
    family: str | None = None,
    pattern: Pattern | str | None = None,
    layout: Layout | str | None = None,
    source: Source | str | None = None,
    kernel: str | None = None,
    search: str = "",
) -> tuple[Variant, ...]:
    """The registered variants by name, all or those that pass every filter.

    Args:
      kind: what they are.
      family: the package they stand in, see `Variant.family`.
      pattern: of attention, among those they have.
      layout: of tokens, among those they take.
      source: what they were checked against.
      kernel: the op of `pallas_kernels` that carries them.
      search: words that must all occur in the name, the summary or the paper, in any case.

    Raises:
      ValueError: for a kind, family, pattern, layout, source or kernel that there is not, with the nearest.
    """
    _load()
    everything = [v for _, v in sorted(_variants.items())]
    kind, pattern, layout, source = (
        _word("kind", Kind, kind),
        _word("pattern", Pattern, pattern),
        _word("layout", Layout, layout),
        _word("source", Source, source),
    )
    _check("family", family, {v.family for v in everything})
    _check("kernel", kernel, {v.kernel for v in everything if v.kernel})
    return tuple(
        v
        for v in everything
        if (kind is None or v.kind == kind)
        and (family is None or v.family == family)
        and (pattern is None or pattern in v.patterns)
        and (layout is None or layout in v.layouts)
        and (source is None or v.source == source)
        and (kernel is None or v.kernel == kernel)
        and _found(search, v)
    )


def _word(filter_: str, words: type[WordT], value: WordT | str | None) -> WordT | None:
    if value is None:
        return None
    _check(filter_, value, list(words))
    return words(value)


def _check(filter_: str, value: str | None, known: Iterable[str]) -> None:
    if value is not None and value not in known:
        raise ValueError(f"no {filter_} is called {str(value)!r}: {suggestion(value, sorted(known))}")


def _found(search: str, variant: Variant) -> bool:
    text = f"{variant.name} {variant.summary} {variant.paper}".casefold()
    return all(word in text for word in search.casefold().split())


def names(
    *,
    kind: Kind | str | None = None,
    family: str | None = None,
    pattern: Pattern | str | None = None,
    layout: Layout | str | None = None,
    source: Source | str | None = None,
    kernel: str | None = None,
    search: str = "",
) -> tuple[str, ...]:
    """The names of `variants(...)`, which explains the filters."""
    chosen = variants(
        kind=kind, family=family, pattern=pattern, layout=layout, source=source, kernel=kernel, search=search
    )
    return tuple(v.name for v in chosen)


def families() -> tuple[str, ...]:
    """The families that have a variant, in alphabetical order."""
    return tuple(sorted({v.family for v in variants()}))


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
    """Builds a registered mixer or pooling for a place in a model.

    Args:
      name: as `attnlab list` prints it.
      site: what the model tells its mixers.
      rngs: streams for parameters and dropout.
      **options: constructor arguments of the variant's class.

    Raises:
      KeyError: for an unknown name.
      TypeError: if the variant is of another kind, or has no such option.
      UnsupportedArgument: if the variant has no form with the site's pattern or layout.
    """
    return get(name).create(site, rngs=rngs, **options)
