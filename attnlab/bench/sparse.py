"""Sparse softmax attention: every implementation against dense attention, at the cost of what it visits.

Dense attention is `block_sparse_attention` without a mask, which builds no weights either.

A result is compared with float64 before its time counts: on some queries of the first and the last head, with a
cotangent that is zero for all others. *Efficiency* is how much of the saving in pairs becomes one in time: (time of
dense attention / time) / (pairs of dense attention / pairs that are allowed).
"""

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab import figures
from attnlab.bench import sparse_torch
from attnlab.bench.cpu import Peer
from attnlab.bench.gate import PEER_TOLERANCE
from attnlab.bench.timing import measure_machine, median_seconds
from pallas_kernels import block_sparse_attention, dispatch
from pallas_kernels.block_lists import lower
from pallas_kernels.block_sparse_attention.cases import SPEED as BLOCK_SPARSE
from pallas_kernels.masks import Full, Mask
from pallas_kernels.neighborhood_attention import neighborhood_mask
from pallas_kernels.neighborhood_attention.cases import SPEED as NEIGHBORHOOD

OPS = ("block_sparse_attention", "neighborhood_attention")
MODES = ("forward", "gradient")
TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 4e-3}
CHECKED = 32  # queries of a head that are compared
DENSE_BYTES = 2**30  # of the N×N weights, beyond which they are not built
BLOCK = 16  # of the count of pairs
ROUNDS = 5  # in which attnlab and PyTorch take turns


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing to time.

    Attributes:
      op: one of `OPS`.
      name: of a case of the op's `SPEED`.
      dtype: of q, k, v.
      mode: "forward", or "gradient" for the forward and the backward pass.
    """

    op: str
    name: str
    dtype: str = "float32"
    mode: str = "forward"

    def __post_init__(self) -> None:
        for field, allowed in (("op", OPS), ("mode", MODES), ("dtype", tuple(TOLERANCE)), ("name", names(self.op))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")

    @property
    def case(self) -> Any:
        """The op's case."""
        cases = BLOCK_SPARSE if self.op == OPS[0] else NEIGHBORHOOD
        return next(case for case in cases if case.name == self.name)

    @property
    def mask(self) -> Mask:
        """Who sees whom, tokens in row-major order."""
        case = self.case
        if self.op == OPS[0]:
            return case.mask or Full()
        options = {name: getattr(case, name) for name in ("stride", "dilation", "is_causal")}
        return neighborhood_mask(case.shape, case.kernel_size, **options)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(B, N, H, D)."""
        case = self.case
        tokens = case.queries if self.op == OPS[0] else math.prod(case.shape)
        return case.batch, tokens, case.heads, case.key_size

    def axes(self) -> tuple[list[sparse_torch.Axis], int] | None:
        """The mask as PyTorch is told it, with the keys that all see; None where it is of another form."""
        case = self.case
        if self.op == OPS[0]:
            prefix = 64 if self.name.startswith("global") else 0
            axis = sparse_torch.axis_of(self.mask, case.queries, prefix=prefix)
            return None if axis is None else ([axis], prefix)
        axes: list[sparse_torch.Axis | None] = []
        for number, length in enumerate(case.shape):
            options = {name: getattr(case, name) for name in ("kernel_size", "stride", "dilation", "is_causal")}
            own = {name: x[number] if isinstance(x, tuple) else x for name, x in options.items()}
            mask = neighborhood_mask((length,), own.pop("kernel_size"), **own)
            axes.append(sparse_torch.axis_of(mask, length, period=own["dilation"]))
        formed = [axis for axis in axes if axis is not None]
        return (formed, 0) if len(formed) == len(axes) else None

    @functools.cached_property
    def share(self) -> float:
        """Share of the pairs that are in blocks of 16 with an allowed one."""
        n = self.sizes[1]
        return lower(self.mask, n, n, min(BLOCK, n), min(BLOCK, n)).fraction

    def operations(self) -> float:
        """Floating-point operations of the products on allowed pairs; 3.5 times as many with the gradient."""
        b, n, h, d = self.sizes
        return 4 * b * h * n * n * d * self.share * (3.5 if self.mode == "gradient" else 1)

    def function(self, implementation: str) -> Callable[..., jax.Array]:
        """(q, k, v), each (B, N, H, D), to y."""
        case = self.case
        op = getattr(importlib.import_module(f"pallas_kernels.{self.op}"), self.op)
        if self.op == OPS[0]:
            return lambda q, k, v: op(q, k, v, mask=case.mask, implementation=implementation)

        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            arrays = (x.reshape(x.shape[0], *case.shape, *x.shape[2:]) for x in (q, k, v))
            return op(*arrays, **case.options, implementation=implementation).reshape(q.shape)

        return run

    def __str__(self) -> str:
        b, n, h, d = self.sizes
        return f"{self.name}, {self.mode}, B{b} N{n} H{h} D{d}, {self.dtype}, {100 * self.share:.3g} % of the pairs"


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of a benchmark.

    Attributes:
      problem: what was solved.
      contender: by what.
      seconds: of a call; None where there is a reason.
      error: relative RMS error, None where it was not reached.
      rate: share of the machine's matrix rate that the products on allowed pairs take.
      efficiency: see the module; None without dense attention.
      ours: of PyTorch, seconds of attnlab's in turns with it.
      reason: why it was not timed; empty if it was.
      failed: whether it is attnlab's own, was tried, and gave no result or a wrong one.
    """

    problem: Problem
    contender: str
    seconds: float | None = None
    error: float | None = None
    rate: float | None = None
    efficiency: float | None = None
    ours: float | None = None
    reason: str = ""
    failed: bool = False


