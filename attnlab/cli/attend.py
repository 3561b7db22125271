"""`attnlab attend`: where a classifier looks in images, layer by layer."""

import collections
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from attnlab.cli.classifier import ClassifierOptions, classifier, read

FEWEST = 16  # an axis of a gate that is no longer is one of heads or experts, not of tokens
PREFIXES = (0, 1, 2, 4, 5)  # class tokens, with that of distillation and registers, that stand in front of a grid


@dataclasses.dataclass(frozen=True)
class AttendOptions(ClassifierOptions):
    """Draw the attention, routing or window maps of a model over images, a PNG for each, light and dark.

    Of every layer that records its weights, heads in the mean: what the class token looks at, or the token at --query;
    where there is neither, what all tokens look at. Gates are drawn as they are. Without --weights they are drawn at
    random, which shows windows and routes alone.

    Attributes:
      query: place of the token that looks, from 0 0 (top left) to 1 1.
      out_dir: directory of the figures.
    """

    query: tuple[float, float] | None = None
    out_dir: str = "runs/attend"


def run(arguments: list[str]) -> int:
    """Runs the command; see `attnlab attend --help`."""
    options = tyro.cli(AttendOptions, args=arguments, prog="attnlab attend")
    if options.query is not None and not all(0 <= place <= 1 for place in options.query):
        raise ValueError(f"--query must lie between 0 0 and 1 1, got {options.query}")
    import jax
    from flax import nnx

    from attnlab import figures
    from attnlab.cli import attend_figure, qualify
    from attnlab.compiling import compiled_for_once
    from attnlab.measure import watch
    from attnlab.points import Editable

    qualify.on_new_device()
    found = classifier(options, drawn=True)
    if not isinstance(found.model, Editable):
        raise ValueError(f"{type(found.model).__name__} has no points at which its attention could be seen")
    graph, state = nnx.split(found.model)
    size = found.preprocess.size

    def maps(state: Any, image: jax.Array) -> dict[int, jax.Array]:
        seen = watch(nnx.merge(graph, state), image[None])[1]
        drawn = {layer: attention_of(value, size, options.query) for layer, value in seen.recorded("attention").items()}
        gates = {layer: gate_of(value, size) for layer, value in seen.recorded("gate").items()}
        return {layer: value for layer, value in sorted((gates | drawn).items()) if value is not None}

    program = compiled_for_once(maps)
    folder, used = Path(options.out_dir), collections.Counter[str]()
    count = 0
    for path, shown, image in read(options, found.preprocess):
        layers = {layer: np.asarray(value) for layer, value in program(state, image).items()}
        if not layers:
            raise ValueError(f"no layer of {options.model} records a map over the image")
        used[path.stem] += 1
        name = path.stem if used[path.stem] == 1 else f"{path.stem}_{used[path.stem]}"
        draw = {name: lambda theme, shown=shown, layers=layers: attend_figure.draw(shown, layers, options.query, theme)}
        print(f"written: {figures.save(draw, folder)[name]}")
        count += 1
    return int(count < len(options.images))


def attention_of(weights: Any, size: tuple[int, int], query: tuple[float, float] | None) -> Any:
    """Weights `(1, H, N, M)` to the map `(rows, columns)` of keys that is drawn, mean over heads; None if none fits.

    Args:
      weights: or several of them, whose mean it is.
      size: (rows, columns) of the image in pixels.
      query: place of the token that looks, in parts of the sides.
    """
    if isinstance(weights, tuple):
        maps = [drawn for each in weights if (drawn := attention_of(each, size, query)) is not None]
        return sum(maps[1:], maps[0]) / len(maps) if maps and len({each.shape for each in maps}) == 1 else None
    if getattr(weights, "ndim", 0) != 4:
        return None
    keys, queries = grid_of(weights.shape[3], size), grid_of(weights.shape[2], size)
    if keys is None or queries is None:
        return None
    mean = weights[0].mean(0)
    if query is not None:
        (rows, columns), prefix = queries
        row, column = (min(int(part * count), count - 1) for part, count in zip(query, (rows, columns), strict=True))
        line = mean[prefix + row * columns + column]
    else:
        line = mean[0] if queries[1] else mean.mean(0)
    (rows, columns), prefix = keys
    return line[prefix:].reshape(rows, columns)


def gate_of(gate: Any, size: tuple[int, int]) -> Any:
    """A gate with an axis of tokens to its mean over the other axes, as a map; None if it has none.

    Args:
      gate: array `(1, …)`.
      size: (rows, columns) of the image in pixels.
    """
    for axis in range(1, getattr(gate, "ndim", 0)):
        if gate.shape[axis] > FEWEST and (found := grid_of(gate.shape[axis], size)) is not None:
            (rows, columns), prefix = found
            others = tuple(other for other in range(gate.ndim) if other != axis)
            return gate.mean(others)[prefix:].reshape(rows, columns)
    return None


def grid_of(tokens: int, size: tuple[int, int]) -> tuple[tuple[int, int], int] | None:
    """The grid of so many tokens of an image, and how many stand in front of it; None if no stride gives one.

    Args:
      tokens: of a layer.
      size: (rows, columns) of the image in pixels.
    """
    for prefix in PREFIXES:
        for stride in range(1, max(size) + 1):
            grid = (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
            if grid[0] * grid[1] == tokens - prefix:
                return grid, prefix
    return None
