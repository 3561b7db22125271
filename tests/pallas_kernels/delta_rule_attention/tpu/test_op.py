"""The TPU kernels, interpreted: memory that nobody wrote is NaN, reads out of bounds raise, races are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import delta_rule_attention
from pallas_kernels.delta_rule_attention.cases import ACCURACY, Case
from pallas_kernels.delta_rule_attention.tpu import plan as tpu_plan
from pallas_kernels.tpu.chips import CHIPS, UNKNOWN_CHIP, chip_of
from pallas_kernels.tpu.plans import Config
from tests.pallas_kernels.quick import quick
from tests.pallas_kernels.tpu_interpreter import interpreted

BOUND = {"float32": 1e-6, "bfloat16": 4e-3}


# (case, dtype, tokens per chunk, tokens per block): several blocks, a tail, every layout of heads, every option.
CASES = (
    (Case("one_token", length=1, initial_state=True), "float32", None, 512),
    (Case("token", 1, 150, 2, 64, decay="token", initial_state=True, scale=0.3), "float32", 32, 64),
    (Case("wide", 1, 150, 2, 16, beta="wide", decay="head", scale=0.0), "bfloat16", 32, 64),
    (Case("keys_in_place", 1, 70, 2, 128, kv_heads=1, initial_state=True), "bfloat16", 64, 512),
    (Case("keys_repeated", 1, 70, 3, 24, value_size=72, kv_heads=1, decay="head"), "float32", 64, 512),
    (Case("packed", 1, 130, 2, 32, segments=3, initial_state=True, repeat=5, beta=1.0), "float32", None, 512),
    (Case("strong", 1, 100, 1, 32, decay="token", strength=20.0, uniform=True), "float32", 64, 64),
    (Case("long", 1, 700, 1, 64, beta="wide"), "bfloat16", None, 512),
)


QUICK = ("token", "keys_in_place")


@pytest.mark.parametrize(("case", "dtype", "chunk", "block"), quick(CASES, QUICK, lambda values: values[0].name))
def test_relative_rms_error(case, dtype, chunk, block, errors):
    with interpreted(None, tpu_plan, BLOCK_TOKENS=block):
        found = errors(case, jnp.dtype(dtype), implementation="tpu", chunk_size=chunk)
    assert max(found.outputs) <= BOUND[dtype], found.outputs
    assert ("log_decay" in found.gradients) == (case.decay is not None)
    assert max(found.gradients.values()) <= 2 * BOUND[dtype], found.gradients


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("case", ACCURACY, ids=lambda case: case.name)
def test_accuracy_at_the_lengths_where_it_is_promised(case, dtype, errors):
    """The float32 gradient of a decay per head is a sum over tokens, and rounds as the root of their number.

    How far depends on the order in which XLA takes the sum.
    """
    with interpreted(None):
        found = errors(case, jnp.dtype(dtype), implementation="tpu")
    if case.decay == "head" and dtype == "float32":
        assert found.gradients.pop("log_decay") <= 2 * case.length**0.5 * np.finfo(np.float32).eps, found.gradients
    assert max(found.outputs) <= BOUND[dtype], found.outputs
    assert max(found.gradients.values()) <= 2 * BOUND[dtype], found.gradients


@pytest.mark.slow
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 100),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    key_size=st.integers(1, 70),
    value_size=st.integers(1, 70),
    decay=st.sampled_from([None, "head", "token"]),
    segments=st.integers(0, 3),
)
def test_random_shapes(errors, length, kv_heads, group, key_size, value_size, decay, segments):
    case = Case("random", 1, length, kv_heads * group, key_size, value_size, kv_heads, "uniform", decay, 1.0,
                segments=segments, initial_state=True)  # fmt: skip
    with interpreted(None):
        found = errors(case, jnp.dtype("float32"), implementation="tpu", chunk_size=32)
    assert max(*found.outputs, *found.gradients.values()) <= 2e-6, found


@pytest.mark.slow
def test_scale_has_a_gradient_and_vmap_joins_the_batch():
    arguments, _ = Case("scale", 1, 40, 2, 16).arguments()
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), arguments)
    y = jax.vmap(lambda a: delta_rule_attention(**a))(stacked)

    def loss(scale):
        return jnp.vdot(jax.vmap(lambda a: delta_rule_attention(**a, scale=scale, implementation="tpu"))(stacked), y)

    with interpreted(None):
        for scale in (0.0, 0.5):
            value, gradient = jax.jit(jax.value_and_grad(loss))(scale)
            np.testing.assert_allclose((value, gradient), (scale * jnp.vdot(y, y), jnp.vdot(y, y)), rtol=1e-5)


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("chip", [UNKNOWN_CHIP, *{chip.name: chip for chip in CHIPS.values()}.values()], ids=str)
def test_bytes_moved_and_on_chip_memory(chip, size):
    batch, length, heads = 2, 8192, 16
    plan = tpu_plan.plan_for(Config(chip, decay="token"), batch, length, heads, heads, size, size, jnp.bfloat16)
    least = batch * length * heads * size * 2
    assert plan.bytes_moved("forward") <= 1.1 * 4 * least
    assert plan.bytes_moved("keep") <= 1.3 * 4 * least
    assert plan.bytes_moved("backward") <= 1.3 * 7 * least
    assert max(map(plan.vmem, tpu_plan.KINDS)) <= chip.vmem_limit
    wide = tpu_plan.plan_for(Config(chip, decay="token"), batch, length, heads, heads, size, size, jnp.float32)
    assert max(map(wide.vmem, tpu_plan.KINDS)) <= chip.vmem_limit


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "repeats", "block_heads"),
    [
        (8, 8, 128, 1, 4),
        (6, 6, 128, 1, 2),
        (3, 3, 128, 1, 1),
        (8, 8, 256, 1, 2),
        (8, 2, 128, 4, 4),  # a block reads one head of k and v
        (8, 4, 128, 2, 2),
        (3, 1, 128, 3, 1),
        (12, 4, 128, 1, 4),  # four heads of a block would read two: they are repeated
        (8, 2, 64, 1, 4),  # half a tile of lanes cannot be cut out
    ],
)
def test_heads_of_a_block(heads, kv_heads, size, repeats, block_heads):
    config = Config(chip_of("TPU v5e"), decay="token")
    plan = tpu_plan.plan_for(config, 1, 5000, heads, kv_heads, size, size, jnp.bfloat16)
    assert (plan.repeats, plan.block_heads) == (repeats, block_heads)


def test_blocks_of_tokens_do_not_depend_on_what_a_device_gets():
    plans = [
        tpu_plan.plan_for(Config(), batch, 5000, heads, kv_heads, 64, 128, jnp.float32)
        for batch, heads, kv_heads in ((1, 12, 12), (4, 3, 3), (1, 1, 1), (2, 6, 2))
    ]
    assert len({(plan.tokens, plan.chunk) for plan in plans}) == 1
