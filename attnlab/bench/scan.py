"""The selective scan: every implementation against the machine's bound, and against a loop over tokens.

A result is compared with float64 before its time counts: on the first tokens of the first and the last channel, with a
cotangent that is zero for all others, so that the gradients of what channels share come from these alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.bench.gate import TOLERANCE
from attnlab.bench.timing import measure_machine, median_seconds
from pallas_kernels import dispatch, selective_scan, selective_scan_step
from pallas_kernels.selective_scan import explain
from pallas_kernels.selective_scan.cases import SPEED, TOKENS, Case

OP = "selective_scan"
MODES = ("forward", "gradient", "decode")
OPERATIONS = 7  # per token, channel and number of the state, forward; the exponential counts as one
PREFIX = 512  # tokens that are compared
DECODE_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing to time.

    Attributes:
      name: of a case of the op's `SPEED`.
      dtype: of what belongs to tokens.
      mode: "forward"; "gradient", the forward and the backward pass; or "decode", one token of `DECODE_BATCH`.
    """

    name: str
    dtype: str = "float32"
    mode: str = "forward"

    def __post_init__(self) -> None:
        for field, allowed in (("mode", MODES), ("dtype", tuple(TOLERANCE)), ("name", names())):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")

    @property
    def case(self) -> Case:
        """The op's case."""
        case = next(case for case in SPEED if case.name == self.name)
        if self.mode == "decode":
            return dataclasses.replace(case, batch=DECODE_BATCH, length=1, initial_state=True)
        return case

    def minimum_bytes(self) -> int:
        """Bytes that any implementation moves: every input read once, every output written once.

        With the gradient: the forward pass, and a backward pass that reads the inputs and dy and writes the gradients.
        """
        arguments = jax.eval_shape(lambda: self.case.arguments(jnp.dtype(self.dtype))[0])
        sizes = {name: x.size * x.dtype.itemsize for name, x in arguments.items()}
        forward = sum(sizes.values()) + sizes["x"] + sizes.get("initial_state", 0)
        return forward if self.mode != "gradient" else forward + 2 * sum(sizes.values()) + sizes["x"]

    def operations(self) -> int:
        """Floating-point operations of the recurrence; three times as many with the gradient."""
        case = self.case
        once = OPERATIONS * case.batch * case.length * case.channels * case.state_size
        return once * (3 if self.mode == "gradient" else 1)

    def function(self, implementation: str | None) -> Callable[[dict[str, Any]], Any]:
        """From arguments to a tuple: y, and the state when decoding."""
        options = {"softplus": self.case.softplus}
        if self.mode != "decode":
            return lambda arrays: (selective_scan(**arrays, **options, implementation=implementation),)

        def decode(arrays: dict[str, Any]) -> Any:
            rest = {name: x[:, 0] if name in TOKENS else x for name, x in arrays.items()}
            first = [rest.pop(name) for name in ("x", "delta", "a", "b", "c", "initial_state")]
            return selective_scan_step(*first, **rest, **options)

        return decode

    def __str__(self) -> str:
        case = self.case
        sizes = f"B{case.batch} N{case.length} C{case.channels} S{case.state_size}"
        return f"{self.mode}, {sizes}, {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of a benchmark.

    Attributes:
      problem: what was solved.
      contender: by what.
      seconds: of a call; None where there is a reason.
      error: relative RMS error, None where it was not reached.
      fraction: share of the machine's bound.
      reason: why it was not timed; empty if it was.
      failed: whether it is attnlab's own, was tried, and gave no result or a wrong one.
    """

    problem: Problem
    contender: str
    seconds: float | None = None
    error: float | None = None
    fraction: float | None = None
    reason: str = ""
    failed: bool = False


def names() -> tuple[str, ...]:
    """Cases of the op."""
    return tuple(case.name for case in SPEED)


def solve(problem: Problem, budget: float = 0.5, peers: bool = True) -> Iterator[Result]:
    """Gates and times every contender, the best of ours first.

    Args:
      problem: what to solve.
      budget: seconds of timing for each.
      peers: whether a loop over tokens in plain JAX is timed too.
    """
    arrays, _ = problem.case.arguments(jnp.dtype(problem.dtype))
    machine = measure_machine(problem.dtype, problem.minimum_bytes())
    bound = machine.bound(problem.minimum_bytes(), problem.operations())
    gate = _Gate(problem, arrays)
    for name, function, own in _contenders(problem, arrays, peers):
        if isinstance(function, str):
            yield Result(problem, name, reason=function)
            continue
        try:
            seconds, error = _measure(problem, function, arrays, gate, budget)
        except Exception as failure:  # a line of the table: the other lines are worth having
            yield Result(problem, name, reason=f"{type(failure).__name__}: {str(failure)[:200]}", failed=own)
            continue
        if seconds is None:
            yield Result(problem, name, error=error, reason=f"its relative error is {error:.1e}", failed=own)
        else:
            yield Result(problem, name, seconds, error, bound / seconds)


def _contenders(problem: Problem, arrays: dict[str, Any], peers: bool) -> Iterator[tuple[str, Any, bool]]:
    """Name, function or why there is none, and whether it is attnlab's."""
    if problem.mode == "decode":
        yield "attnlab", problem.function(None), True
        return
    here = dispatch.current_platform(), dispatch.current_device_kind()
    with dispatch.target(*here, qualified_only=False):  # it names what it times, and has a gate of its own
        choices = explain(**arrays, softplus=problem.case.softplus)
    for choice in choices:
        if choice.name != "reference":
            yield f"attnlab {choice.name}", problem.function(choice.name) if choice.ok else choice.reason, True
    if peers:
        yield "a loop over tokens", problem.function("reference"), False


