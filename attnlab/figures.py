"""The look of all figures: light and dark grounds, colours that colour-blind readers tell apart, names beside lines."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# The colours of Okabe and Ito (2008), told apart by colour-blind readers, without the yellow that vanishes on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DARK_COLORS = ("#4DA3E0", "#F2803D", "#2BC79B", "#E29BC2", "#F2B544", "#8CCBF2")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a figure."""

    suffix: str
    ground: str
    ink: str
    faint: str
    colors: tuple[str, ...]


LIGHT = Theme("", "#ffffff", "#1f2328", "#d8dce1", COLORS)
DARK = Theme("-dark", "#16191d", "#e6e9ed", "#3a4048", DARK_COLORS)


def save(figures: Mapping[str, Callable[[Theme], Figure]], folder: Path) -> dict[str, Path]:
    """Draws every figure twice.

    Returns:
      From the figure's name to its light PNG in `folder`; the dark one beside it is called `NAME-dark.png`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in figures.items():
        for theme in (LIGHT, DARK):
            with style(theme):
                draw(theme).savefig(folder / f"{name}{theme.suffix}.png", dpi=160)
    return {name: folder / f"{name}.png" for name in figures}


def looks(names: Iterable[str], theme: Theme, baseline: str | None = None) -> dict[str, dict[str, Any]]:
    """Colour, marker and dash of each name, the same in every figure; the baseline, the measure of all, is neutral."""
    found = {} if baseline is None else {baseline: {"color": theme.ink, "marker": "o", "linestyle": (0, (4, 2))}}
    for index, name in enumerate(name for name in names if name != baseline):
        dash = ("-", (0, (1, 1)), (0, (5, 1, 1, 1)))[index // len(theme.colors) % 3]
        found[name] = {
            "color": theme.colors[index % len(theme.colors)],
            "marker": MARKERS[(index + 1) % len(MARKERS)],
            "linestyle": dash,
        }
    return found


def line(look: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `Axes.plot` for a line of this look."""
    return {"color": look["color"], "linestyle": look["linestyle"], "linewidth": 1.8}


def label_ends(axes: Axes, ends: Sequence[tuple[str, float, float]], looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Names at the right of the axes, at the height of each line's end, moved apart where they would overlap."""
    if not ends:
        return
    low, high = axes.get_ylim()
    log = axes.get_yscale() == "log"
    transform = (lambda v: np.log(v)) if log else (lambda v: v)
    span = transform(high) - transform(low)
    heights = [float(np.clip((transform(y) - transform(low)) / span, 0.0, 1.0)) for _, _, y in ends]
    for (name, _, _), height in zip(ends, apart(heights, 0.062), strict=True):
        axes.annotate(
            words(name),
            (1.02, height),
            xycoords="axes fraction",
            color=looks[name]["color"],
            fontsize=9,
            va="center",
            annotation_clip=False,
        )


def label_points(
    axes: Axes, points: Sequence[tuple[str, float, float]], looks: Mapping[str, Mapping[str, Any]]
) -> None:
    """Names beside points: right, left, above or below, the first place where nothing else is."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    places = [((x - left) / (right - left), (y - low) / (high - low)) for _, x, y in points]
    taken = [(x - 0.014, y - 0.022, x + 0.014, y + 0.022) for x, y in places]
    for (name, _, _), (x, y) in zip(points, places, strict=True):
        width, gap = 0.0125 * len(name), 0.022
        corners = [
            (x + gap, y - 0.02),
            (x - gap - width, y - 0.02),
            (x - width / 2, y + 0.03),
            (x - width / 2, y - 0.07),
        ]
        boxes = [(at, down, at + width, down + 0.04) for at, down in corners]
        free = [
            box for box in boxes if box[0] >= 0 and box[2] <= 1 and not any(_overlap(box, other) for other in taken)
        ]
        box = (free or boxes)[0]
        taken.append(box)
        axes.text(
            (box[0] + box[2]) / 2 if box[0] < x < box[2] else box[0] if box[0] > x else box[2],
            (box[1] + box[3]) / 2,
            words(name),
            transform=axes.transAxes,
            color=looks[name]["color"],
            fontsize=9,
            va="center",
            ha="center" if box[0] < x < box[2] else "left" if box[0] > x else "right",
        )


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two boxes (left, bottom, right, top) share area."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved as little as a sweep upwards and one downwards needs to keep them `gap` apart, within [0, 1]."""
    order = np.argsort(heights, kind="stable")
    placed = np.array(heights, float)[order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    top = 1.0
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], top)
        top = placed[i] - gap
    result = np.empty(len(placed))
    result[order] = placed
    return result.tolist()


def words(name: str) -> str:
    """A name as it stands in a figure."""
    return name.replace("_", " ")


@contextlib.contextmanager
def style(theme: Theme) -> Iterator[None]:
    """Settings of matplotlib inside which a figure of this theme is drawn."""
    settings = {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.6,
        "grid.color": theme.faint,
        "figure.facecolor": theme.ground,
        "savefig.facecolor": theme.ground,
        "axes.facecolor": theme.ground,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "image.interpolation": "nearest",
    }
    with mpl.rc_context(settings):
        yield
