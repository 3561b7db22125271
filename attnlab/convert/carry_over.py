"""Weights of one model in another that shares most of them."""

from collections.abc import Callable
from typing import Any, TypeVar

from flax import nnx

ModelT = TypeVar("ModelT", bound=nnx.Module)
Path = tuple[Any, ...]


def carry_over(
    source: nnx.Module,
    target: ModelT,
    *,
    new: Callable[[Path], bool],
    gone: Callable[[Path], bool] = lambda path: False,
) -> ModelT:
    """The target with the source's parameters, by their paths, in place of its own.

    Args:
      source: where parameters come from.
      target: where they go; it is not changed.
      new: whether the parameter at a path of the target is its own and stays.
      gone: whether the parameter at a path of the source is left behind.

    Returns:
      A new structure; what was carried over is the source's arrays.

    Raises:
      ValueError: if a parameter of either model has no counterpart in the other, or another shape.
    """
    target = nnx.clone(target)
    there = dict(nnx.to_flat_state(nnx.state(source, nnx.Param)))
    here = dict(nnx.to_flat_state(nnx.state(target, nnx.Param)))
    kept = (path for path in there if not gone(path))
    problems = [f"{_words(path)} has no place in it" for path in kept if path not in here or new(path)]
    for path, variable in here.items():
        if new(path):
            continue
        if path not in there:
            problems.append(f"its {_words(path)} is not in the other")
        elif there[path].shape != variable.shape:
            problems.append(f"{_words(path)} is {there[path].shape}, its own {variable.shape}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the models differ in other parts than those that change: {'; '.join(problems[:5])}{more}")
    carried = [(path, there[path]) for path in here if not new(path)]
    nnx.update(target, nnx.from_flat_state(carried))
    return target


def _words(path: Path) -> str:
    return "/".join(map(str, path))
