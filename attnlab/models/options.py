"""The options of a model, read from its constructor: the signature's names, types and defaults, the docstring's words.

What a constructor passes on as `**family` belongs to it too: the options of the class above follow its own. Sizes that
follow from the data (`inputs.sizes`), dtypes and random streams are no options, nor is what cannot be written down,
such as a function.
"""

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import docstring_parser

from attnlab.contract import constructor_parameters

NOT_OPTIONS = ("dtype", "param_dtype", "rngs")


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
    words = {
        parameter.arg_name: " ".join((parameter.description or "").split())
        for owner in reversed(cls.__mro__)
        for parameter in docstring_parser.parse(inspect.cleandoc(owner.__doc__ or "")).params
    }
    found = []
    for name, parameter in constructor_parameters(cls).items():
        setting = setting_type(parameter.annotation)
        if name in (*NOT_OPTIONS, *cls.inputs.sizes) or setting is None or parameter.default is parameter.empty:
            continue
        if name not in words:
            raise TypeError(f"the docstring of {cls.__name__} does not describe its argument {name}")
        found.append(Option(name, setting, parameter.default, words[name]))
    return tuple(found)


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