def names(op: str) -> tuple[str, ...]:
    """Cases of an op."""
    return tuple(case.name for case in (BLOCK_SPARSE if op == OPS[0] else NEIGHBORHOOD))


def solve(problem: Problem, budget: float = 0.5, peers: bool = True, torch: Peer | None = None) -> Iterator[Result]:
    """Gates and times every contender, dense attention first.

    Args:
      problem: what to solve.
      budget: seconds of timing for each.
      peers: whether what is not attnlab's is timed too.
      torch: a process with PyTorch, which is then timed too, in turns with `xla`.
    """
    b, n, h, d = problem.sizes
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((b, n, h, d)), problem.dtype) for _ in range(4)]
    gate = _Gate(problem, arrays)
    rate = measure_machine(problem.dtype, 4 * b * n * h * d * arrays[0].dtype.itemsize).rate
    dense: float | None = None
    for name, function, own, masked in _contenders(problem, peers):
        if isinstance(function, str):
            yield Result(problem, name, reason=function)
            continue
        try:
            seconds, error = _measure(problem, function, arrays, gate if masked else None, own, budget)
        except Exception as failure:  # a line of the table: the other lines are worth having
            yield Result(problem, name, reason=f"{type(failure).__name__}: {str(failure)[:200]}", failed=own)
            continue
        if seconds is None:
            yield Result(problem, name, error=error, reason=f"its relative error is {error:.1e}", failed=own)
            continue
        if not masked:
            dense = seconds
            yield Result(problem, name, seconds, rate=problem.operations() / problem.share / seconds / rate)
            continue
        efficiency = None if dense is None else dense / seconds * problem.share
        yield Result(problem, name, seconds, error, problem.operations() / seconds / rate, efficiency)
    if torch is None or not peers:
        return
    for contender, name in sparse_torch.CONTENDERS.items():
        try:
            seconds, own_seconds, error = _against_torch(problem, contender, torch, arrays, gate, budget)
        except Exception as failure:  # as above
            yield Result(problem, name, reason=str(failure)[:200])
            continue
        efficiency = None if dense is None else dense / seconds * problem.share
        yield Result(problem, name, seconds, error, problem.operations() / seconds / rate, efficiency, own_seconds)


