"""What is measured of a mixer besides its training: time and quality against length, and where it looks."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import registry
from attnlab.compare.plots import AttentionExample
from attnlab.compare.results import QUALITIES, Point, Timing
from attnlab.compiling import compiled_for_once
from attnlab.contract import Layout, Site
from attnlab.data import Dataset
from attnlab.decode_size import LENGTHS, DecodeSize, decode_size
from attnlab.experiment import Experiment
from attnlab.models.block import site_seen_by
from attnlab.models.language_model import LanguageModel
from attnlab.training.evaluation import evaluate

MEMORY_LIMIT = 2**30  # bytes of temporaries from which a length is left out
TIME_LIMIT = 1.0  # seconds of one call beyond which no longer sequence is tried
SAMPLE_TIME = 0.1  # seconds over which calls are repeated
LENGTH_EXAMPLES = 256  # of a task at each length
LENGTH_TOKENS = 2**15  # of a batch there


def time_mixer(experiment: Experiment, mixer: str, lengths: Sequence[int]) -> tuple[Timing, ...]:
    """Times one mixer alone at several numbers of tokens.

    Channels and heads are those of the model (of the first stage of a pyramid). Images are squares, so their lengths
    are rounded down to squares. The series ends where a length takes too much memory or time, or does not fit the
    mechanism.

    Args:
      experiment: whose model's sizes to use.
      mixer: registered name.
      lengths: numbers of tokens, rising.
    """
    config = experiment.model
    features, heads = config.features, config.num_heads
    if not isinstance(features, int):
        features, heads = features[0], heads[0]
    is_text = config.kind != "image"
    model = Site(features, heads, layout=Layout.SEQUENCE if is_text else Layout.IMAGE, causal=is_text)
    seen = site_seen_by(registry.get(mixer).cls, model)
    timings = []
    for length in lengths:
        side = int(length**0.5)
        grid = (side, side) if seen.layout is Layout.IMAGE else (length,)
        site = dataclasses.replace(seen, grid=None if is_text else grid)

        def build(site: Site = site) -> nnx.Module:
            return registry.create(mixer, site, rngs=nnx.Rngs(0), **config.mixer_options.get(mixer, {}))

        def draw(build: Callable[[], nnx.Module] = build, grid: tuple[int, ...] = grid) -> tuple[Any, Any, jax.Array]:
            x = jax.random.normal(jax.random.key(0), (1, *grid, features))
            return *nnx.split(build(), nnx.Param, ...)[1:], x

        try:
            graph = nnx.graphdef(nnx.eval_shape(build))
        except ValueError:
            break
        params, rest, x = compiled_for_once(draw)()

        def forward(params: Any, x: jax.Array, graph: Any = graph, rest: Any = rest) -> jax.Array:
            return nnx.merge(graph, params, rest, copy=True)(x)

        def gradient(params: Any, x: jax.Array, forward: Callable[..., jax.Array] = forward) -> Any:
            return jax.grad(lambda params, x: jnp.sum(forward(params, x) ** 2), argnums=(0, 1))(params, x)

        times = [_median_seconds(function, params, x) for function in (forward, gradient)]
        if None in times:
            break
        timings.append(Timing(int(np.prod(grid)), *(1e3 * seconds for seconds in times)))
        if times[1] > TIME_LIMIT:
            break
    return tuple(timings)


def quality_at_lengths(
    model: LanguageModel, experiment: Experiment, lengths: Sequence[int], *, examples: int = LENGTH_EXAMPLES
) -> tuple[tuple[Point, ...], str]:
    """How well a trained model solves its synthetic task at other lengths, of as many new examples at each.

    Lengths that the task does not have (too short for what it asks) are left out. The series ends at the first length
    that the model cannot take: a table of positions without rows for it, memory.

    Args:
      model: trained on the task of the experiment, whose evaluation split the examples are from.
      experiment: with `TaskData`.
      lengths: numbers of tokens, rising.
      examples: how many at each length, of those that the split has.

    Returns:
      (tokens, quality) at each length; and why they end before the last one, or "".
    """
    source = dataclasses.replace(experiment.data, eval_size=min(examples, experiment.data.eval_size))
    dataset, task = source.open(), experiment.task_for(model)
    metric = QUALITIES["task"].metric
    found: list[Point] = []
    for length in lengths:
        try:
            next(dataset.eval(1, sequence_length=length))
        except ValueError:
            continue
        batch = max(1, min(examples, LENGTH_TOKENS // length))
        try:
            values = evaluate(model, dataclasses.replace(task, sequence_length=length), dataset, batch)
        except Exception as error:  # a mixer may refuse a length in any way, and memory may end
            return tuple(found), f"not at {length} tokens: {_first_line(error)}"
        if not math.isfinite(values["loss"]):
            return tuple(found), f"not at {length} tokens: the loss is {values['loss']}"
        found.append((length, values[metric]))
    return tuple(found), ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def decode_state(model: LanguageModel) -> DecodeSize:
    """The size of a language model's decode state for one sequence, with caches in bfloat16."""
    lengths = LENGTHS if model.max_length is None else (model.max_length // 2, model.max_length)
    return decode_size(lambda length: model.init_state(1, length, dtype=jnp.bfloat16), lengths)


def _median_seconds(function: Callable[..., Any], *arguments: Any) -> float | None:
    """Median time of a compiled call; None if it would take too much memory."""
    compiled = jax.jit(function).lower(*arguments).compile()
    analysis = compiled.memory_analysis()
    if analysis is not None and analysis.temp_size_in_bytes > MEMORY_LIMIT:
        return None
    jax.block_until_ready(compiled(*arguments))
    times: list[float] = []
    while len(times) < 3 or (sum(times) < SAMPLE_TIME and len(times) < 200):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def attention_of(model: nnx.Module, tokens: np.ndarray) -> list[np.ndarray]:
    """Recorded attention for a batch of one, a map `(N, M)` per layer that has one, the mean over heads."""
    graph, state = nnx.split(model)

    def run(state: Any, tokens: jax.Array) -> list[jax.Array]:
        seen = nnx.capture(nnx.merge(graph, state), nnx.Intermediate)(tokens)[1]
        return [value[0].astype(jnp.float32).mean(0) for _, value in _attention_in(seen)]

    return [np.asarray(weights) for weights in compiled_for_once(run)(state, tokens)]


def _attention_in(seen: Any) -> list[tuple[list[int], jax.Array]]:
    """What is called `attention` in recorded values, `(B, H, N, M)`, in the order of the layers."""
    found = []
    for path, value in jax.tree_util.tree_flatten_with_path(seen)[0]:
        names = [getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))) for key in path]
        if "attention" in names and getattr(value, "ndim", 0) == 4:
            # Layers are numbered, and must not be sorted as text.
            found.append(([n if isinstance(n, int) else -1 for n in names], value))
    return sorted(found, key=lambda item: item[0])


