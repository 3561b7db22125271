"""What a model computes at its points, measured over many batches.

    def sinks(seen, batch):
        return {"sink": jnp.stack([weights[..., 0].mean((1, 2)) for weights in seen["attention"]], axis=1)}

    mean, std, count = measure(model, batches, sinks)["sink"]        # each layer's, (L,)

A pass and the function on what was seen are one compiled program, so that points which are not read cost nothing.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.points import Editable, layer_paths
from pallas_kernels.promotion import numpy_ranks


class Statistic(NamedTuple):
    """A quantity over all examples, in float64.

    Attributes:
      mean: of the examples that count, NaN where none does.
      std: their standard deviation (the divisor is the count).
      count: how many count, int64; a number, or an array as large as the mean if examples were masked.
    """

    mean: np.ndarray
    std: np.ndarray
    count: np.ndarray  # type: ignore[assignment] # a tuple's own method of that name is of no use here


class Seen(Mapping[str, Any]):
    """What was recorded in one pass: of a point of the layers a tuple over layers, of one of the model its value.

    A layer that recorded a name several times (parts of a mixer, each with its own) has a tuple of them.
    """

    def __init__(self, model: nnx.Module, intermediates: nnx.State, layers: Collection[int] | None = None):
        paths = [path for path, _ in layer_paths(model)]
        self.layers = tuple(range(len(paths)) if layers is None else layers)
        self._of_layers: dict[str, list[list[Any]]] = {}
        self._of_model: dict[str, list[Any]] = {}
        for (*path, last), variable in nnx.to_flat_state(intermediates):
            name, values = str(last), variable.get_value()
            inside = [index for index, outer in enumerate(paths) if tuple(path[: len(outer)]) == outer]
            if inside:
                self._of_layers.setdefault(name, [[] for _ in paths])[inside[0]].extend(values)
            else:
                self._of_model.setdefault(name, []).extend(values)

    def __getitem__(self, point: str) -> Any:
        if point in self._of_model:
            return _one(self._of_model[point])
        if point not in self._of_layers:
            raise KeyError(f"{point!r} was not recorded; there are {', '.join(self)}")
        values = [self._of_layers[point][layer] for layer in self.layers]
        if silent := [layer for layer, found in zip(self.layers, values, strict=True) if not found]:
            raise KeyError(f"{point!r} was not recorded in the layers {silent}: choose others by layers")
        return tuple(_one(found) for found in values)

    def recorded(self, point: str) -> dict[int, Any]:
        """What those of the layers recorded that did, by their index; nothing if none did."""
        found = self._of_layers.get(point, [])
        return {layer: _one(values) for layer, values in enumerate(found) if values and layer in self.layers}

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._of_layers, *self._of_model)))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _one(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else tuple(values)


def watch(
    model: Editable, *args: Any, layers: Collection[int] | None = None, method: str = "__call__", **kwargs: Any
) -> tuple[Any, Seen]:
    """One pass of a model, and what it recorded at its points.

    Args:
      model: it is called with `*args` and `**kwargs`.
      layers: which layers to look at, all when None.
      method: another one than the call, `"prefill"` or `"step"`.
    """
    # A clone, since capturing leaves traces in a module and is refused where it was not made (in a compiled function).
    model = nnx.clone(model)
    run = model if method == "__call__" else getattr(model, method)
    result, intermediates = nnx.capture(run, nnx.Intermediate)(*args, **kwargs)
    return result, Seen(model, intermediates, layers)


def measure(
    model: Editable,
    batches: Iterable[Any],
    fn: Callable[[Seen, Any], Mapping[str, Any]],
    *,
    layers: Collection[int] | None = None,
    inputs: Callable[[Any], tuple[Any, ...]] | None = None,
) -> dict[str, Statistic]:
    """Mean and standard deviation over examples of what a function makes of the points.

    Args:
      model: as it is, with the interventions attached to it.
      batches: arrays or trees of arrays `(B, ...)`; B may differ, which compiles anew.
      fn: `fn(seen, batch)` returns quantities by name, each `(B, ...)`, one for each example; or pairs of them and of a
        boolean mask, broadcastable to it from the left, False where there is nothing to measure. `seen["attention"]` is
        a tuple over layers. It is traced: give the same function again to have nothing compiled anew.
      layers: the layers to look at, all when None.
      inputs: the model's arguments from a batch; the batch itself, or its `"inputs"` where it is a mapping, when None.

    Raises:
      ValueError: for layers that do not exist, without any batch, or if quantities are not one for each example.
      KeyError: if `fn` asks for a point that no layer recorded, or not all of the `layers`.
    """
    count = len(model.edited_layers())
    if layers is not None and any(not 0 <= layer < count for layer in layers):
        raise ValueError(f"layers must be among the {count} of the model, got {list(layers)}")
    graph, state = nnx.split(model)
    sums: dict[str, _Moments] = {}
    for batch in batches:
        found = _run(graph, state, batch, fn=fn, layers=None if layers is None else tuple(layers), inputs=inputs)
        size = jax.tree.leaves(batch)[0].shape[0]
        for name, quantity in found.items():
            new = _Moments.of(name, quantity, size)
            sums[name] = sums[name].merged(new) if name in sums else new
    if not sums:
        raise ValueError("batches are empty: there is nothing to measure")
    return {name: moments.statistic() for name, moments in sums.items()}


def each_layer(analysis: Callable[..., NamedTuple], point: str = "attention", **options: Any) -> Callable[..., Any]:
    """A function for `measure`: an analysis of one point of every layer, its fields as `(B, L, ...)`.

    Args:
      analysis: `analysis(value, **options)` returns a NamedTuple of arrays `(B, ...)`, the same shapes in every layer.
      point: where it looks.
      **options: for the analysis.
    """

    def fn(seen: Seen, batch: Any) -> dict[str, jax.Array]:
        found = [analysis(value, **options)._asdict() for value in seen[point]]
        return {name: jnp.stack([fields[name] for fields in found], axis=1) for name in found[0]}

    return fn


@functools.partial(jax.jit, static_argnums=0, static_argnames=("fn", "layers", "inputs"))
@numpy_ranks()
def _run(graph: Any, state: Any, batch: Any, *, fn: Any, layers: Any, inputs: Any) -> dict[str, Any]:
    args = inputs(batch) if inputs is not None else (batch["inputs"] if isinstance(batch, Mapping) else batch,)
    return dict(fn(watch(nnx.merge(graph, state), *args, layers=layers)[1], batch))


class _Moments(NamedTuple):
    """Number, mean and sum of squared distances from the mean; sets are joined without loss (Chan et al., 1979)."""

    number: np.ndarray
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, name: str, quantity: Any, size: int) -> "_Moments":
        values, mask = quantity if isinstance(quantity, tuple) else (quantity, True)
        values, mask = np.asarray(values, np.float64), np.asarray(mask, bool)
        if values.ndim == 0 or values.shape[0] != size:
            raise ValueError(f"{name} must have a value for each of the {size} examples, got shape {values.shape}")
        full = np.broadcast_to(mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim)), values.shape)
        number = full.sum(0, dtype=np.int64) if mask.ndim else np.asarray(size, np.int64)
        mean = np.where(full, values, 0).sum(0) / np.maximum(number, 1)
        return cls(number, mean, (np.where(full, values - mean, 0) ** 2).sum(0))

    def merged(self, other: "_Moments") -> "_Moments":
        number, apart = self.number + other.number, other.mean - self.mean
        share = other.number / np.maximum(number, 1)
        squares = self.squares + other.squares + apart**2 * self.number * share
        return _Moments(number, self.mean + apart * share, squares)

    def statistic(self) -> Statistic:
        none = self.number == 0
        std = np.sqrt(self.squares / np.maximum(self.number, 1))
        return Statistic(np.where(none, np.nan, self.mean), np.where(none, np.nan, std), np.asarray(self.number))
