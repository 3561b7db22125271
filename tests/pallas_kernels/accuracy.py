"""Errors of an op against the float64 reference, for the tests of every op."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.accuracy import relative_rms


@dataclasses.dataclass(frozen=True)
class Results:
    """Outputs (y, and the state where there is one) and gradients by argument: numbers in float64, or their errors."""

    outputs: list
    gradients: dict[str, Any]


def results_of(run: Callable[[Any], Any], arguments: Any) -> Results:
    """Outputs, and the gradient of a random linear function of them for each argument.

    The numbers of that function are exact in bfloat16. An op is given them in the dtype of its outputs; were they
    rounded on the way, gradients that nearly cancel would show an error of the test's.

    Args:
      run: arguments -> a tree of outputs.
      arguments: a tree of floating arrays.
    """

    def loss(arguments):
        outputs, rng = jax.tree.leaves(run(arguments)), np.random.default_rng(0)
        total = 0.0
        for x in outputs:
            direction = jnp.asarray(rng.standard_normal(x.shape), jnp.bfloat16)
            wide = jnp.promote_types(x.dtype, jnp.float32)
            total += jnp.vdot(x.astype(wide), direction.astype(wide))
        return total, outputs

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arguments)
    paths = jax.tree_util.tree_leaves_with_path(gradients)
    return Results(
        [np.asarray(x, np.float64) for x in outputs],
        {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(g, np.float64) for path, g in paths},
    )


def errors_of(evaluate: Callable[..., Results], case: Any, dtype: jnp.dtype, **how: Any) -> Results:
    """Relative RMS errors of an implementation against the float64 reference on the same rounded inputs.

    Args:
      evaluate: (arguments, options, implementation=..., ...) -> results.
      case: of the op's `cases.py`.
      dtype: of q, k and v.
      **how: further arguments of `evaluate`.
    """
    arguments, options = case.arguments(dtype)
    got = evaluate(arguments, options, **how)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), arguments)
        want = evaluate(exact, options, implementation="reference")
    return relative_errors(got, want)


def relative_errors(got: Results, want: Results) -> Results:
    """Relative RMS errors of results."""
    assert got.gradients.keys() == want.gradients.keys()
    return Results(
        [relative_rms(g, w) for g, w in zip(got.outputs, want.outputs, strict=True)],
        {name: relative_rms(got.gradients[name], w) for name, w in want.gradients.items()},
    )


def assert_close(got: Any, want: Any, tolerance: float = 2e-6) -> None:
    """Asserts that no number of `got` differs by more than `tolerance` times the largest of its array in `want`."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(float(jnp.max(jnp.abs(w))), 1e-6)
        np.testing.assert_allclose(np.asarray(g) / scale, np.asarray(w) / scale, rtol=0, atol=tolerance)
