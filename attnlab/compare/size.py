"""Models of equal size: the width at which a mixer's model has as many parameters, or operations, as another's."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.data import DatasetInfo
from attnlab.experiment import Experiment, ModelConfig

Measure = Literal["parameters", "flops"]
MEASURES: tuple[Measure, ...] = ("parameters", "flops")
WIDEST = 8  # times the configured width
_MOVES = frozenset(
    {"broadcast_in_dim", "concatenate", "convert_element_type", "copy", "dynamic_slice", "dynamic_update_slice"}
    | {"gather", "iota", "pad", "reshape", "rev", "scatter", "select_n", "slice", "squeeze", "transpose"}
)
"""Operations that compute no number."""


def size_of(experiment: Experiment, info: DatasetInfo, measure: Measure, inputs: jax.ShapeDtypeStruct) -> int:
    """Parameters of the experiment's model, or floating-point operations of its forward pass on `inputs`.

    Raises:
      ValueError: for a model that cannot be built, or whose operations are not known before it runs.
    """
    model = nnx.eval_shape(lambda: experiment.model.build(info, rngs=nnx.Rngs(0)))
    if measure == "parameters":
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    graph, state = nnx.split(model)
    return operations(jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, inputs).jaxpr)


def operations(jaxpr: Any) -> int:
    """Floating-point operations of a program: 2 for each product that is added up, 1 for any other number computed.

    Of branches the dearest counts.

    Raises:
      ValueError: for a loop whose length is not known.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params, (first, *_) = equation.primitive.name, equation.params, equation.outvars
        inner = [part for value in params.values() for part in _jaxprs(value)]
        if name == "dot_general":
            (summed, _), _ = params["dimension_numbers"]
            total += 2 * first.aval.size * math.prod(equation.invars[0].aval.shape[axis] for axis in summed)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            total += 2 * first.aval.size * kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        elif name == "while":
            raise ValueError("its operations are not known: a loop in it ends by what it computes")
        elif name == "scan":
            total += params["length"] * sum(map(operations, inner))
        elif name == "cond":
            total += max(map(operations, inner))
        elif inner:
            total += sum(map(operations, inner))
        elif name not in _MOVES and jnp.issubdtype(first.aval.dtype, jnp.inexact):
            reads = name.startswith("reduce") or name == "argmax"
            total += equation.invars[0].aval.size if reads else first.aval.size
    return total


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [part for item in value for part in _jaxprs(item)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


def matched(
    experiment: Experiment, info: DatasetInfo, measure: Measure, inputs: jax.ShapeDtypeStruct, target: int
) -> Experiment:
    """The experiment at the width at which its model's size is nearest to `target`; the number of heads stays.

    Widths grow in steps of 2 for each head (of 1, where a head has an odd size); stages keep their proportions.

    Raises:
      ValueError: for a model without the options `features` and `num_heads`, or of which no width can be built.
    """
    model, steps = experiment.model, _steps(experiment.model)
    sizes: dict[int, int | None] = {}
    reason = ""

    def size(step: int) -> int | None:
        nonlocal reason
        if step not in sizes:
            try:
                wider = dataclasses.replace(experiment, model=_widened(model, step))
                sizes[step] = size_of(wider, info, measure, inputs)
            except ValueError as error:
                sizes[step], reason = None, str(error)
        return sizes[step]

    def built(step: int, way: int) -> int | None:
        """The nearest step from here on that can be built."""
        return next((s for s in range(step, step + 8 * way, way) if s > 0 and size(s) is not None), None)

    low, high = 1, WIDEST * steps
    while low < high:
        middle = (low + high) // 2
        found = built(middle, 1)
        if found is not None and size(found) < target:
            low = middle + 1
        else:
            high = middle
    near = [step for step in (built(low, 1), built(low - 1, -1)) if step is not None]
    if not near:
        raise ValueError(f"no width near the wanted size can be built: {reason}")
    best = min(near, key=lambda step: abs(size(step) - target))
    return dataclasses.replace(experiment, model=_widened(model, best))


def width(model: ModelConfig) -> str:
    """Channels of the model, of each stage where it has several, in words."""
    features = getattr(model, "features", None)
    return "" if features is None else " · ".join(map(str, _tuple(features)))


def _steps(model: ModelConfig) -> int:
    if not (hasattr(model, "features") and hasattr(model, "num_heads")):
        name = type(model).__name__.removesuffix("Config")
        raise ValueError(f"match: {name} has no options features and num_heads by which its width could be adjusted")
    return _head_sizes(model)[0] // _unit(model)


def _widened(model: ModelConfig, step: int) -> ModelConfig:
    unit, sizes, heads = _unit(model), _head_sizes(model), _tuple(model.num_heads)
    features = [h * unit * max(1, round(size * step / sizes[0])) for h, size in zip(heads, sizes, strict=True)]
    return dataclasses.replace(model, features=features[0] if isinstance(model.features, int) else tuple(features))


def _unit(model: ModelConfig) -> int:
    return 1 if any(size % 2 for size in _head_sizes(model)) else 2


def _head_sizes(model: ModelConfig) -> list[int]:
    return [f // h for f, h in zip(_tuple(model.features), _tuple(model.num_heads), strict=True)]


def _tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
