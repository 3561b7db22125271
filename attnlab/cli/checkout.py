"""The checkout of the repository that this package is run from, for the commands that write into it."""

from pathlib import Path


def root() -> Path:
    """Its folder.

    Raises:
      FileNotFoundError: if the package was installed without one.
    """
    path = Path(__file__).resolve().parents[2]
    if not (path / "README.md").is_file() or not (path / "tests").is_dir():
        raise FileNotFoundError(f"{path}: no README.md and tests there; this is done in a checkout of the repository")
    return path
