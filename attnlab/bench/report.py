"""The table of a benchmark, and tokens per second against length."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter, NullLocator

from attnlab import figures
from attnlab.bench.problem import Problem
from attnlab.bench.runner import Result

COLUMNS = ("contender", "ms", "GB/s", "TFLOP/s", "of bound", "memory", "error", "time, first = 1")


def cells(result: Result, first: Result) -> tuple[str, ...]:
    """The cells of `COLUMNS` for one result; `first` is what times are compared with."""
    if result.seconds is None:
        return (result.contender, "", "", "", "", "", "" if result.error is None else f"{result.error:.1e}", "")
    ratio = result.seconds / first.seconds if first.seconds else None
    return (
        result.contender,
        f"{1e3 * result.seconds:.3g}",
        f"{result.bytes_per_second / 1e9:.3g}" if result.fraction else "",
        f"{result.operations_per_second / 1e12:.3g}" if result.fraction else "",
        f"{100 * result.fraction:.0f} %" if result.fraction else "",
        f"{result.memory:.2f}" if result.memory else "",
        f"{result.error:.1e}",
        "" if ratio is None else f"{ratio:.2f}",
    )


def tables(results: Sequence[Result]) -> list[Any]:
    """A table for the terminal for each problem; what was not timed stands below it with the reason."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown: list[Any] = []
    for problem in dict.fromkeys(result.problem for result in results):
        rows = [result for result in results if result.problem == problem]
        first = next((row for row in rows if row.seconds), rows[0])
        grid = Table(box=box.SIMPLE_HEAD, title=str(problem), title_justify="left", pad_edge=False)
        for index, column in enumerate(COLUMNS):
            grid.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            if not row.reason:
                grid.add_row(*cells(row, first))
        shown.append(grid)
        shown += [Text(f"{row.contender}: {row.reason}", "yellow") for row in rows if row.reason]
        shown.append(Text())
    return shown


TPU_TITLE = "TPU kernel, counted from its grid and blocks: bytes per token and head"
TPUS = ("TPU v5e", "TPU v5p", "TPU v6e", "TPU7x")


def tpu_bytes(problems: Sequence[Problem]) -> Any | None:
    """A table of what the TPU kernel of linear attention moves and holds, counted from its grid and its blocks.

    Bytes per token and head, over the least possible, of a forward pass that will be differentiated and of the backward
    pass, and the on-chip memory of the larger of the two. It needs no TPU. None if no problem is one of linear
    attention.
    """
    from rich import box
    from rich.table import Table

    from pallas_kernels import dispatch
    from pallas_kernels.linear_attention.tpu import op as tpu
    from pallas_kernels.recurrence import Arguments

    grid = Table(box=box.SIMPLE_HEAD, title=TPU_TITLE, title_justify="left", pad_edge=False)
    columns = ("", "chip", "forward", "of least", "backward", "of least", "on chip", "of memory")
    for index, column in enumerate(columns):
        grid.add_column(column, justify="right" if index > 1 else "left", no_wrap=True)
    chosen = [p for p in problems if p.op == "linear_attention" and p.mode != "decode"]
    for problem in dict.fromkeys(dataclasses.replace(p, mode="gradient") for p in chosen):
        inputs = problem.inputs().items()
        args = Arguments(**{name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in inputs})
        for kind in TPUS:
            with dispatch.target("tpu", kind):
                plans, moved = tpu.plans(args), tpu.traffic(args)
            held = max(plan.vmem(name) for plan in plans for name in ("keep", "backward"))
            label = f"{problem.shape}, {problem.dtype}, {problem.decay}" if kind == TPUS[0] else ""
            cells = [label, kind.removeprefix("TPU ")]
            for name in ("forward", "backward"):
                cells += [f"{moved[name]:.0f}", f"{moved[name] / moved[f'{name}_minimum']:.2f}"]
            grid.add_row(*cells, f"{held / 2**20:.1f} MiB", f"{100 * held / plans[0].config.chip.vmem:.0f} %")
    return grid if chosen else None


def draw(results: Sequence[Result], folder: Path) -> dict[str, Path]:
    """Figure of tokens per second against length, for each mode; nothing where there is only one length."""
    drawn = {}
    for mode in dict.fromkeys(result.problem.mode for result in results):
        chosen = [result for result in results if result.problem.mode == mode and result.seconds]
        if len({result.problem.shape.length for result in chosen}) > 1:
            drawn[f"throughput_{mode}"] = lambda theme, chosen=chosen: throughput(chosen, theme)
    return figures.save(drawn, folder) if drawn else {}


def throughput(results: Sequence[Result], theme: figures.Theme) -> Figure:
    """Tokens per second of every contender against the length, at one number of tokens."""
    names = list(dict.fromkeys(result.contender for result in results))
    looks = figures.looks(names, theme)
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    ends = []
    for name in names:
        points = sorted((r.problem.shape.length, r.tokens_per_second) for r in results if r.contender == name)
        axes.plot(*zip(*points, strict=True), marker=looks[name]["marker"], markersize=4, **figures.line(looks[name]))
        ends.append((name, *points[-1]))
    first = results[0].problem
    title = {"forward": "Forward", "gradient": "Forward and backward"}.get(first.mode, first.mode)
    tokens = first.shape.batch * first.shape.length
    axes.set(xscale="log", yscale="log", xlabel="tokens in a sequence (N)", ylabel="tokens per second")
    axes.set_title(f"{title}: {tokens} tokens, H{first.shape.heads} D{first.shape.key_size}, {first.dtype}")
    lengths = sorted({result.problem.shape.length for result in results})
    axes.set_xticks(lengths, [short(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_minor_formatter(NullFormatter())
    figures.label_ends(axes, ends, looks)
    return figure


def short(length: int) -> str:
    """A length as it stands at an axis: 4096 is 4k."""
    for size, suffix in ((2**20, "M"), (2**10, "k")):
        if length % size == 0:
            return f"{length // size}{suffix}"
    return str(length)
