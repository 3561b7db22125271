"""How programs that run once are compiled."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import dispatch


def compiled_for_once(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit` of a program that runs once or a few times; on a CPU it is compiled fast rather than well.

    Drawing a small model's parameters takes XLA longer to compile than a hundred training steps take, and four times
    less without optimisation.

    Args:
      function: to compile; not to be called inside another jit.
      **options: of `jax.jit`.
    """
    quick = {"xla_backend_optimization_level": 0} if dispatch.current_platform() == "cpu" else None
    return jax.jit(function, compiler_options=quick, **options)