def _against_torch(
    problem: Problem, contender: str, torch: Peer, arrays: Sequence[jax.Array], gate: "_Gate", budget: float
) -> tuple[float, float, float]:
    """Seconds of PyTorch, those of attnlab's `xla` in turns with it, and the error of PyTorch."""
    n = problem.sizes[1]
    if problem.dtype != "float32" or dispatch.current_platform() != "cpu":
        raise RuntimeError("PyTorch is compared with in float32 on a CPU")
    if contender == "sdpa" and 5 * n * n > DENSE_BYTES:
        raise RuntimeError(f"its mask would take {5 * n * n / 2**30:.1f} GiB")
    if (form := problem.axes()) is None:
        raise RuntimeError("the mask has no form that PyTorch is told here")
    given = {name: np.asarray(x) for name, x in zip("qkv", arrays, strict=False)}
    given["dy"] = gate.dy.astype(np.float32)
    error, theirs = sparse_torch.times(torch, contender, *form, given, problem.mode, gate.error)
    if not error <= PEER_TOLERANCE:
        raise RuntimeError(f"its relative error is {error:.1e}")
    *_, own = _calls(problem, problem.function("xla"), arrays)
    rounds = [(theirs(budget / ROUNDS), median_seconds(own, budget / ROUNDS)) for _ in range(ROUNDS)]
    return median(one for one, _ in rounds), median(one for _, one in rounds), error


def _contenders(problem: Problem, peers: bool) -> Iterator[tuple[str, Any, bool, bool]]:
    """Name, function or why there is none, whether it is attnlab's, and whether it masks."""
    b, n, h, _ = problem.sizes
    yield "dense", block_sparse_attention, False, False
    peer = "jax.nn.dot_product_attention, masked"
    if peers and 4 * b * h * n * n > DENSE_BYTES:
        yield peer, f"its weights would take {4 * b * h * n * n / 2**30:.1f} GiB", False, True
    elif peers:
        yield peer, functools.partial(_masked, problem.mask), False, True
    here = dispatch.current_platform(), dispatch.current_device_kind()
    shape = jax.ShapeDtypeStruct(problem.sizes, jnp.dtype(problem.dtype))
    for entry in dispatch.implementations(problem.op):
        if entry.name == "reference":
            continue
        reason = entry.refusal(None, here[0])
        name = f"attnlab {entry.name}"
        if reason is None:
            try:
                jax.eval_shape(problem.function(entry.name), shape, shape, shape)
            except dispatch.UnsupportedError as error:
                reason = str(error)
        yield name, reason or problem.function(entry.name), True, True


