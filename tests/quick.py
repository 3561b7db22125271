"""`jax.jit` for large functions that run once: it halves the time to compile for the CPU."""

import functools
from importlib.metadata import version

import jax

# An option of the call, not of XLA_FLAGS: libtpu reads those too, and stops at flags that it does not know.
OPTIONS = {"xla_cpu_use_fusion_emitters": False} if version("jaxlib").startswith("0.10.") else {}

quick_jit = functools.partial(jax.jit, compiler_options=OPTIONS)
