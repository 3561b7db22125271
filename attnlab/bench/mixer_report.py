"""The table of a benchmark of mixers, its JSON, and time against length."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from attnlab import figures
from attnlab.bench import runner
from attnlab.bench.mixers import MixerResult
from attnlab.bench.report import short

MODES = {"forward": "Forward", "gradient": "Forward and backward"}
COLUMNS = ("mixer", "parameters", "forward, ms", "with gradient, ms", "tokens/s", "memory, MiB", "time, first = 1")


def cells(result: MixerResult, first: MixerResult) -> tuple[str, ...]:
    """The cells of `COLUMNS` of a mixer that was timed; `first` is what its time with the gradient is compared with."""
    return (
        result.mixer,
        f"{result.parameters:,}",
        f"{1e3 * result.forward:.3g}",
        f"{1e3 * result.gradient:.3g}",
        f"{result.tokens_per_second('gradient'):,.0f}",
        "" if result.memory is None else f"{result.memory / 2**20:.3g}",
        f"{result.gradient / first.gradient:.2f}",
    )


def table(results: Sequence[MixerResult]) -> list[Any]:
    """The results of one problem for the terminal; mixers that were not timed stand below with the reason."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, title=str(results[0].problem), title_justify="left", pad_edge=False)
    for index, column in enumerate(COLUMNS):
        grid.add_column(column, justify="right" if index else "left", no_wrap=True)
    rows = [result for result in results if not result.reason]
    for row in rows:
        grid.add_row(*cells(row, rows[0]))
    return [grid, *(Text(f"{row.mixer}: {row.reason}", "yellow") for row in results if row.reason), Text()]


def save(results: Sequence[MixerResult], path: Path, command: str) -> None:
    """Writes everything that was measured, and on what, as JSON."""
    device = jax.devices()[0].device_kind
    rows = [dataclasses.asdict(result) | {"device": device} for result in results]
    runner.write(rows, path, command)


def draw(results: Sequence[MixerResult], folder: Path) -> dict[str, Path]:
    """Figures of the time per token against the length; none where no mixer was timed at two lengths."""
    timed = [result for result in results if not result.reason]
    if len({result.problem.tokens for result in timed}) < 2:
        return {}
    drawn = {f"mixers_{mode}": lambda theme, mode=mode: per_token(timed, mode, theme) for mode in MODES}
    return figures.save(drawn, folder)


def per_token(results: Sequence[MixerResult], mode: str, theme: figures.Theme) -> Figure:
    """Microseconds per token of every mixer against the length: level where the cost is linear."""
    names = list(dict.fromkeys(result.mixer for result in results))
    looks = figures.looks(names, theme)
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    ends = []
    for name in names:
        chosen = sorted((r for r in results if r.mixer == name), key=lambda r: r.problem.tokens)
        points = [(r.problem.tokens, 1e6 / r.tokens_per_second(mode)) for r in chosen]
        axes.plot(*zip(*points, strict=True), marker=looks[name]["marker"], markersize=4, **figures.line(looks[name]))
        ends.append((name, *points[-1]))
    first = results[0].problem
    axes.set(xscale="log", yscale="log", xlabel="tokens (N)", ylabel="microseconds per token")
    axes.set_title(f"{MODES[mode]}: C{first.features} H{first.heads}, {first.layout}, {first.dtype}")
    lengths = sorted({result.problem.tokens for result in results})
    axes.set_xticks(lengths, [short(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    figures.label_ends(axes, ends, looks)
    return figure