def example_of(experiment: Experiment, dataset: Dataset, *, tokens: int = 64) -> tuple[np.ndarray, AttentionExample]:
    """One example of the evaluation split, as a batch of one, and as a picture without maps.

    The query is the brightest token near the middle of an image, where something is to be seen; a text is cut to
    `tokens` bytes.
    """
    if experiment.model.kind == "vectors":
        inputs = next(dataset.eval(batch_size=1))["inputs"][:1]
        return inputs, AttentionExample({}, text=b"." * (inputs.shape[1] - 1) + b"?")
    if experiment.model.kind == "text":
        # A synthetic task may have no form as short as a piece of a text.
        length = experiment.task.sequence_length if dataset.info.name == "task" else tokens
        batch = next(dataset.eval(batch_size=1, sequence_length=length))
        inputs = batch["inputs"][:1]
        return inputs, AttentionExample({}, text=bytes(int(token) if token < 256 else 0 for token in inputs[0]))
    image = next(dataset.eval(batch_size=1))["image"][:1]
    shown = image[0] - image[0].min()
    shown = shown / (shown.max() or 1.0)
    shown = shown[..., 0] if shown.shape[-1] == 1 else shown
    patch = experiment.model.patch_size
    grid = (-(-shown.shape[0] // patch), -(-shown.shape[1] // patch))
    grey = shown if shown.ndim == 2 else shown.mean(-1)
    padded = np.pad(grey, [(0, cells * patch - side) for cells, side in zip(grid, grey.shape, strict=True)])
    brightness = padded.reshape(grid[0], patch, grid[1], patch).mean((1, 3))
    rows, columns = np.mgrid[: grid[0], : grid[1]]
    distance = np.hypot(rows / grid[0] - 0.5, columns / grid[1] - 0.5)
    return image, AttentionExample({}, shown, grid, int(np.argmax(brightness - distance)))


def maps_for(example: AttentionExample, weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Those maps that are between all tokens of the example; a class token, which comes first, is cut off."""
    count = len(example.text) if example.grid is None else example.grid[0] * example.grid[1]
    maps = [matrix[1:, 1:] if matrix.shape == (count + 1, count + 1) else matrix for matrix in weights]
    return [matrix for matrix in maps if matrix.shape == (count, count)]
