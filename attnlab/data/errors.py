"""The one error of data sources, and the hints that go with misspelt names."""

from pathlib import Path


class DataError(ValueError):
    """A data file or directory is missing or broken."""


def data_error(path: str | Path, problem: str, *, expected: str, get_it: str) -> DataError:
    """Makes a `DataError` that says which path, what is wrong with it, what was expected and where to get it."""
    return DataError(f"{path}: {problem}\n  expected: {expected}\n  where to get it: {get_it}")


def check_fraction(name: str, value: float) -> None:
    """Refuses a share of the examples that would leave a split empty.

    Raises:
      ValueError: unless 0 < value < 1.
    """
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, both excluded, not {value}")


def existing(path: str | Path, kind: str, *, expected: str, get_it: str) -> Path:
    """Returns the path, with `~` resolved.

    Args:
      path: as the user wrote it.
      kind: "file", "directory" or "file or directory".
      expected: what should be there, for the message.
      get_it: where to get it, for the message.

    Raises:
      DataError: if there is nothing, or something of another kind.
    """
    resolved = Path(path).expanduser()
    if not str(path):
        raise data_error("(no path)", "no path was given", expected=expected, get_it=get_it)
    if not resolved.exists():
        raise data_error(resolved, f"no such {kind}", expected=expected, get_it=get_it)
    if (kind == "file" and not resolved.is_file()) or (kind == "directory" and not resolved.is_dir()):
        raise data_error(resolved, f"is not a {kind}", expected=expected, get_it=get_it)
    return resolved
