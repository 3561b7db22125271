"""Runs files of tests in a child process that has eight CPU devices, as the number is fixed when JAX starts."""

import os
import pathlib
import re
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
MOVES_DATA = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def passes(path: pathlib.Path) -> None:
    """Asserts that the tests of the file `path` pass on eight devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(path)]
    environment = {**os.environ, "XLA_FLAGS": flags}
    program = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert program.returncode == 0, program.stdout[-20000:] + program.stderr[-5000:]


def collectives(compiled: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Kind and shape of every array that a compiled program sends between devices, sorted."""
    found = []
    for shapes, kind in MOVES_DATA.findall(compiled.as_text()):
        for sizes in re.findall(r"\w+\[([\d,]*)\]", shapes):
            found.append((kind, tuple(int(size) for size in sizes.split(",") if size)))
    return sorted(found)
