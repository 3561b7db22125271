"""A run that ends in time on any machine: `pytest --within SECONDS --begin-at NUMBER`.

A test that would begin later than that is skipped; the summary counts them. So that it is not always the same ones, the
order begins at another test for another number.
"""

import time
import zlib
from typing import Any

import pytest

START = pytest.StashKey[float]()


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("time of a run")
    group.addoption("--within", type=float, metavar="SECONDS", help="skip the tests that would begin later")
    group.addoption("--begin-at", default="", metavar="NUMBER", help="begin at another test for another number")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[START] = time.monotonic()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    number = config.getoption("begin_at")
    if number and items:
        first = zlib.crc32(number.encode()) % len(items)
        items[:] = items[first:] + items[:first]


def pytest_runtest_setup(item: Any) -> None:
    within = item.config.getoption("within")
    if within is not None and time.monotonic() - item.config.stash[START] > within:
        pytest.skip(f"not begun within {within:.0f} seconds")
