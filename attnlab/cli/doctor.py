"""`attnlab doctor`: versions, devices, and which implementation of each kernel works here."""

import dataclasses
import importlib.util
import os
import platform
from importlib import metadata

import tyro

import attnlab

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "chex",
    "scikit-learn",
    "matplotlib",
)
EXTRAS = {
    "gpu": {"jax_triton": "Triton kernels", "triton": "compiler of Triton kernels"},
    "tpu": {"libtpu": "TPU runtime and compiler"},
    "notebooks": {"nbclient": "runs notebooks", "ipykernel": "kernel of notebooks"},
    "test": {"pytest": "tests", "hypothesis": "tests of properties"},
}


@dataclasses.dataclass(frozen=True)
class DoctorOptions:
    """Print versions and devices, which implementations of each kernel work on this machine, and why others do not."""


def run(arguments: list[str]) -> int:
    """Runs the command; see `attnlab doctor --help`."""
    tyro.cli(DoctorOptions, args=arguments, prog="attnlab doctor")
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    sections = {
        "Versions": [(name, number, "") for name, number in versions().items()],
        "Devices": [(name, kind, "") for name, kind in devices()],
        "Kernels": kernels(),
        "Extras": extras(),
    }
    for title, rows in sections.items():
        grid = Table.grid(padding=(0, 2))
        for name, state, note in rows:
            style = {"works": "green", "installed": "green", "no": "yellow", "absent": "yellow"}.get(state, "")
            grid.add_row(Text(f"  {name}"), Text(state, style), Text(note))
        console.print(f"[bold]{title}[/bold]")
        console.print(grid)
        console.print()
    return 0


def versions() -> dict[str, str]:
    """Python's version and those of the packages that matter to a report of a problem."""
    found = {
        "python": f"{platform.python_version()} on {platform.platform(terse=True)}",
        "attnlab": attnlab.__version__,
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def devices() -> list[tuple[str, str]]:
    """Every device of JAX: its name and its kind."""
    import jax

    cores = f", {os.cpu_count()} cores" if jax.default_backend() == "cpu" else ""
    return [(str(device), f"{device.device_kind}{cores}") for device in jax.devices()]


def kernels() -> list[tuple[str, str, str]]:
    """For each implementation of each op its name, "works" or "no", and why not; then what is qualified."""
    import pallas_kernels
    from pallas_kernels import dispatch, qualification

    rows = []
    for op in pallas_kernels.dispatch.ops():
        for choice in pallas_kernels.dispatch.explain(op):
            rows.append((f"{op}: {choice.name}", "works" if choice.ok else "no", choice.reason))
    kind = dispatch.current_device_kind()
    if dispatch.current_platform() == "cpu":
        return [*rows, ("qualified", "xla", "kernels need a GPU or TPU")]
    chosen = [row for row in rows if row[1] == "works" and not row[0].endswith((": xla", ": reference"))]
    tried = "tried" if kind is not None and qualification.recall(kind) is not None else "not tried"
    names = ", ".join(name for name, _, _ in chosen) or "none"
    return [*rows, ("qualified", names, f"{tried} on {kind}; xla runs in place of what is not (`attnlab qualify`)")]


def extras() -> list[tuple[str, str, str]]:
    """For each package of the optional extras: whether it is there, found without importing it."""
    rows = []
    for extra, packages in EXTRAS.items():
        for package, purpose in packages.items():
            there = importlib.util.find_spec(package) is not None
            hint = purpose if there else f"{purpose}; pip install 'attnlab[{extra}]'"
            rows.append((f"{extra}: {package}", "installed" if there else "absent", hint))
    return rows
