"""Byte-level text that every machine has: the sources of Python's own standard library.

The text differs between versions of Python (and a little between distributions, which patch it), so numbers compare
only within one: `info.details["python"]` says the version, and `info.digest` is the text's own.
"""

import dataclasses
import hashlib
import platform
import sysconfig
from pathlib import Path
from typing import ClassVar

from attnlab.data.dataset import Dataset, Loading
from attnlab.data.errors import check_fraction, data_error, existing
from attnlab.data.text import text_dataset

# Installed packages, tests, tables, and what distributions leave out or put into packages of their own.
SKIPPED = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "sitecustomize.py", "usercustomize.py"}
    | {"test", "tests", "idlelib", "tkinter", "turtledemo", "turtle.py", "lib2to3", "distutils", "ensurepip"}
    | {"encodings", "pydoc_data"}
)

_HELP = {
    "expected": "the .py files of Python's standard library",
    "get_it": "a Python from https://www.python.org or of your system, with its library as source files "
    "(not the embeddable or a frozen one)",
}


@dataclasses.dataclass(frozen=True)
class StdlibText:
    """The standard library's modules, each one document.

    A file belongs to evaluation if a hash of its path within the library falls into the first `eval_fraction` of all
    hashes: a file keeps its split whatever other files there are. Files stand in the order of the sorted paths.

    Attributes:
      eval_fraction: expected share of the files for evaluation.
      max_bytes: keeps at most so many bytes: whole files that fit, tried in the order of another hash of their paths.
        None takes all (some 8 MB).
      pack: adds `segment_ids` and `positions`.
      loading: threads and processes.
    """

    name: ClassVar[str] = "stdlib_text"

    eval_fraction: float = 0.1
    max_bytes: int | None = None
    pack: bool = False
    loading: Loading = dataclasses.field(default_factory=Loading)

    def open(self) -> Dataset:
        """Reads the library into memory.

        Raises:
          DataError: if Python's library is not there as source files.
          ValueError: for a setting out of range, or a `max_bytes` that leaves a split empty.
        """
        check_fraction("eval_fraction", self.eval_fraction)
        texts = read_library(existing(sysconfig.get_path("stdlib"), "directory", **_HELP))
        if self.max_bytes is not None:
            texts = _within(texts, self.max_bytes)
        splits: dict[str, list[bytes]] = {"train": [], "eval": []}
        for path, text in texts.items():
            splits["eval" if _hash(path, "split") < self.eval_fraction else "train"].append(text)
        for split, documents in splits.items():
            if not documents:
                raise ValueError(
                    f"max_bytes {self.max_bytes} and eval_fraction {self.eval_fraction} leave no file for {split}"
                )
        details = {"python": platform.python_version(), "files": str(len(texts))}
        return text_dataset(self.name, splits, pack=self.pack, loading=self.loading, details=details)


def read_library(root: Path) -> dict[str, bytes]:
    """The modules of a standard library: path within it (with `/`) to text, sorted by path.

    Left out are `SKIPPED` and files that are empty or written for one machine (`_sysconfigdata...`).

    Raises:
      DataError: if there are none.
    """
    texts = {}
    for file in root.rglob("*.py"):
        parts = file.relative_to(root).parts
        if SKIPPED.isdisjoint(parts) and not parts[-1].startswith("_sysconfig") and file.is_file():
            texts["/".join(parts)] = file.read_bytes()
    texts = {path: texts[path] for path in sorted(texts) if texts[path]}
    if not texts:
        raise data_error(root, "holds no Python sources", **_HELP)
    return texts


def _within(texts: dict[str, bytes], max_bytes: int) -> dict[str, bytes]:
    """A subset, in the same order, of at most `max_bytes` bytes, that no alphabetical neighbourhood dominates."""
    kept, total = set(), 0
    for path in sorted(texts, key=lambda path: _hash(path, "order")):
        if total + len(texts[path]) <= max_bytes:
            kept.add(path)
            total += len(texts[path])
    return {path: text for path, text in texts.items() if path in kept}


def _hash(path: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the path and the purpose alone."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{path}".encode()).digest()[:6]) / 2**48
