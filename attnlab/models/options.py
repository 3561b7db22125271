"""The options of a model, read from its constructor: the signature's names, types and defaults, the docstring's words.

What a constructor passes on as `**family` belongs to it too: the options of the class above follow its own. Sizes that
follow from the data (`inputs.sizes`), dtypes and random streams are no options, nor is what cannot be written down,
such as a function.
"""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

NOT_OPTIONS = ("self", "dtype", "param_dtype", "rngs")
_ENTRY = re.compile(r"^  (?P<names>\w+(?:, \w+)*): (?P<words>.*(?:\n   .*)*)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a model.

    Attributes:
      name: of the argument.
      type: what may be given, of numbers, strings, booleans, None, `Literal`, tuples of these, and `Mapping`.
      default: its default.
      words: what it means.
    """

    name: str
    type: Any
    default: Any
    words: str


def options_of(cls: type) -> tuple[Option, ...]:
    """The options of a model's class, in the order of its constructor, then those of the classes above.

    Raises:
      TypeError: for an option that the docstring does not describe.
    """
    found: dict[str, Option] = {}
    sized = cls.inputs.sizes
    for owner in cls.__mro__:
        init = vars(owner).get("__init__")
        if init is None:
            continue
        parameters, hints, words = inspect.signature(init).parameters, typing.get_type_hints(init), described(owner)
        for name, parameter in parameters.items():
            if name in (*NOT_OPTIONS, *sized, *found) or parameter.kind is parameter.VAR_KEYWORD:
                continue
            setting = setting_type(hints.get(name, Any))
            if setting is None or parameter.default is parameter.empty:
                continue
            if name not in words:
                raise TypeError(f"the docstring of {owner.__name__} does not describe its argument {name}")
            found[name] = Option(name, setting, parameter.default, words[name])
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return tuple(found.values())


def described(cls: type) -> dict[str, str]:
    """The arguments that a class's docstring describes below `Args:`, each with its words on one line."""
    parts = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")[2].split("\n\n")
    entries = ((match["names"], " ".join(match["words"].split())) for match in _ENTRY.finditer(parts[0]))
    return {name: words for names, words in entries for name in names.split(", ")}


def setting_type(annotation: Any) -> Any:
    """The type of a setting that can be written down, for that of an argument; None if it cannot.

    Sequences are tuples. What may be a mapping or nothing is a mapping. In a sequence of names or sequences of names,
    only names count.
    """
    if annotation in (int, float, str, bool, types.NoneType):
        return annotation
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return annotation
    if origin is Mapping:
        return Mapping
    if origin is Sequence:
        inner = arguments[0]
        if str in typing.get_args(inner):
            inner = str
        element = setting_type(inner)
        return None if element is None else tuple[element, ...]
    if origin in (typing.Union, types.UnionType):
        members = [setting_type(argument) for argument in arguments]
        if None in members or (Mapping in members and set(members) - {Mapping, types.NoneType}):
            return None
        return Mapping if Mapping in members else typing.Union[tuple(members)]  # noqa: UP007
    return None
