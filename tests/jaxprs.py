"""What a traced function is made of."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import JaxprEqn, jaxprs_in_params


def equations(run: Callable[..., Any], *arguments: Any) -> Iterator[JaxprEqn]:
    """Every equation of a function's trace, those inside loops, calls and kernels included.

    Args:
      run: what `jax.jit` takes.
      *arguments: pytrees of arrays, or of `jax.ShapeDtypeStruct`.
    """

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for inner in jaxprs_in_params(equation.params):
                yield from walk(inner)

    return walk(jax.make_jaxpr(run)(*arguments).jaxpr)


def largest_array(run: Callable[..., Any], *arguments: Any) -> int:
    """Elements of the largest value that a function makes anywhere."""
    return max(x.aval.size for equation in equations(run, *arguments) for x in equation.outvars)
