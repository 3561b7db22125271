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
    gradients: dict


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
    return Results(
        [relative_rms(g, w) for g, w in zip(got.outputs, want.outputs, strict=True)],
        {name: relative_rms(got.gradients[name], w) for name, w in want.gradients.items()},
    )


def assert_close(got: Any, want: Any, tolerance: float = 2e-6) -> None:
    """Asserts that no number of `got` differs by more than `tolerance` times the largest of its array in `want`."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(float(jnp.max(jnp.abs(w))), 1e-6)
        np.testing.assert_allclose(np.asarray(g) / scale, np.asarray(w) / scale, rtol=0, atol=tolerance)
