"""Settings that must stand before JAX is imported: tests run on the CPU, and compile fast rather than to fast code."""

import gc
import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of XLA's pool. Pallas' interpreter of GPUs waits in one for every warpgroup of every launch that is under way:
# with as few as a small machine has cores, a gradient may wait for ever.
os.environ.setdefault("NPROC", "16")
# libtpu compiles for TPUs here: it shall ask no cloud server about this machine, and several processes may load it.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Any values: without them it complains at length that it found none.
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILATION}".strip()

if version("jaxlib").startswith("0.10."):
    # The older emitters of fusions halve the time to compile, a module in one piece saves a tenth. libtpu reads
    # XLA_FLAGS when it is loaded, and stops at flags that it does not know: XLA reads these before, as it compiles
    # something.
    flags = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    import jax.numpy as jnp

    jnp.zeros(()).block_until_ready()
    os.environ["XLA_FLAGS"] = flags

# What is above must stand before anything imports JAX.
import jax.core  # noqa: E402

from tests import ir_context  # noqa: E402
from tests.costs import (  # noqa: E402, F401
    pytest_runtest_logfinish,
    pytest_runtest_logstart,
    pytest_runtest_makereport,
    pytest_terminal_summary,
)
from tests.limit import (  # noqa: E402, F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_setup,
)


def _no_sharding(tracer: jax.core.Tracer) -> None:
    raise AttributeError(f"'{type(tracer).__name__}' has no attribute 'sharding'")


# Flax asks for the sharding of whatever a variable is set to. A tracer has none, and JAX says so at length, after a
# search through all that was traced so far: most of the time that it takes to build a large model under `eval_shape`.
jax.core.Tracer.sharding = property(_no_sharding)

ir_context.share()

# Tracing makes many objects that live on, and few in cycles: looking for these less often saves some time.
gc.set_threshold(100_000, 20, 50)
