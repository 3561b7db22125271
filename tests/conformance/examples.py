"""What every registered function, module, objective, intervention and analysis is held to, by its small `Example`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from attnlab import Example, Kind
from tests.conformance.subjects import close, finite, named

Arguments = dict[str, Any]  # by keyword, or by position as a string: keys of one kind, as JAX sorts them


class Case:
    """An example, its call as a program of arrays, and the result of it.

    Attributes:
      example: as registered.
      state: of the module that is called; empty for a function.
      arrays: the arguments that are arrays, or trees of them, by position or keyword.
    """

    def __init__(self, example: Example):
        self.example = example
        self.module = isinstance(example.call, nnx.Module)
        self.graph, self.state = nnx.split(example.call) if self.module else (None, nnx.State({}))
        given: Arguments = {**{str(i): value for i, value in enumerate(example.args)}, **example.kwargs}
        self.arrays = {key: value for key, value in given.items() if _is_arrays(value)}
        self.static = {key: value for key, value in given.items() if key not in self.arrays}
        self.batched, self.differentiable = (
            tuple(map(str, keys)) for keys in (example.batched, example.differentiable)
        )
        self.program = jax.jit(self.eager)

    def eager(self, state: Any, arrays: Arguments) -> Any:
        call = nnx.merge(self.graph, state) if self.module else self.example.call
        return self.direct(call, arrays)

    def direct(self, call: Callable[..., Any], arrays: Arguments) -> Any:
        given = self.static | arrays
        args = [given.pop(str(i)) for i in range(len(self.example.args))]
        return call(*args, **given)

    @functools.cached_property
    def result(self) -> Any:
        return self.program(self.state, self.arrays)

    @functools.cached_property
    def half(self) -> Any:
        """The result for bfloat16 arguments."""
        return self.program(self.state, _cast(self.arrays, jnp.bfloat16))


def _is_arrays(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)


def _floating(array: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(array), jnp.floating)


def _floats(tree: Any) -> dict[str, Any]:
    return {path: leaf for path, leaf in named(tree).items() if _floating(leaf)}


def check_jit_equals_eager(case: Case, kind: Kind) -> None:
    want = case.direct(case.example.call, case.arrays)
    assert jax.tree.structure(want) == jax.tree.structure(case.result)
    for name, leaf in named(want).items():
        close(named(case.result)[name], leaf, what=name)


def check_dtypes(case: Case, kind: Kind) -> None:
    """float32 for float32; what is bfloat16 gives bfloat16, or float32 where sums and losses are kept wide."""
    for name, leaf in _floats(case.result).items():
        assert leaf.dtype == jnp.float32, name
    for name, leaf in _floats(case.half).items():
        allowed = (jnp.float32,) if kind is Kind.OBJECTIVE else (jnp.bfloat16, jnp.float32)
        assert leaf.dtype in allowed, name


def check_bfloat16_is_near_float32(case: Case, kind: Kind) -> None:
    rounded = _cast(_cast(case.arrays, jnp.bfloat16), jnp.float32)
    want = _floats(case.program(case.state, rounded))
    for name, leaf in _floats(case.half).items():
        close(leaf, want[name], 4e-2, name)


def check_examples_are_independent(case: Case, kind: Kind) -> None:
    """Every array of the result has the batch's axis, and in another order the batch gives the same in that order."""
    batched = case.batched
    if not batched:
        return
    (count,) = {len(leaf) for key in batched for leaf in jax.tree.leaves(case.arrays[key])}
    assert count > 1, "an example has at least two in its batch"
    alone = case.program(case.state, case.arrays | {k: _take(case.arrays[k], np.zeros(count, int)) for k in batched})
    for name, leaf in named(case.result).items():
        assert np.shape(leaf)[:1] == (count,), f"{name} has no axis of the batch"
        for row in named(alone)[name]:
            close(row, leaf[0], what=name)


def check_gradients(case: Case, kind: Kind) -> None:
    """Of every parameter and every argument that has one: finite, and not all of them zero."""
    if not case.differentiable and not jax.tree.leaves(nnx.filter_state(case.state, nnx.Param)):
        return
    params, rest = nnx.split_state(case.state, nnx.Param, ...)
    moved = {key: case.arrays[key] for key in case.differentiable}

    def loss(params: Any, moved: Arguments) -> jax.Array:
        result = case.eager(nnx.merge_state(params, rest), case.arrays | moved)
        random = np.random.default_rng(9)
        return sum(jnp.sum(leaf * random.standard_normal(leaf.shape)) for leaf in _floats(result).values())

    gradients = named(jax.jit(jax.grad(loss, (0, 1)))(params, moved))
    for name, gradient in gradients.items():
        assert finite(gradient), name
    assert any(np.any(np.asarray(gradient)) for gradient in gradients.values()), "nothing has a gradient"


def check_save_and_restore(case: Case, kind: Kind, path: Any) -> None:
    if not jax.tree.leaves(case.state):
        return
    pure = nnx.to_pure_dict(case.state)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(path / "module", args=ocp.args.StandardSave(pure))
        blank = jax.tree.map(np.zeros_like, pure)
        restored = checkpointer.restore(path / "module", args=ocp.args.StandardRestore(blank))
    state = jax.tree.map(lambda leaf: leaf, case.state)
    nnx.replace_by_pure_dict(state, restored)
    again = case.program(state, case.arrays)
    for name, leaf in named(case.result).items():
        np.testing.assert_array_equal(named(again)[name], leaf)


def check_refusals(case: Case, kind: Kind) -> None:
    """Unknown arguments, and batches that disagree, are errors."""
    with pytest.raises(TypeError, match="no_such_argument"):
        case.direct(lambda *a, **k: case.example.call(*a, **k, no_such_argument=1), case.arrays)
    for other in case.batched[1:2]:
        longer = _take(case.arrays[other], np.array([0, 1, 1, 0, 1]))
        with pytest.raises((ValueError, TypeError)):
            case.direct(case.example.call, case.arrays | {other: longer})


CHECKS = (
    check_jit_equals_eager,
    check_dtypes,
    check_bfloat16_is_near_float32,
    check_examples_are_independent,
    check_gradients,
    check_refusals,
)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a, dtype) if _floating(a) else a, tree)


def _take(tree: Any, rows: np.ndarray) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a)[rows], tree)