class _Gate:
    """Numbers in float64 for the first tokens of two channels, and gradients when only these have a cotangent."""

    def __init__(self, problem: Problem, arrays: dict[str, Any]) -> None:
        self.channels = np.unique([0, problem.case.channels - 1])
        self.tokens = min(PREFIX, problem.case.length)
        exact = {name: np.asarray(x.astype(jnp.float32), np.float64) for name, x in self.cut(arrays).items()}
        direction = np.random.default_rng(0).standard_normal(exact["x"].shape)
        self.dy = direction.astype(jnp.dtype(problem.dtype)).astype(np.float64)
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            exact = jax.tree.map(jnp.asarray, exact)
            function = problem.function(None if problem.mode == "decode" else "reference")
            if problem.mode == "gradient":
                y, pull = jax.vjp(function, exact)
                found = {"y": y[0]} | pull((jnp.asarray(self.dy),))[0]
            else:
                found = dict(zip(("y", "state"), function(exact), strict=False))
            self.expected = {name: np.asarray(x, np.float64) for name, x in found.items()}

    def cut(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Arguments, or gradients, of the chosen channels and tokens."""
        return {name: self._cut(name, x) for name, x in arrays.items()}

    def _cut(self, name: str, x: Any) -> Any:
        if name in ("b", "c"):
            return x[:1, : self.tokens]
        if name in ("a", "skip", "delta_bias"):
            return x[self.channels]
        if name in ("initial_state", "state"):
            return x[:1, self.channels]
        return x[:1, : self.tokens][..., self.channels] if x.ndim == 3 else x[:1][..., self.channels]

    def spread(self, like: jax.Array) -> jax.Array:
        """The cotangent of all of y."""
        where = np.ix_([0], range(self.tokens), self.channels)
        return jnp.zeros_like(like).at[where].set(jnp.asarray(self.dy, like.dtype))

    def error(self, got: dict[str, Any]) -> float:
        """Largest relative RMS error."""
        worst = 0.0
        for name, x in self.cut(got).items():
            want = self.expected[name]
            off = np.asarray(x.astype(jnp.float32), np.float64) - want
            error = float(np.sqrt(np.mean(off**2)) / (np.sqrt(np.mean(want**2)) or 1.0))
            worst = max(worst, error if np.isfinite(error) else np.inf)
        return worst


def _measure(
    problem: Problem, function: Callable[..., Any], arrays: dict[str, Any], gate: _Gate, budget: float
) -> tuple[float | None, float]:
    if problem.mode == "gradient":

        def run(arrays: dict[str, Any], dy: jax.Array) -> Any:
            (y,), pull = jax.vjp(function, arrays)
            return {"y": y} | pull((dy,))[0]

        dy = jax.random.normal(jax.random.key(1), arrays["x"].shape).astype(arrays["x"].dtype)
        call = jax.jit(run).lower(arrays, dy).compile()
        got, timed = call(arrays, gate.spread(dy)), functools.partial(call, arrays, dy)
    else:
        call = jax.jit(lambda arrays: dict(zip(("y", "state"), function(arrays), strict=False))).lower(arrays).compile()
        got, timed = call(arrays), functools.partial(call, arrays)
    error = gate.error(got)
    if not error <= TOLERANCE[problem.dtype] * (2 if problem.mode == "gradient" else 1):
        return None, error
    return median_seconds(timed, budget), error


def tables(results: Sequence[Result]) -> list[Any]:
    """A table for the terminal for each problem; what was not timed stands below it with the reason."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown: list[Any] = []
    for problem in dict.fromkeys(result.problem for result in results):
        rows = [result for result in results if result.problem == problem]
        first = next((row.seconds for row in rows if row.seconds), None)
        grid = Table(box=box.SIMPLE_HEAD, title=str(problem), title_justify="left", pad_edge=False)
        for index, column in enumerate(("contender", "ms", "tokens/s", "of bound", "time / first", "error")):
            grid.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in (row for row in rows if row.seconds):
            grid.add_row(
                row.contender,
                f"{1e3 * row.seconds:.3g}",
                f"{problem.case.batch * problem.case.length / row.seconds:.3g}",
                f"{100 * row.fraction:.1f} %",
                f"{row.seconds / first:.2f}",
                f"{row.error:.1e}",
            )
        shown.append(grid)
        shown += [Text(f"{row.contender}: {row.reason}", "yellow") for row in rows if row.reason]
        shown.append(Text())
    return shown
