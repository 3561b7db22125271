"""What is known of a variant, in words: for `attnlab show`, and for the pages of `docs/mechanisms`."""

import collections.abc
import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from attnlab.contract import Layout, Pattern, Site, TokenMixer, UnsupportedArgument, constructor_parameters
from attnlab.decode_size import LENGTHS, decode_size, state_bytes
from attnlab.registry import Kind, Paper, Variant

DECODE_SITE = Site(256, 4, causal=True, num_layers=2)


@dataclasses.dataclass(frozen=True)
class Option:
    """An argument of a constructor or a function; `default` is empty where there is none."""

    name: str
    type: str
    default: str
    meaning: str


def paper_url(paper: Paper) -> str | None:
    """Address of the paper on arXiv, None where it is not there."""
    return f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else None


def paper_short(paper: Paper) -> str:
    """First authors and year, `Han et al. 2024`."""
    return f"{paper.authors.split(',')[0]} {paper.year}"


def address(variant: Variant) -> str:
    """Where the class or function is imported from, `attnlab.attention.linear.tnl.TnlAttention`."""
    return f"{variant.target.__module__}.{variant.target.__qualname__}"


def sizes_of(variant: Variant) -> tuple[str, ...]:
    """The names under which `attnlab.models.create` builds a backbone in the sizes of its paper."""
    if variant.kind is not Kind.BACKBONE:
        return ()
    from attnlab.models import named_models

    return tuple(name for name, (cls, _) in named_models().items() if cls is variant.target)


def source_file(variant: Variant) -> Path:
    """The file that defines the class or function."""
    path = inspect.getsourcefile(inspect.unwrap(variant.target))
    if path is None:
        raise FileNotFoundError(f"{address(variant)} has no source file")
    return Path(path)


def parameters(call: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments of a function or of a class's constructor, without `self`."""
    if isinstance(call, type):
        return constructor_parameters(call)
    return {name: p for name, p in inspect.signature(call).parameters.items() if name != "self"}


def signature(call: Callable[..., Any]) -> str:
    """The arguments of a call with their defaults, without types: `(x, context=None, *, mask=None)`."""
    short = [
        p.replace(annotation=p.empty, default=p.default if p.default is p.empty else _Short(p.default))
        for p in parameters(call).values()
    ]
    return str(inspect.Signature(short))


class _Short:
    """A default of a signature as it is printed: functions and types by their names."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return getattr(self.value, "__name__", None) or repr(self.value)


def calls(variant: Variant) -> dict[str, str]:
    """How it is built and how it is called: signatures without types."""
    target = variant.target
    if not isinstance(target, type):
        return {"called": f"{target.__name__}{signature(target)}"}
    found = {"built": f"{target.__name__}{signature(target)}"}
    if issubclass(target, TokenMixer):
        accepts = target.accepts if isinstance(target.accepts, frozenset) else frozenset()  # an instance may narrow it
        found["arguments of a call"] = ", ".join(["x", *sorted(accepts)])
    elif variant.kind is Kind.TASK:
        found["called"] = f"task.sample{signature(target.sample)}"  # type: ignore[attr-defined]
    elif "__call__" in dir(target):
        found["called"] = f"{variant.kind}{signature(target.__call__)}"
    return found


def options(target: Callable[..., Any]) -> list[Option]:
    """Every argument of a constructor or function, with its meaning as the docstring has it."""
    from docstring_parser import parse

    documented = {
        p.arg_name.lstrip("*"): " ".join((p.description or "").split())
        for described in reversed(target.__mro__ if isinstance(target, type) else (target,))
        for p in parse(inspect.cleandoc(described.__doc__ or "")).params
    }
    told = {field.name for field in dataclasses.fields(Site)}
    found = []
    for name, parameter in parameters(target).items():
        note = documented.get(name, "")
        if name in told and isinstance(target, type) and issubclass(target, TokenMixer):
            note = f"{note} (a model fills it in)".strip()
        stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
        stars = stars if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) else ""
        default = "" if parameter.default is parameter.empty else repr(_Short(parameter.default))
        found.append(Option(stars + name, _type(parameter.annotation), default, note))
    return found


def _type(annotation: Any) -> str:
    """A type as it is written; a union of what makes arrays, which has no name at run time, is `ArrayLike` again."""
    from jax.typing import ArrayLike

    if annotation is inspect.Parameter.empty:
        return ""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        arrays = get_args(ArrayLike)
        names = ["ArrayLike"] if set(arrays) <= set(parts) else []
        return " | ".join(names + [_type(part) for part in parts if not (names and part in arrays)])
    if origin in (tuple, list, dict, collections.abc.Sequence, collections.abc.Mapping):
        return f"{origin.__name__}[{', '.join('...' if part is ... else _type(part) for part in parts)}]"
    if annotation is type(None):
        return "None"
    if isinstance(annotation, type) and not parts:
        return annotation.__name__
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(annotation))  # paths of modules tell nobody anything


def equations(variant: Variant) -> str:
    """The docstring of the file, which has the paper and the equations."""
    return inspect.getdoc(inspect.getmodule(variant.target)) or ""


def prose(variant: Variant) -> str:
    """The docstring of the class or function without its lists of arguments and errors."""
    from docstring_parser import parse

    return (parse(inspect.getdoc(variant.target) or "").description or "").strip()


def decode_state(variant: Variant) -> str:
    """What a mixer carries from token to token: its form, and its size in bytes for one sequence; "" for other kinds.

    The size is that of bfloat16 caches and float32 recurrent states, for 256 channels in 4 heads.
    """
    if variant.kind is not Kind.MIXER:
        return variant.cost.state or ""
    sizes = decode_bytes(variant)
    if sizes is None:
        return "does not decode"
    place = f"for {DECODE_SITE.features} channels in {DECODE_SITE.num_heads} heads"
    if len(set(sizes.values())) == 1:
        words = f"{next(iter(sizes.values())):,} bytes {place}, at any length"
    else:
        words = ", ".join(f"{size:,} bytes at {length:,} tokens" for length, size in sizes.items()) + f", {place}"
    return f"{variant.cost.state}: {words}" if variant.cost.state else words


def decode_bytes(variant: Variant) -> Mapping[int, int] | None:
    """Bytes of a mixer's decode state for one sequence by its greatest length; None if it does not decode."""
    state = _decode_state(variant)
    return None if state is None else {length: state_bytes(state, length) for length in LENGTHS}


def token_bytes(variant: Variant) -> str:
    """How many bytes of a mixer's decode state a token costs, and how many there are anyway; "" if it has none."""
    state = _decode_state(variant)
    return "" if state is None else str(decode_size(state))


def _decode_state(variant: Variant) -> Callable[[int], Any] | None:
    """From the greatest length to the decode state of one sequence; None for what does not decode."""
    import jax.numpy as jnp
    from flax import nnx

    def state(length: int) -> Any:
        mixer: Any = variant.create(DECODE_SITE, rngs=nnx.Rngs(0), **variant.options)
        return mixer.init_state(1, length, dtype=jnp.bfloat16)

    if variant.kind is not Kind.MIXER:
        return None
    if Pattern.CAUSAL_SELF not in variant.patterns or Layout.SEQUENCE not in variant.layouts:
        return None
    try:
        state_bytes(state, LENGTHS[0])
    except UnsupportedArgument:
        return None
    return state
