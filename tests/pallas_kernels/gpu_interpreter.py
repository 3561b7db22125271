"""Pallas' interpreter of GPUs, which JAX 0.10 to 0.12 do not export."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import jax

try:
    from jax._src.pallas.mosaic.interpret import thread_map
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races, reset_gpu_interpret_mode_state
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
except ImportError:
    InterpretGPUParams = get_races = None


@contextmanager
def interpreting() -> Iterator[None]:
    """Within it a program is compiled once; afterwards no memory is left.

    By itself the interpreter compiles the program of a warpgroup for each of them and each CTA.
    """
    compiled, lock = {}, threading.Lock()

    def run(jaxpr, consts, *args):
        with lock:
            if jaxpr not in compiled:
                program = jax.jit(lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args))
                compiled[jaxpr] = program.trace(consts, *args).lower().compile()
        compiled[jaxpr](consts, *args)

    try:
        with mock.patch.object(thread_map, "_run_jaxpr", run):
            yield
    finally:
        reset_gpu_interpret_mode_state()
