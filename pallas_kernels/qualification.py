"""Which kernels are qualified on a kind of device: what the release lists, and what was tried on the machine at hand.

A kernel is an implementation for particular platforms. It is qualified where it ran, was right, and was faster than
`xla`; `pallas_kernels.trials` finds that out, and this module remembers it, in a file of the user's cache directory per
kind of device, versions of what compiles there, and source of this package. `PALLAS_KERNELS_CACHE_DIR` names another
directory. A file that cannot be read counts as none, and is written anew by the next trials.
"""

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

# (op, implementation) by kind of device, as JAX names it: kernels that a release was tried with. None has been.
RELEASED: Mapping[str, frozenset[tuple[str, str]]] = {}
PACKAGES = ("jax", "jaxlib", "libtpu", "triton", "jax-triton")
HINT = "run attnlab qualify"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What trials said of a kernel on a kind of device.

    Attributes:
      right: whether all cases that it took were right, and it took one.
      reason: why it is not qualified; empty when it is.
      error: largest relative RMS error over its tolerance; None if nothing ran.
      seconds: of all cases that are timed; None if it was not timed.
      xla_seconds: of `xla` on the same.
    """

    right: bool
    reason: str = ""
    error: float | None = None
    seconds: float | None = None
    xla_seconds: float | None = None

    @property
    def qualified(self) -> bool:
        """Whether the kernel is chosen by itself."""
        return not self.reason


Verdicts = dict[tuple[str, str], Verdict]  # by op and implementation

_adopted: dict[str, Verdicts] = {}  # of this process, by file name


def refusal(op: str, implementation: str, device_kind: str | None) -> str | None:
    """Why a kernel is not qualified on a kind of device; None when it is."""
    where = device_kind or "an unknown device"
    if device_kind is not None:
        if (op, implementation) in RELEASED.get(device_kind, ()):
            return None
        verdict = (recall(device_kind) or {}).get((op, implementation))
        if verdict is not None:
            return f"not qualified on {where}: {verdict.reason}" if verdict.reason else None
    return f"not qualified on {where}: {HINT}"


def recall(device_kind: str) -> Verdicts | None:
    """What is remembered of a kind of device, under the versions at hand; None if it was not tried."""
    name = _file_name(device_kind)
    if name not in _adopted:
        verdicts = _read(directory() / name)
        if verdicts is None:
            return None
        _adopted[name] = verdicts
    return _adopted[name]


def adopt(device_kind: str, verdicts: Verdicts) -> None:
    """Has this process know of verdicts, without a file."""
    _adopted[_file_name(device_kind)] = dict(verdicts)


def remember(device_kind: str, verdicts: Verdicts) -> Path | None:
    """Writes verdicts down, for later processes too.

    Returns:
      The file; None, with a warning, where it cannot be written.
    """
    adopt(device_kind, verdicts)
    path = directory() / _file_name(device_kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            file.write(dumped(device_kind, verdicts))
        Path(file.name).replace(path)  # other processes see the old file or the new one
    except OSError as error:
        warnings.warn(f"what was qualified on {device_kind} is forgotten when this process ends: {error}", stacklevel=2)
        return None
    return path


def dumped(device_kind: str, verdicts: Verdicts) -> str:
    """Verdicts as text, with what they hold for."""
    entries = [[op, name, dataclasses.asdict(verdict)] for (op, name), verdict in sorted(verdicts.items())]
    return json.dumps({"device_kind": device_kind, **versions(), "verdicts": entries}, indent=1)


def loaded(text: str) -> Verdicts:
    """Inverse of `dumped`.

    Raises:
      ValueError: if the text is not of that form.
    """
    try:
        return {(str(op), str(name)): Verdict(**fields) for op, name, fields in json.loads(text)["verdicts"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no verdicts: {error!r}") from error


def directory() -> Path:
    """Where files of verdicts lie."""
    chosen = os.environ.get("PALLAS_KERNELS_CACHE_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen or f"{cache}/pallas_kernels").expanduser()


@functools.cache
def versions() -> dict[str, str]:
    """What verdicts depend on beside the kind of device: versions of packages, and a hash of this one's source."""
    found = {"source": _source()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def _file_name(device_kind: str) -> str:
    key = json.dumps({"device_kind": device_kind, **versions()}, sort_keys=True)
    return f"qualified-{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"


@functools.cache
def _source() -> str:
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def _read(path: Path) -> Verdicts | None:
    try:
        return loaded(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
        warnings.warn(f"{path} cannot be read and counts as absent: {error}", stacklevel=2)
        return None
