"""Figures of a comparison, each drawn twice: on a light and on a dark ground."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator

from attnlab.compare.noise import curve_over_seeds, mean_interval
from attnlab.compare.results import Comparison
from attnlab.figures import Theme, label_ends, label_points, line, looks, save, words

BASELINE = "softmax_attention"
MAX_CHARACTERS = 40


@dataclasses.dataclass(frozen=True)
class AttentionExample:
    """Attention maps of one example.

    Attributes:
      maps: mixer to one map (N, N) per layer, the mean over heads.
      image: (H, W) grey or (H, W, 3) in [0, 1], for images.
      grid: rows and columns of tokens, for images.
      query: index of the token whose row is drawn, for images.
      text: the N bytes, for text.
    """

    maps: Mapping[str, Sequence[np.ndarray]]
    image: np.ndarray | None = None
    grid: tuple[int, int] | None = None
    query: int = 0
    text: bytes = b""


def draw_all(comparison: Comparison, attention: AttentionExample | None, folder: Path) -> dict[str, Path]:
    """Draws every figure that there is data for.

    Returns:
      From the figure's name to its light PNG; the dark one beside it is called `NAME-dark.png`.
    """
    figures: dict[str, Callable[[Theme], Figure]] = {}
    entries = comparison.entries
    if any(entry.train_curve for entry in entries):
        figures["learning_curves"] = lambda theme: learning_curves(comparison, theme)
    if any(entry.quality is not None and entry.items_per_second for entry in entries):
        figures["quality_speed"] = lambda theme: quality_against_speed(comparison, theme)
    if any(entry.timings for entry in entries):
        figures["time_length"] = lambda theme: time_against_length(comparison, theme)
    if any(entry.lengths for entry in entries):
        figures["quality_length"] = lambda theme: quality_against_length(comparison, theme)
    if attention is not None and attention.maps:
        figures["attention"] = lambda theme: attention_maps(attention, theme)
    return save(figures, folder)


def learning_curves(comparison: Comparison, theme: Theme) -> Figure:
    """Training loss and evaluated quality against steps."""
    looks = _looks(comparison, theme)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    ends = []
    for entry in comparison.entries:
        look = looks[entry.mixer]
        seeds = entry.seeds or (entry,)
        if entry.train_curve:
            steps, losses = curve_over_seeds([seed.train_curve for seed in seeds])
            _band(left, steps, np.array([_smooth(curve) for curve in losses]), **line(look))
        if entry.eval_curve:
            steps, qualities = curve_over_seeds([seed.eval_curve for seed in seeds])
            qualities = comparison.quality_number(qualities)
            _band(right, steps, qualities, marker=look["marker"], markersize=4, **line(look))
            ends.append((entry.mixer, steps[-1], qualities[:, -1].mean()))
    left.set(xlabel="step", ylabel="training loss (nats)", title="Training loss, running mean")
    right.set(xlabel="step", ylabel=comparison.quality_label, title="On the evaluation split")
    _zoom(right, [line.get_ydata() for line in right.get_lines()], best_high=comparison.measured.more_is_better)
    label_ends(right, ends, looks)
    return figure


def _band(axes: Axes, steps: np.ndarray, values: np.ndarray, **look: Any) -> None:
    """A line of the mean over seeds `(seeds, S)`, and a band of its 95 % interval where there are several."""
    if len(values) == 1:
        axes.plot(steps, values[0], **look)
        return
    mean, half = mean_interval(values)
    axes.plot(steps, mean, **look)
    axes.fill_between(steps, mean - half, mean + half, color=look["color"], alpha=0.18, linewidth=0)


def quality_against_speed(comparison: Comparison, theme: Theme) -> Figure:
    """One point for each mixer: training speed and quality."""
    looks = _looks(comparison, theme)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    points = []
    for entry in comparison.entries:
        if entry.quality is None or not entry.items_per_second:
            continue
        x, y = entry.items_per_second, comparison.quality_number(entry.quality)
        look = looks[entry.mixer]
        half = 0 if entry.half_width is None else comparison.quality_number(entry.half_width)
        axes.errorbar(
            x, y, yerr=half or None, linestyle="none", marker=look["marker"], color=look["color"], markersize=9
        )
        points.append((entry.mixer, x, y))
    where = "better: up and right" if comparison.measured.more_is_better else "better: down and right"
    axes.set(xlabel=f"training speed ({comparison.items} per second)", ylabel=comparison.quality_label)
    axes.set_title(f"Quality against speed ({where})")
    axes.set_xlim(0, max(x for _, x, _ in points) * 1.25)
    axes.margins(y=0.18)
    label_points(axes, points, looks)
    return figure


def time_against_length(comparison: Comparison, theme: Theme) -> Figure:
    """Time of one mixer, alone, against the number of tokens."""
    looks = _looks(comparison, theme)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, field, title in zip(
        panels, ("forward_ms", "gradient_ms"), ("Forward", "Forward and backward"), strict=True
    ):
        ends = []
        for entry in comparison.entries:
            if entry.timings:
                tokens = [timing.tokens for timing in entry.timings]
                times = [getattr(timing, field) for timing in entry.timings]
                axes.plot(tokens, times, marker=looks[entry.mixer]["marker"], markersize=4, **line(looks[entry.mixer]))
                ends.append((entry.mixer, tokens[-1], times[-1]))
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        ticks = sorted({timing.tokens for entry in comparison.entries for timing in entry.timings})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if field == "gradient_ms":
            label_ends(axes, ends, looks)
    panels[0].set_ylabel("time of one layer's mixer (ms)")
    return figure


def quality_against_length(comparison: Comparison, theme: Theme) -> Figure:
    """How well a task is solved at other lengths than in training."""
    looks = _looks(comparison, theme)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    ends = []
    for entry in comparison.entries:
        if entry.lengths:
            look = looks[entry.mixer]
            tokens, qualities = zip(*entry.lengths, strict=True)
            values = [comparison.quality_number(quality) for quality in qualities]
            last = len(tokens) - bool(entry.beyond)  # where a cross stands there is no other marker
            axes.plot(tokens, values, marker=look["marker"], markersize=5, markevery=range(last), **line(look))
            if entry.beyond:
                axes.plot(tokens[-1], values[-1], marker="x", markersize=9, markeredgewidth=2.5, color=look["color"])
            ends.append((entry.mixer, tokens[-1], values[-1]))
    ticks = sorted({tokens for entry in comparison.entries for tokens, _ in entry.lengths})
    axes.set(xscale="log", xlabel="tokens", ylabel=comparison.quality_label, title="Quality against length")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    if comparison.measured.unit == " %":
        axes.set_ylim(-4, 104)
    if comparison.trained_length is not None:
        axes.axvline(comparison.trained_length, color=theme.ink, linewidth=1, linestyle=":", zorder=1)
        axes.annotate(
            f"trained at {comparison.trained_length}",
            (comparison.trained_length, 0),
            xycoords=("data", "axes fraction"),
            xytext=(5, 5),
            textcoords="offset points",
            color=theme.ink,
            fontsize=9,
        )
    label_ends(axes, ends, looks)
    return figure


def attention_maps(example: AttentionExample, theme: Theme) -> Figure:
    """Where one token looks (images), or which byte looks at which (text), in every layer."""
    return _image_maps(example, theme) if example.image is not None else _text_maps(example, theme)


def _image_maps(example: AttentionExample, theme: Theme) -> Figure:
    layers = max(len(maps) for maps in example.maps.values())
    rows = len(example.maps)
    figure = Figure(figsize=(1.9 + 1.55 * layers + 1.6, 0.5 + 1.55 * rows), layout="constrained")
    grid = figure.subplots(rows, layers + 1, squeeze=False)
    row, column = divmod(example.query, example.grid[1])
    height, width = (side / cells for side, cells in zip(example.image.shape[:2], example.grid, strict=True))
    for axes, (mixer, maps) in zip(grid, example.maps.items(), strict=True):
        axes[0].imshow(example.image, cmap="gray", vmin=0, vmax=1)
        axes[0].add_patch(
            Rectangle(
                (column * width - 0.5, row * height - 0.5), width, height, fill=False, color="#D55E00", linewidth=2
            )
        )
        axes[0].set_ylabel(words(mixer), rotation=0, ha="right", va="center", fontsize=10)
        for cell, matrix in zip(axes[1:], maps, strict=False):
            weights = matrix[example.query].reshape(example.grid)
            _heat(cell, weights, theme)
        for cell in axes:
            cell.set(xticks=[], yticks=[])
            cell.grid(False)
            cell.spines[:].set(visible=True, color=theme.faint, linewidth=0.6)
        for cell in axes[1 + len(maps) :]:
            cell.axis("off")
    for index, cell in enumerate(grid[0]):
        cell.set_title("image and query" if index == 0 else f"layer {index}", fontsize=10)
    return figure


def _text_maps(example: AttentionExample, theme: Theme) -> Figure:
    layers = max(len(maps) for maps in example.maps.values())
    rows = len(example.maps)
    figure = Figure(figsize=(1.6 + 3.1 * layers, 0.5 + 3.1 * rows), layout="constrained")
    grid = figure.subplots(rows, layers, squeeze=False)
    count = min(len(example.text), MAX_CHARACTERS)
    characters = [_visible(byte) for byte in example.text[:count]]
    for axes, (mixer, maps) in zip(grid, example.maps.items(), strict=True):
        for cell, matrix in zip(axes, maps, strict=False):
            _heat(cell, matrix[:count, :count], theme)
            cell.set_xticks(range(count), characters, fontsize=5, family="monospace")
            cell.set_yticks(range(count), characters, fontsize=5, family="monospace")
            cell.tick_params(length=0, pad=1)
            cell.grid(False)
            cell.spines[:].set(visible=True, color=theme.faint, linewidth=0.6)
        for cell in axes[len(maps) :]:
            cell.axis("off")
        axes[0].set_ylabel(f"{words(mixer)}\n\nthe byte that looks", fontsize=9)
    for index, cell in enumerate(grid[0]):
        cell.set_title(f"layer {index + 1}", fontsize=10)
    for cell in grid[-1]:
        cell.set_xlabel("the byte that is seen", fontsize=9)
    return figure


def _heat(axes: Axes, weights: np.ndarray, theme: Theme) -> None:
    """A map scaled to its own largest weight; weights of both signs get a diverging scale."""
    most = float(np.abs(weights).max()) or 1.0
    # A matrix of an attention that does not normalise spans orders of magnitude between rows.
    if weights.shape[0] == weights.shape[1] and weights.shape[0] > 16:
        scale = np.abs(weights).max(axis=1, keepdims=True)
        weights, most = weights / np.where(scale == 0, 1, scale), 1.0
    if weights.min() < -1e-6 * most:
        axes.imshow(weights, cmap=_diverging(theme), vmin=-most, vmax=most)
    else:
        axes.imshow(weights, cmap=_sequential(theme), vmin=0, vmax=most)


def _sequential(theme: Theme) -> Colormap:
    return LinearSegmentedColormap.from_list("heat", (theme.ground, theme.colors[0], theme.ink))


def _diverging(theme: Theme) -> Colormap:
    return LinearSegmentedColormap.from_list("signed", (theme.colors[1], theme.ground, theme.colors[0]))


def _looks(comparison: Comparison, theme: Theme) -> dict[str, dict[str, Any]]:
    return looks((entry.mixer for entry in comparison.entries), theme, BASELINE)


def _smooth(values: np.ndarray, share: float = 0.04) -> np.ndarray:
    """Mean over the last few values, a `share` of all."""
    width = max(1, round(len(values) * share))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _zoom(axes: Axes, lines: Sequence[np.ndarray], *, best_high: bool) -> None:
    """Leaves out the start of training, which would press the end of all curves into one line."""
    lines = [line for line in lines if len(line)]
    if not lines:
        return
    finals = np.array([line[-1] for line in lines])
    values = np.concatenate(lines)
    best, worst = (values.max(), finals.min()) if best_high else (values.min(), finals.max())
    room = max(abs(best - worst), 0.04 * abs(best))
    low, high = sorted(
        (worst - 2.5 * room, best + 0.4 * room) if best_high else (best - 0.4 * room, worst + 2.5 * room)
    )
    axes.set_ylim(max(low, values.min() - 0.4 * room), min(high, values.max() + 0.4 * room))


def _visible(byte: int) -> str:
    return {10: "⏎", 9: "→", 32: "␣"}.get(byte, chr(byte) if 33 <= byte < 127 else "·")
