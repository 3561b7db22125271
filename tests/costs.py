"""What tests cost: processor time by file and by mechanism, printed after a run, and a bound on a worker's memory."""

import collections
import ctypes
import gc
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from tests import ir_context

STATM = pathlib.Path("/proc/self/statm")
WORTH_A_TABLE = 20.0  # processor seconds of a whole run
LINES = 15
RESIDENT = 1.8 * 2**30  # bytes at which compiled programs are dropped
STEP = 0.3 * 2**30  # bytes more than were left at the last time, before they are dropped again

_last = 0.0
_limit = RESIDENT


def processor_seconds() -> float:
    """User time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.children_user


def pytest_runtest_logstart() -> None:
    global _last
    _last = processor_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[Any]:
    """Notes on every report what its phase cost, and for which mechanism; reports carry it from workers."""
    global _last
    report = yield
    now = processor_seconds()
    report.processor_seconds, _last = now - _last, now
    report.mechanism = mechanism(report.nodeid, _slugs())
    return report


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """Drops compiled programs when they fill this process's memory; dropped always, shared ones would cost anew."""
    global _limit
    if not STATM.exists() or resident() < _limit:
        return
    jax.clear_caches()
    ir_context.renew()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    _limit = max(RESIDENT, resident() + STEP)


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def mechanism(nodeid: str, slugs: frozenset[str]) -> str | None:
    """The slug that a test's id names: its file, or a parameter."""
    words = (word.removeprefix("test_") for word in re.split(r"[^a-z0-9_]+", nodeid))
    return next((word for word in words if word in slugs), None)


def _slugs() -> frozenset[str]:
    registry = sys.modules.get("attnlab.registry")
    return frozenset() if registry is None else frozenset(variant.slug for variant in registry._variants.values())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    files: collections.Counter[str] = collections.Counter()
    mechanisms: collections.Counter[str] = collections.Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        seconds = getattr(report, "processor_seconds", 0.0)
        files[getattr(report, "nodeid", "").partition("::")[0]] += seconds
        if getattr(report, "mechanism", None) is not None:
            mechanisms[report.mechanism] += seconds
    total = sum(files.values())
    if total < WORTH_A_TABLE:
        return
    terminalreporter.section(f"processor seconds: {total:.0f} in all")
    for title, costs in (("dearest files", files), ("dearest mechanisms", mechanisms)):
        terminalreporter.write_line(f"{title}:")
        for name, seconds in costs.most_common(LINES):
            terminalreporter.write_line(f"{seconds:8.1f}  {name}")
