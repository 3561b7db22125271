"""Gates and times every contender at every problem."""

import contextlib
import dataclasses
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import attnlab
from attnlab.bench import gate as gates
from attnlab.bench.contenders import Contender, Measurement, contenders, measure
from attnlab.bench.problem import Problem
from attnlab.bench.timing import Machine, measure_machine
from attnlab.bench.torch_peers import TorchPeers


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of a benchmark.

    Attributes:
      problem: what was solved.
      contender: by what.
      own: whether it is an implementation of attnlab.
      seconds: of a call; None where there is a reason.
      error: relative RMS error, None where it was not reached.
      fraction: share of the machine's bound, for what does not compute softmax attention.
      memory: bytes over those of inputs, outputs and gradients; None where it is not known.
      reason: why it was not timed; empty if it was.
      failed: whether it is attnlab's own, was tried, and gave no result or a wrong one.
    """

    problem: Problem
    contender: str
    own: bool
    seconds: float | None = None
    error: float | None = None
    fraction: float | None = None
    memory: float | None = None
    reason: str = ""
    failed: bool = False

    @property
    def bytes_per_second(self) -> float | None:
        """The least bytes of the problem over the time."""
        return self.problem.minimum_bytes() / self.seconds if self.seconds else None

    @property
    def operations_per_second(self) -> float | None:
        """The operations of the recurrence over the time."""
        return self.problem.operations() / self.seconds if self.seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """B·N over the time."""
        return self.problem.shape.batch * self.problem.shape.length / self.seconds if self.seconds else None


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a benchmark is run.

    Attributes:
      budget: seconds of timing for each contender and problem.
      peers: whether others than attnlab's implementations are timed.
      torch_python: interpreter with PyTorch; this one when None.
    """

    budget: float = 0.5
    peers: bool = True
    torch_python: str | None = None


def run(
    problems: Sequence[Problem], settings: Settings, note: Callable[[str], None] = lambda _: None
) -> Iterator[list[Result]]:
    """Results of every contender, a problem at a time.

    Args:
      problems: what to solve.
      settings: how.
      note: told what is being done, for a progress bar.
    """
    with TorchPeers(settings.torch_python) if settings.peers else contextlib.nullcontext() as torch:
        for problem in problems:
            note(str(problem))
            yield list(_solve(problem, settings, torch))


def _solve(problem: Problem, settings: Settings, torch: TorchPeers | None) -> Iterator[Result]:
    machine = measure_machine(problem.dtype, problem.minimum_bytes())
    arrays = problem.draw()
    linear = gates.make(problem, arrays)
    softmax = gates.make(problem, arrays, softmax=True) if settings.peers and problem.mode != "decode" else None
    found, refused = contenders(problem, arrays)
    for contender in found:
        if not contender.own and not settings.peers:
            continue
        allowed = gates.tolerance(problem) if contender.own else gates.PEER_TOLERANCE
        try:
            measured = measure(
                contender, problem, arrays, softmax if contender.softmax else linear, allowed, settings.budget
            )
        except Exception as error:  # a line of the table: the other lines are worth having
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            yield Result(problem, contender.name, contender.own, reason=reason, failed=contender.own)
            continue
        yield _result(problem, machine, contender, measured, allowed)
    for name, reason in refused.items():
        yield Result(problem, name, name.startswith("attnlab"), reason=reason)
    del arrays
    if torch is None:
        return
    kinds = {"linear": linear} | ({} if softmax is None else {"softmax": softmax})
    for name, answer in torch.measure(problem, kinds, settings.budget).items():
        seconds = answer.get("seconds")
        bound = machine.bound(problem.minimum_bytes(), problem.operations())
        yield Result(
            problem,
            name,
            False,
            seconds,
            answer.get("error"),
            bound / seconds if seconds and "softmax" not in name else None,
            reason=answer.get("reason", ""),
        )


def _result(problem: Problem, machine: Machine, contender: Contender, measured: Measurement, allowed: float) -> Result:
    if measured.seconds is None:
        reason = f"its relative error is {measured.error:.1e}, above {allowed:.0e}: a wrong result is not timed"
        return Result(problem, contender.name, contender.own, error=measured.error, reason=reason, failed=contender.own)
    bound = machine.bound(problem.minimum_bytes(), problem.operations())
    # What a call holds at least: inputs, outputs and, with the gradient, dy and the gradients:
    # what moves, but the inputs once, which the backward pass reads again.
    inputs = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(_structs(problem)))
    least = problem.minimum_bytes() - (inputs if problem.mode == "gradient" else 0)
    return Result(
        problem,
        contender.name,
        contender.own,
        measured.seconds,
        measured.error,
        None if contender.softmax else bound / measured.seconds,
        measured.memory / least if measured.memory and problem.mode != "decode" and not contender.softmax else None,
    )


def _structs(problem: Problem) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in problem.inputs().items()}


def save(results: Sequence[Result], path: Path, command: str) -> None:
    """Writes everything that was measured, and on what, as JSON."""
    rows = [
        dataclasses.asdict(result)
        | {
            "minimum_bytes": result.problem.minimum_bytes(),
            "operations": result.problem.operations(),
            "machine": dataclasses.asdict(measure_machine(result.problem.dtype, result.problem.minimum_bytes())),
            "bytes_per_second": result.bytes_per_second,
            "operations_per_second": result.operations_per_second,
            "tokens_per_second": result.tokens_per_second,
        }
        for result in results
    ]
    write(rows, path, command)


def write(rows: Sequence[Mapping[str, Any]], path: Path, command: str) -> None:
    """Writes rows of results with the versions that made them, as JSON."""
    versions = {"attnlab": attnlab.__version__, "python": platform.python_version()}
    versions |= {package: metadata.version(package) for package in ("jax", "jaxlib")}
    text = json.dumps({"command": command, "versions": versions, "results": rows}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
