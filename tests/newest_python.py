"""Prints the path of the newest installed Python that is newer than the one that runs this; nothing if there is none.

Versions are those that pyproject.toml names, looked for on the path and among pyenv's. One that cannot make an
environment does not count.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator

PYPROJECT = pathlib.Path(__file__).parents[1] / "pyproject.toml"
NEEDED = "import ensurepip, ssl, sys, venv; print(sys.version_info.minor)"


def minors() -> list[int]:
    """The minor versions of Python 3 that pyproject.toml names, the newest first."""
    classifiers = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["classifiers"]
    found = (re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", text) for text in classifiers)
    return sorted((int(match[1]) for match in found if match), reverse=True)


def candidates(minor: int) -> Iterator[str]:
    """Paths at which Python 3.`minor` may be."""
    if (path := shutil.which(f"python3.{minor}")) is not None:
        yield path
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    yield from map(str, sorted(pyenv.glob(f"versions/3.{minor}.*/bin/python")))


def works(path: str, minor: int) -> bool:
    """Whether the program at `path` is Python 3.`minor` and can make environments; a shim of pyenv may be neither."""
    try:
        answer = subprocess.run([path, "-c", NEEDED], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and answer.stdout.strip() == str(minor)


def newest(than: int = sys.version_info.minor) -> str | None:
    """The path of the newest Python 3 above 3.`than`, or None."""
    newer = (minor for minor in minors() if minor > than)
    return next((path for minor in newer for path in candidates(minor) if works(path, minor)), None)


if __name__ == "__main__":
    print(newest() or "")
