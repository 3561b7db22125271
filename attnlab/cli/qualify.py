"""`attnlab qualify`: tries the kernels on this machine's device, so that those that are right and faster are chosen."""

import dataclasses
import sys

import tyro


@dataclasses.dataclass(frozen=True)
class QualifyOptions:
    """Try every kernel on this machine's device against float64, time it against `xla`, and remember the outcome.

    Attributes:
      force: try again what is remembered.
    """

    force: bool = False


def run(arguments: list[str]) -> int:
    """Runs the command; see `attnlab qualify --help`."""
    options = tyro.cli(QualifyOptions, args=arguments, prog="attnlab qualify")
    import pallas_kernels
    from pallas_kernels import dispatch, qualification

    kind = dispatch.current_device_kind()
    verdicts = pallas_kernels.qualify(force=options.force, announce=lambda text: print(text, flush=True))
    if not verdicts:
        print(f"there are no kernels to try on {kind}: xla runs, and needs no trial")
        return 0
    for (op, name), verdict in verdicts.items():
        print(f"{op}: {name}: {describe(verdict)}")
    print(f"remembered in {qualification.directory()}")
    return 0


def on_new_device() -> None:
    """What the training commands call: tries the kernels on a kind of device that was not tried yet, with one line."""
    import pallas_kernels

    pallas_kernels.qualify_new_device(lambda text: print(text, file=sys.stderr, flush=True))


def describe(verdict) -> str:
    """A `pallas_kernels.qualification.Verdict` in words."""
    times = ""
    if verdict.seconds is not None and verdict.xla_seconds is not None:
        times = f"{1e3 * verdict.seconds:.3g} ms, xla {1e3 * verdict.xla_seconds:.3g} ms"
    if verdict.reason:
        return f"not qualified: {verdict.reason}"
    return f"qualified ({times}; error {verdict.error:.2f} of what is allowed)"
