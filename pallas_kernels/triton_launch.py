"""The one call of jax-triton, which the tests of kernels put an interpreter or a compiler in place of."""

from collections.abc import Sequence
from typing import Any

import jax


def launch(
    kernel: Any,
    arrays: Sequence[jax.Array],
    tokens: int,
    shapes: Sequence[jax.ShapeDtypeStruct],
    capability: int | None,
    grid: int,
    warps: int,
    stages: int,
    constants: dict[str, Any],
) -> Sequence[jax.Array]:
    """Runs `kernel(*arrays, tokens, *outputs, **constants)`; without a `capability` it is that of the first GPU."""
    import jax_triton  # raises where jaxlib has no CUDA

    return jax_triton.triton_call(
        *arrays,
        tokens,
        kernel=kernel,
        out_shape=list(shapes),
        grid=(grid,),
        num_warps=warps,
        num_stages=stages,
        compute_capability=capability,
        **constants,
    )
