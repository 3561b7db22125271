"""Which parameters of a test run in `make test`; the others run in `make test-slow`."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def quick(values: Iterable[Any], chosen: Collection[Any], name: Callable[[Any], str] = str) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`, those that are not chosen marked as slow.

    Args:
      values: one for each parametrized test; a tuple holds its several arguments.
      chosen: names of those in `make test`.
      name: of a value, and its id.

    Raises:
      ValueError: if something chosen is no value's name.
    """
    values = list(values)
    if missing := set(chosen) - {name(value) for value in values}:
        raise ValueError(f"chosen, but no value's name: {sorted(missing)}")
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            id=name(value),
            marks=() if name(value) in chosen else pytest.mark.slow,
        )
        for value in values
    ]


def joined(value: Iterable[Any]) -> str:
    """A name of several arguments: their names, or what they are, with hyphens."""
    return "-".join(str(getattr(part, "name", getattr(part, "__name__", part))) for part in value)
