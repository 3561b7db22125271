"""The figure of `attnlab attend`: an image, and each layer's map over it."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from attnlab.figures import Theme

COLUMNS = 6  # panels beside each other


def draw(image: np.ndarray, maps: Mapping[str, np.ndarray], query: tuple[float, float] | None, theme: Theme) -> Figure:
    """Draws an image and the maps over it.

    Args:
      image: `(rows, columns, channels)` in [0, 1].
      maps: `(rows, columns)` of tokens by the title, each scaled to its own largest value; blank where NaN.
      query: place of the token that looks, marked in the image.
      theme: of the figure.
    """
    panels = 1 + len(maps)
    columns = min(COLUMNS, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(1.75 * columns, 0.2 + 1.95 * rows), layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for cell in cells:
        cell.set(xticks=[], yticks=[])
        cell.grid(False)
        cell.spines[:].set_visible(False)
    image = image[..., 0] if image.shape[-1] == 1 else image
    cells[0].imshow(image, cmap="gray", vmin=0, vmax=1)
    cells[0].set_title("image")
    height, width = image.shape[:2]
    if query is not None:
        cells[0].plot(query[1] * width - 0.5, query[0] * height - 0.5, "o", markersize=8, **_marker(theme))
    grey = image if image.ndim == 2 else image.mean(-1)
    for cell, (title, values) in zip(cells[1:], maps.items(), strict=False):
        blank = np.isnan(values)
        sizes = np.where(blank, 0, np.abs(values))
        share = sizes / (float(sizes.max()) or 1.0)
        colors = colormaps["inferno"](share)
        # Opaque where the weight is large: what is not looked at stays grey.
        colors[..., 3] = 0.25 + 0.6 * share
        colors[blank] = to_rgba(theme.ground)
        cell.imshow(grey, cmap="gray", vmin=0, vmax=1)
        cell.imshow(colors, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        cell.set_title(title)
    for cell in cells[panels:]:
        cell.axis("off")
    return figure


def _marker(theme: Theme) -> dict[str, object]:
    return {"markerfacecolor": "none", "markeredgecolor": theme.colors[1], "markeredgewidth": 2}
