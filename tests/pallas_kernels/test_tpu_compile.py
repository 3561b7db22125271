"""The helpers that compile for TPUs do compile there, and count what comes out."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from tests.pallas_kernels import tpu_schedule
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


def test_bundles_count_as_often_as_the_loops_around_them_turn():
    listing = """
     0   :  { %s0_s0 = smov 0 }
   0x1 LB: > { %s1_s1 = smov 0 }
   0x2   :  {}
   0x3 LB: >> { %s2_s2 = sadd.s32 4, %s1_s1 }
   0x4   : > { %p1_p1 = scmp.ge.s32.totalorder %s2_s2, 8 /* loop exit test */ }
   0x5   : >> { %9 = sbr.rel (!%p1_p1) target = $region1 }
   0x6 PF: > { %s3_s3 = sadd.s32 1, %s0_s0  ;;  %p2_p2 = scmp.ge.s32.totalorder %s3_s3, 18 /* loop exit test */ }
   0x7   : > { %10 = sbr.rel (!%p3_p3) target = $region2 }
   0x8   : > { %11 = sbr.rel (!%p2_p2) target = $region3 }
   0x9   :  { %12 = vsyncpa [#allocation], 1 }
"""
    assert tpu_schedule.bundles_of(listing) == 2 + (18 - tpu_schedule.FILL) * (5 + 2 * 3)


def test_schedules_of_kernels_are_found():
    forward, backward = tpu_schedule.measure("linear_attention", "v5p", 64, "none", "bfloat16", "tokens")
    assert 0.1 < forward < backward < 10


def test_a_listing_in_another_form_is_refused():
    with pytest.raises(ValueError, match="loop whose end was not found"):
        tpu_schedule.bundles_of("     0   :  { %s0_s0 = smov 0 }\n   0x1 LB: > { %s1_s1 = smov 0 }\n")
