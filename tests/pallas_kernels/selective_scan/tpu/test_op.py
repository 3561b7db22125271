"""The TPU kernels, interpreted: memory that nobody wrote is NaN, reads out of bounds raise, races are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, selective_scan
from pallas_kernels.selective_scan import explain
from pallas_kernels.selective_scan.cases import ACCURACY, Case
from pallas_kernels.selective_scan.tpu import plan as tpu_plan
from pallas_kernels.tpu.chips import CHIPS, UNKNOWN_CHIP
from tests.pallas_kernels.quick import quick
from tests.pallas_kernels.tpu_interpreter import interpreted

BOUND = {"float32": 1e-6, "bfloat16": 4e-3}

# (case, dtype): several blocks, a tail, groups in place and filled up, every option.
CASES = (
    (Case("one_token", length=1, initial_state=True), "float32"),
    (Case("blocks", 1, 150, 8, 4, gate=True, initial_state=True), "float32"),
    (Case("wide", 1, 140, 256, 16, gate=True), "bfloat16"),
    (Case("groups_in_place", 1, 40, 256, 4, groups=2, softplus=False, skip=False), "float32"),
    (Case("groups_filled_up", 2, 33, 12, 9, groups=4, initial_state=True), "bfloat16"),
    (Case("packed", 1, 135, 8, 3, groups=2, segments=4, initial_state=True, gate=True), "float32"),
    (Case("strong", 1, 100, 8, 16, step=50.0), "float32"),
)
QUICK = ("groups_filled_up",)


@pytest.mark.parametrize(("case", "dtype"), quick(CASES, QUICK, lambda values: values[0].name))
def test_relative_rms_error(case, dtype, errors):
    with interpreted(None, tpu_plan, BLOCK_TOKENS=128):
        found = errors(case, jnp.dtype(dtype), implementation="tpu")
    assert max(found.outputs) <= BOUND[dtype], found.outputs
    assert max(found.gradients.values()) <= 2 * BOUND[dtype], found.gradients


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("case", [case for case in ACCURACY if case.length == 1000], ids=lambda case: case.name)
def test_accuracy_at_the_lengths_where_it_is_promised(case, dtype, errors):
    with interpreted(None):
        found = errors(case, jnp.dtype(dtype), implementation="tpu")
    assert max(found.outputs) <= BOUND[dtype], found.outputs
    assert max(found.gradients.values()) <= 2 * BOUND[dtype], found.gradients


@pytest.mark.slow
def test_vmap_joins_the_batch_and_all_states_are_a_scan_too():
    arguments, options = Case("vmap", 1, 20, 8, 2).arguments()
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), arguments)

    def run(arguments, implementation):
        given = {"return_states": True, "implementation": implementation, **options}
        return jax.vmap(lambda a: selective_scan(**a, **given))(arguments)

    want = run(stacked, "xla")
    with interpreted(None):
        got = jax.jit(lambda a: run(a, "tpu"))(stacked)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("chip", [UNKNOWN_CHIP, *{chip.name: chip for chip in CHIPS.values()}.values()], ids=str)
def test_bytes_moved_and_on_chip_memory(chip):
    batch, length, channels = 2, 4096, 1536
    config = tpu_plan.Config(chip, gated=True, skipped=True, biased=True, softplus=True)
    for dtype, size in ((jnp.bfloat16, 2), (jnp.float32, 4)):
        plan = tpu_plan.plan_for(config, batch, length, channels, 1, 16, dtype)
        least = batch * length * channels * size
        assert plan.bytes_moved("forward") <= 1.3 * 4 * least
        assert plan.bytes_moved("backward") <= 1.6 * 7 * least
        assert max(map(plan.vmem, tpu_plan.KINDS)) <= chip.vmem_limit


@pytest.mark.parametrize(
    ("channels", "groups", "padded", "lanes"), [(1536, 1, 1536, 256), (384, 1, 384, 128), (24, 4, 512, 128)]
)
def test_lanes_of_a_block(channels, groups, padded, lanes):
    plan = tpu_plan.plan_for(tpu_plan.Config(), 1, 1000, channels, groups, 3, jnp.float32)
    assert (plan.heads, plan.block_heads, plan.repeats) == (padded, lanes, padded // groups)
    assert plan.key_size == 8


def test_blocks_of_tokens_do_not_depend_on_what_a_device_gets():
    plans = [
        tpu_plan.plan_for(tpu_plan.Config(), batch, 1000, channels, 1, 16, jnp.float32)
        for batch, channels in ((1, 1536), (4, 384), (1, 8))
    ]
    assert len({plan.tokens for plan in plans}) == 1


ON_TPU = {
    "float16": (jnp.float16, 2, {}, "it takes bfloat16 and float32, got float16"),
    "large states": (jnp.float32, 129, {}, "S may be at most 128, got 129"),
    "chunks": (jnp.float32, 2, {"chunk_size": 16}, "it has no chunks, so chunk_size must be None, got 16"),
}


@pytest.mark.parametrize("name", ON_TPU)
def test_refusals(name):
    dtype, size, options, message = ON_TPU[name]
    x, b = jnp.ones((1, 6, 4), dtype), jnp.ones((1, 6, size), dtype)
    a = -jnp.ones((4, size))
    with dispatch.target("tpu", qualified_only=False):
        answers = {answer.name: answer for answer in explain(x, x, a, b, b, **options)}
        with pytest.raises(dispatch.UnsupportedError, match=message):
            selective_scan(x, x, a, b, b, **options, implementation="tpu")
    assert not answers["tpu"].ok and answers["xla"].ok and message in answers["tpu"].reason
