"""Which gradients a call asks for, in the two halves of a `jax.custom_vjp` with `symbolic_zeros=True`.

JAX tells the forward half which arguments are differentiated, and the backward half which outputs have no cotangent.
What follows is static, and residuals hold arrays alone: so it travels as the structure of a dictionary, {name: ()}.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

Marks = dict[str, tuple[()]]


def primals(arguments: Sequence[Any], **places: int) -> tuple[Marks, list[jax.Array | None]]:
    """Marks of the named arguments that are differentiated, and the arrays of all; None for absent ones.

    Args:
      arguments: what the forward half gets, each a `CustomVJPPrimal` or None.
      **places: places of arguments by name.
    """
    marks = {name: () for name, place in places.items() if arguments[place] is not None and arguments[place].perturbed}
    return marks, [None if x is None else x.value for x in arguments]


def differentiated(x: jax.Array) -> bool:
    """Whether a transformation around this call, and nothing in between that is traced first, differentiates `x`.

    Inside `jax.jit`, `jax.lax.scan` or `jax.checkpoint` that are differentiated as a whole, nobody knows yet.
    """
    found = []

    @jax.custom_jvp
    def identity(x):
        return x

    def rule(primals, tangents):
        found.append(not isinstance(tangents[0], SymbolicZero))
        return primals[0], tangents[0]

    identity.defjvp(rule, symbolic_zeros=True)
    identity(x)
    return any(found)


def cotangent(x: Any) -> jax.Array | None:
    """The cotangent of an output, None where there is none."""
    return None if isinstance(x, SymbolicZero) else x
