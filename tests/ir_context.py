"""One MLIR context for all programs that the tests compile.

JAX makes one with all dialects for every program, which is half of the time that a small program takes. A context holds
on to what was built in it, so another one is made when compiled programs are dropped.
"""

import functools

# JAX's own business, which may be elsewhere in other versions: there nothing is shared.
from jax._src.interpreters import mlir


def share() -> None:
    if hasattr(mlir, "make_ir_context"):
        mlir.make_ir_context = functools.cache(mlir.make_ir_context)


def renew() -> None:
    if hasattr(mlir, "make_ir_context"):
        mlir.make_ir_context.cache_clear()