def _masked(mask: Mask, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    tokens = jnp.arange(q.shape[1])
    return jax.nn.dot_product_attention(q, k, v, mask=mask(tokens[:, None], tokens)[None, None], implementation="xla")


class _Gate:
    """Numbers in float64 for some queries of two heads, and their gradients when only these have a cotangent."""

    def __init__(self, problem: Problem, arrays: Sequence[jax.Array]) -> None:
        b, n, h, d = problem.sizes
        self.heads = tuple(dict.fromkeys([(0, 0), (b - 1, h - 1)]))
        self.queries = np.unique(np.linspace(0, n - 1, min(CHECKED, n)).astype(int))
        self.dy = np.zeros(arrays[3].shape, np.float64)
        seen = np.asarray(problem.mask(self.queries[:, None], np.arange(n)[None]))
        self.expected: dict[str, list[np.ndarray]] = {"y": [], "q": [], "k": [], "v": []}
        for at in self.heads:
            q, k, v, dy = (np.asarray(x[at[0], :, at[1]].astype(jnp.float32), np.float64) for x in arrays)
            q, dy = q[self.queries], dy[self.queries]
            self.dy[at[0], self.queries, at[1]] = dy
            s = np.where(seen, q @ k.T * d**-0.5, -np.inf)
            p = np.exp(s - s.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            y = p @ v
            ds = p * (dy @ v.T - (dy * y).sum(-1, keepdims=True)) * d**-0.5
            for name, x in (("y", y), ("q", ds @ k), ("k", ds.T @ q), ("v", p.T @ dy)):
                self.expected[name].append(x)

    def error(self, name: str, got: jax.Array | np.ndarray) -> float:
        """Relative RMS error of an output or a gradient."""
        worst = 0.0
        for at, want in zip(self.heads, self.expected[name], strict=True):
            x = np.asarray(got[at[0], :, at[1]].astype(np.float32), np.float64)
            x = x[self.queries] if name in ("y", "q") else x
            off = np.sqrt(np.mean((x - want) ** 2)) / (np.sqrt(np.mean(want**2)) or 1.0)
            worst = max(worst, float(off) if np.isfinite(off) else math.inf)
        return worst


def _calls(
    problem: Problem, function: Any, arrays: Sequence[jax.Array]
) -> tuple[tuple[str, ...], Callable[[Any], Any], Callable[[], Any]]:
    """Names of the results, a compiled call with a cotangent, and the one that is timed."""
    q, k, v, dy = arrays
    if problem.mode == "gradient":

        def run(q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array) -> Any:
            y, pull = jax.vjp(function, q, k, v)
            return y, *pull(dy)

        call = jax.jit(run).lower(q, k, v, dy).compile()
        return ("y", "q", "k", "v"), functools.partial(call, q, k, v), functools.partial(call, q, k, v, dy)
    call = jax.jit(lambda q, k, v: (function(q, k, v),)).lower(q, k, v).compile()
    return ("y",), lambda dy: call(q, k, v), functools.partial(call, q, k, v)


def _measure(
    problem: Problem, function: Any, arrays: Sequence[jax.Array], gate: _Gate | None, own: bool, budget: float
) -> tuple[float | None, float | None]:
    names_, checked, timed = _calls(problem, function, arrays)
    error = None
    if gate is not None:
        error = max(
            gate.error(name, x) for name, x in zip(names_, checked(jnp.asarray(gate.dy, arrays[0].dtype)), strict=True)
        )
        allowed = TOLERANCE[problem.dtype] * (2 if problem.mode == "gradient" else 1) if own else PEER_TOLERANCE
        if not error <= allowed:
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
        dense = next((row.seconds for row in rows if row.contender == "dense"), None)
        grid = Table(box=box.SIMPLE_HEAD, title=str(problem), title_justify="left", pad_edge=False)
        for index, column in enumerate(
            ("contender", "ms", "dense / it", "of matrix rate", "efficiency", "error", "xla / it")
        ):
            grid.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in (row for row in rows if row.seconds):
            grid.add_row(
                row.contender,
                f"{1e3 * row.seconds:.3g}",
                f"{dense / row.seconds:.2f}" if dense else "",
                f"{100 * row.rate:.0f} %" if row.rate else "",
                f"{row.efficiency:.2f}" if row.efficiency else "",
                f"{row.error:.1e}" if row.error is not None else "",
                f"{row.ours / row.seconds:.2f}" if row.ours else "",
            )
        shown.append(grid)
        shown += [Text(f"{row.contender}: {row.reason}", "yellow") for row in rows if row.reason]
        shown.append(Text())
    return shown


def draw(results: Sequence[Result], folder: Path) -> dict[str, Path]:
    """A figure of the times of all contenders for each mode."""
    drawn = {}
    for mode in MODES:
        chosen = [result for result in results if result.problem.mode == mode and result.seconds]
        if chosen:
            drawn[f"times_{mode}"] = functools.partial(_times, chosen)
    return figures.save(drawn, folder) if drawn else {}


def _times(results: Sequence[Result], theme: figures.Theme) -> Any:
    from matplotlib.figure import Figure

    problems = list(dict.fromkeys(result.problem for result in results))
    contenders = list(dict.fromkeys(result.contender for result in results))
    looks = figures.looks(contenders, theme)
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(contenders):
        own = [(problems.index(r.problem), 1e3 * r.seconds) for r in results if r.contender == name and r.seconds]
        places = [at + (number - (len(contenders) - 1) / 2) * 0.8 / len(contenders) for at, _ in own]
        width = 0.75 / len(contenders)
        axes.bar(places, [ms for _, ms in own], width, label=name, color=looks[name]["color"])
    axes.set_xticks(range(len(problems)), [problem.name.replace("_", "\n") for problem in problems])
    axes.set(yscale="log", ylabel="milliseconds")
    axes.set_title({"forward": "Forward", "gradient": "Forward and backward"}[results[0].problem.mode])
    axes.legend()
    return figure
