"""The table of a benchmark, and tokens per second against length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter, NullLocator

from attnlab import figures
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
        grid = Table(box=box.SIMPLE_HEAD, title=str(problem), title_justify="left", pad_edge=False)
        for index, column in enumerate(COLUMNS):
            grid.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            if not row.reason:
                grid.add_row(*cells(row, rows[0]))
        shown.append(grid)
        shown += [Text(f"{row.contender}: {row.reason}", "yellow") for row in rows if row.reason]
        shown.append(Text())
    return shown


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
    axes.set_xticks(lengths, [_short(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_minor_formatter(NullFormatter())
    figures.label_ends(axes, ends, looks)
    return figure


def _short(length: int) -> str:
    for size, suffix in ((2**20, "M"), (2**10, "k")):
        if length % size == 0:
            return f"{length // size}{suffix}"
    return str(length)
