"""Runs the tests that depend on what changed since a commit, `main` by default: `python -m tests.changed [COMMIT]`.

Test files are followed by their imports: one that reaches a changed file through them runs, and so does one that names
a mechanism whose file reaches it. Conformance and golden tests run over what is registered, which no import shows:
they run for those mechanisms alone, by `-k`, unless what they all share has changed.
"""

import ast
import functools
import pathlib
import subprocess
import sys
from collections.abc import Iterable
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("attnlab", "pallas_kernels", "experiments", "tests")
REGISTERED = ("tests/conformance", "tests/golden")  # folders whose tests run over the registry or the adapters
EVERYTHING = frozenset(
    {
        "pyproject.toml",
        "constraints.txt",
        *(f"tests/{name}.py" for name in ("conftest", "costs", "ir_context", "limit")),
    }
)
READERS = {".md": ("tests/test_readme.py", "tests/attnlab/cli"), ".ipynb": ("tests/colab",)}


class Selection(NamedTuple):
    """What to run.

    Attributes:
      files: test files and folders, run whole.
      slugs: mechanisms whose conformance and golden tests run.
    """

    files: frozenset[str]
    slugs: frozenset[str]


def changed_files(since: str) -> list[str]:
    """Paths below the root that differ from where this branch left `since`, those not yet added too."""

    def git(*arguments: str) -> list[str]:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()

    (base,) = git("merge-base", since, "HEAD")
    return sorted({*git("diff", "--name-only", base), *git("ls-files", "--others", "--exclude-standard")})


def select(changed: Iterable[str]) -> Selection:
    """The tests that depend on changed files, paths below the root."""
    changed = frozenset(changed)
    if changed & EVERYTHING:
        return Selection(frozenset({"tests"}), frozenset())
    files = {reader for path in changed for reader in READERS.get(pathlib.Path(path).suffix, ())}
    names = {name for path, registered in variants().items() if reaches(path) & changed for name in registered}
    slugs = {name.partition(".")[0] for name in names}
    for path in changed:
        parts = pathlib.Path(path).parts
        if path.startswith("tests/golden/data/") and len(parts) > 4:
            slugs.add(parts[3])
        if path.startswith(("tests/golden/adapters/", "attnlab/interop/")) and path.endswith(".py"):
            slugs.add(pathlib.Path(path).stem)
    for path in sources():
        if path.startswith("tests/") and pathlib.Path(path).name.startswith("test_"):
            named = names & strings(path) and not path.startswith(REGISTERED)
            if named or reaches(path) & changed:
                files.add(path)
    return Selection(frozenset(files), frozenset(slugs))


@functools.cache
def sources() -> tuple[str, ...]:
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return tuple(sorted(path.relative_to(ROOT).as_posix() for path in paths))


@functools.cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


@functools.cache
def imports(path: str) -> frozenset[str]:
    """Files that a file imports, packages by their `__init__`."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    found = set()
    for name in names:
        stem = name.replace(".", "/")
        found |= {f"{stem}.py", f"{stem}/__init__.py"}
    if pathlib.Path(path).name == "api.py":
        # The implementations of an op are imported by name, at the first call.
        folder = path.removesuffix("api.py")
        found |= {other for other in sources() if other.startswith(folder)}
    return frozenset(found) & frozenset(sources())


@functools.cache
def reaches(path: str) -> frozenset[str]:
    """A file and all that it imports, directly or through others."""
    found, waiting = {path}, [path]
    while waiting:
        new = imports(waiting.pop()) - found
        found |= new
        waiting.extend(new)
    return frozenset(found)


@functools.cache
def variants() -> dict[str, frozenset[str]]:
    """The names that every file registers."""
    found = {}
    for path in sources():
        if not path.startswith("tests/"):
            calls = (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call))
            names = {
                call.args[0].value
                for call in calls
                if getattr(call.func, "id", "") == "register" and call.args and isinstance(call.args[0], ast.Constant)
            }
            if names:
                found[path] = frozenset(names)
    return found


@functools.cache
def strings(path: str) -> frozenset[str]:
    """The strings that a file writes out."""
    constants = (node.value for node in ast.walk(tree(path)) if isinstance(node, ast.Constant))
    return frozenset(value for value in constants if isinstance(value, str))


def main() -> int:
    """Runs them; the exit status is that of the first run that fails."""
    changed = changed_files(sys.argv[1] if len(sys.argv) > 1 else "main")
    files, slugs = select(changed)
    runs = []
    if files:
        runs.append([*sorted(files), "-m", "not slow and not goldens"])
    if slugs and "tests" not in files:
        runs.append([*REGISTERED, "-m", "not slow", "-k", " or ".join(sorted(slugs))])
    print(f"{len(changed)} files changed, {len(runs) or 'no'} runs of tests", flush=True)
    for arguments in runs:
        command = [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "worksteal", *arguments]
        print(" ".join(command), flush=True)
        # 5: nothing was selected, as for a file whose tests are all slow.
        if (status := subprocess.run(command, cwd=ROOT).returncode) not in (0, 5):
            return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
