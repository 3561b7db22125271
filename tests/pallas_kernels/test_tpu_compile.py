"""The helper that compiles for TPUs does compile there."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from tests.pallas_kernels.tpu_compile import TOPOLOGIES, compile_for, kernels_of, needs_tpu_compiler, shape

pytestmark = needs_tpu_compiler


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_kernel_is_compiled_for_the_chip_that_dispatch_names(topology):
    seen = []

    def double(x):
        seen.append((dispatch.current_platform(), dispatch.current_device_kind()))
        return pl.pallas_call(lambda x, y: y.__setitem__(..., x[...] * 2), out_shape=x)(x)

    compiled = compile_for(topology, double, shape((16, 128), jnp.float32))
    assert kernels_of(compiled) == 1
    assert seen == [("tpu", compiled.input_shardings[0][0].device_set.pop().device_kind)]


def test_what_does_not_fit_on_chip_is_an_error():
    def copy(x):
        return pl.pallas_call(
            lambda x, y: y.__setitem__(..., x[...]),
            out_shape=x,
            compiler_params=pltpu.CompilerParams(vmem_limit_bytes=2**20),
        )(x)

    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)vmem"):
        compile_for("v5e", copy, shape((4096, 1024), jnp.float32))
