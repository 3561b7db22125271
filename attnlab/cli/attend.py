"""`attnlab attend`: where a classifier looks in images, layer by layer."""

import collections
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tyro

from attnlab.cli.classifier import ClassifierOptions, classifier, read

if TYPE_CHECKING:
    from attnlab.measure import Seen

FEWEST = 16  # an axis of a gate that is no longer is one of heads or experts, not of tokens
PREFIXES = (0, 1, 2, 4, 5)  # class tokens, with that of distillation and registers, that stand in front of a grid


@dataclasses.dataclass(frozen=True)
class AttendOptions(ClassifierOptions):
    """Draw the attention, routing or window maps of a model over images, a PNG for each, light and dark.

    Of every layer that records its weights, heads in the mean: what the class token looks at, or the token at --query;
    where there is neither, what all tokens look at. Gates are drawn as they are. Tokens that were left out before a
    layer are blank there, and so is all of it where the token at --query is one of them. Without --weights they are
    drawn at random, which shows windows and routes alone.

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
        return maps_of(watch(nnx.merge(graph, state), image[None])[1], size, options.query)

    program = compiled_for_once(maps)
    titles = titles_of(found.model)
    folder, used = Path(options.out_dir), collections.Counter[str]()
    count = 0
    for path, shown, image in read(options, found.preprocess):
        layers = {titles[layer]: np.asarray(value) for layer, value in program(state, image).items()}
        if not layers:
            raise ValueError(f"no layer of {options.model} records a map over the image")
        used[path.stem] += 1
        name = path.stem if used[path.stem] == 1 else f"{path.stem}_{used[path.stem]}"
        draw = {name: lambda theme, shown=shown, layers=layers: attend_figure.draw(shown, layers, options.query, theme)}
        print(f"written: {figures.save(draw, folder)[name]}")
        count += 1
    return int(count < len(options.images))


class Left(NamedTuple):
    """Tokens that are left where others were left out.

    Attributes:
      places: `(N,)` of each token among all that there were at first; -1 for one that was made of several.
      whole: how many there were.
    """

    places: Any
    whole: int


def maps_of(seen: "Seen", size: tuple[int, int], query: tuple[float, float] | None) -> dict[int, Any]:
    """The map `(rows, columns)` of each layer that has one, NaN at tokens that were left out before.

    Args:
      seen: of one image.
      size: (rows, columns) of the image in pixels.
      query: place of the token that looks, in parts of the sides.
    """
    weights, gates, left = seen.recorded("attention"), seen.recorded("gate"), left_before(seen)
    found = {layer: gate_of(value, size, left.get(layer)) for layer, value in gates.items()}
    found |= {layer: attention_of(value, size, query, left.get(layer)) for layer, value in weights.items()}
    return {layer: value for layer, value in sorted(found.items()) if value is not None}


def left_before(seen: "Seen") -> dict[int, Left]:
    """The tokens that come to each layer, of those behind a layer that leaves tokens out.

    Such a layer records `"kept"`, and weights, which tell how many tokens came to it.
    """
    import jax.numpy as jnp

    kept, found, here = seen.recorded("kept"), {}, None
    for layer in seen.layers:
        if here is not None:
            found[layer] = here
        if layer in kept:
            chosen = kept[layer][0]
            if here is None:
                here = Left(chosen, seen.recorded("attention")[layer].shape[-1])
            else:
                here = Left(jnp.where(chosen < 0, -1, here.places[chosen]), here.whole)
    return found


def titles_of(model: Any) -> list[str]:
    """The name of each layer of a model, with its stream where there are several."""
    from attnlab.points import layer_paths

    titles = []
    for layer, (path, _) in enumerate(layer_paths(model)):
        streams = [f", stream {path[at + 1]}" for at, step in enumerate(path) if step == "branches"]
        titles.append("".join([f"layer {layer}", *streams]))
    return titles


def attention_of(
    weights: Any, size: tuple[int, int], query: tuple[float, float] | None, left: Left | None = None
) -> Any:
    """Weights `(1, H, N, M)` to the map `(rows, columns)` of keys that is drawn, mean over heads; None if none fits.

    Args:
      weights: or several of them, whose mean it is.
      size: (rows, columns) of the image in pixels.
      query: place of the token that looks, in parts of the sides.
      left: where tokens were left out, which ones are left; the map is NaN at the others.
    """
    if isinstance(weights, tuple):
        maps = [drawn for each in weights if (drawn := attention_of(each, size, query, left)) is not None]
        return sum(maps[1:], maps[0]) / len(maps) if maps and len({each.shape for each in maps}) == 1 else None
    if getattr(weights, "ndim", 0) != 4:
        return None
    if left is not None and weights.shape[2:] != 2 * left.places.shape:
        return None
    keys, queries = (grid_of(weights.shape[axis] if left is None else left.whole, size) for axis in (3, 2))
    if keys is None or queries is None:
        return None
    mean = weights[0].mean(0)
    (rows, columns), prefix = queries
    if query is None:
        line = mean[0] if prefix else mean.mean(0)
    else:
        row, column = (min(int(part * count), count - 1) for part, count in zip(query, (rows, columns), strict=True))
        place = prefix + row * columns + column
        line = mean[place] if left is None else _row(mean, left, place)
    return _on_grid(line, keys, left)


def gate_of(gate: Any, size: tuple[int, int], left: Left | None = None) -> Any:
    """A gate with an axis of tokens to its mean over the other axes, as a map; None if it has none.

    Args:
      gate: array `(1, …)`.
      size: (rows, columns) of the image in pixels.
      left: as `attention_of` has it.
    """
    for axis in range(1, getattr(gate, "ndim", 0)):
        tokens = gate.shape[axis]
        if left is not None:
            tokens = left.whole if tokens == left.places.shape[0] else 0
        if tokens > FEWEST and (found := grid_of(tokens, size)) is not None:
            others = tuple(other for other in range(gate.ndim) if other != axis)
            return _on_grid(gate.mean(others), found, left)
    return None


def _row(mean: Any, left: Left, place: int) -> Any:
    """The row of the token of that place; NaN where it was left out."""
    import jax.numpy as jnp

    at = left.places == place
    return jnp.where(at.any(), mean[jnp.argmax(at)], jnp.nan)


def _on_grid(values: Any, grid: tuple[tuple[int, int], int], left: Left | None) -> Any:
    """Values of tokens on their grid, NaN at those that were left out."""
    import jax.numpy as jnp

    (rows, columns), prefix = grid
    if left is not None:
        places = jnp.where(left.places < 0, left.whole, left.places)
        values = jnp.full(left.whole, jnp.nan, values.dtype).at[places].set(values, mode="drop")
    return values[prefix:].reshape(rows, columns)


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
