"""Mosaic GPU kernels for Blackwell without a GPU: run by Pallas' interpreter of GPUs, and lowered for CUDA.

The interpreter of JAX 0.11 executes them as they are, products and tensor memory included, but for register layouts.
That of JAX 0.10 has no tensor memory: there lowering alone is checked.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.linear_attention import api
from pallas_kernels.linear_attention import mosaic_gpu as implementation
from pallas_kernels.linear_attention import mosaic_gpu_blackwell as kernel
from pallas_kernels.linear_attention import mosaic_gpu_plan as plans
from pallas_kernels.linear_attention.cases import ACCURACY, Case
from tests.pallas_kernels.linear_attention import gpu_interpreter
from tests.pallas_kernels.linear_attention.test_mosaic_gpu import arguments, check, launches, lowered

B200 = "NVIDIA B200"
interpreted = pytest.mark.skipif(
    gpu_interpreter.InterpretGPUParams is None or jax.__version_info__ < (0, 11),
    reason=f"the Pallas interpreter of GPUs in JAX {jax.__version__} has no tensor memory, 0.11 has it",
)


@pytest.fixture
def interpreter():
    """Parameters by case: memory is NaN before it is written, and reads out of bounds raise.

    Not so where the copy engine fills with zeros, tokens beyond N or channels beyond 64: the interpreter knows that
    only as the value of all memory.
    """

    def parameters(case: Case, length: int | None = None, **more):
        smallest = min(case.key_size, case.value_size or case.key_size)
        if (length or case.length) % kernel.CHUNK or smallest < kernel.CHUNK:
            more |= {"out_of_bounds_reads": "uninitialized", "uninitialized_memory": "zero"}
        return gpu_interpreter.InterpretGPUParams(**more)

    with gpu_interpreter.interpreting():
        yield parameters


# A case, its scale, and how it is cut.
CASES = {
    "none, two batches": (Case("none", 2, 140, heads=1, key_size=64), None, {}),
    "none, D=E=128": (Case("none", 1, 256, heads=2, key_size=128, initial_state=True), 0.7, {}),
    "head, D=E=128": (Case("head", 1, 256, heads=2, key_size=128, decay="head", strength=0.05), 0.7, {}),
    "head, E=128": (Case("head", 1, 140, 2, 64, 128, decay="head", initial_state=True), None, {}),
    "token, D=128": (Case("large", 1, 140, heads=1, key_size=128, value_size=64, decay="token"), None, {}),
    "token, D=E=128": (Case("both", 1, 256, heads=1, key_size=128, decay="token", initial_state=True), 0.7, {}),
    "token, several borders": (Case("long", 1, 1290, 1, 64, decay="token", strength=0.1), None, {}),
    "token, grouped": (Case("token", 1, 140, 2, 64, kv_heads=1, decay="token", initial_state=True), 0.7, {}),
    "token, -20": (Case("t20", 1, 260, 1, 64, decay="token", strength=20.0, uniform=True), None, {}),
    "token, one": (Case("one", 1, 1, 1, 64, decay="token", initial_state=True), 0.0, {}),
    "segments": (Case("packed", 1, 260, 1, 64, segments=3, decay="head", initial_state=True), None, {}),
    "token, splits": (Case("splits", 1, 512, 1, 64, decay="token", initial_state=True), 0.7, {"splits": 2}),
}


def run(args, **how):
    return implementation.run(args, generation=implementation.BLACKWELL, **how)


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name, interpreter):
    case, scale, how = CASES[name]
    how = {"splits": 1} | how
    interpret = interpreter(case, case.length // how["splits"])
    check(case, lambda args: run(args, interpret=interpret, **how), scale)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("case", [case for case in ACCURACY if case.decay != "channel"], ids=lambda case: case.name)
def test_accuracy_at_the_lengths_where_it_is_promised(case, interpreter):
    case = dataclasses.replace(case, key_size=64)
    interpret = interpreter(case)
    check(case, lambda args: run(args, interpret=interpret, splits=1))


@interpreted
@pytest.mark.parametrize(
    ("case", "names"),
    [
        (Case("kept", 1, 768, 1, 128, decay="token"), ("q", "k", "v", "log_decay")),
        (Case("tangent", 1, 512, 1, 128, decay="head"), ("q", "k", "v", "log_decay")),
        (Case("wide", 1, 512, 1, 128, decay="token"), ("q", "k", "v")),
        (Case("plain", 1, 640, 1, 64), ("q", "k", "v")),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_barriers_order_all_accesses(case, names, interpreter):
    """Of warpgroups, copies and products, with more chunks than stages."""
    given, options = case.arguments(jnp.bfloat16)
    interpret = interpreter(case, detect_races=True)

    def loss(some):
        args = api.normal_form(**(given | some), **options)
        return jnp.sum(run(args, interpret=interpret, splits=1)[0].astype(jnp.float32))

    gradients = jax.jit(jax.value_and_grad(loss))({name: given[name] for name in names})[1]
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in gradients.values())
    assert not gpu_interpreter.get_races().races_found


@pytest.mark.parametrize("decay", [None, "head", "token"])
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (64, 128), (128, 64)])
def test_lowers_for_cuda(sizes, decay):
    assert launches(lowered(sizes, decay, gradient=False, device_kind=B200)) == 1
    options = {"scale": 0.5, "return_state": True, "length": 77}
    assert launches(lowered(sizes, decay, gradient=True, device_kind=B200, **options)) == 1  # no forward pass


def test_splits_add_one_sweep():
    assert launches(lowered((64, 64), "head", gradient=False, length=8192, device_kind=B200)) == 2


@pytest.mark.parametrize("key_size", kernel.SIZES)
@pytest.mark.parametrize("value_size", kernel.SIZES)
def test_every_launch_fits_in_shared_and_tensor_memory(key_size, value_size):
    sweeps = [[plans.Plan((plans.FORWARD,), key_size, value_size)]]
    sweeps += [plans.backward(key_size, value_size, decay=decay, together=False) for decay in (None, "head", "token")]
    for launch in sweeps:
        for decay in (None, "head", "token"):
            shape = kernel.launch_shape([dataclasses.replace(plan, decay=decay) for plan in launch])
            assert shape.smem_bytes() + plans.ALIGNMENT <= plans.SMEM_BYTES
            assert all(plan.outer % shape.columns == 0 and shape.columns <= shape.row for plan in launch)
            scratch = shape.scratch(jnp.bfloat16).values()
            tensors = [x for x in scratch if getattr(x, "memory_space", None) == plgpu.TMEM]
            assert len(tensors) == 4 and sum(x.shape[1] * x.dtype.itemsize // 4 for x in tensors) <= 512


def test_budgets_of_the_forward_sweep():
    shape = kernel.launch_shape([plans.Plan((plans.FORWARD,), 128, 128, decay="head")])
    assert (shape.columns, shape.stages) == (128, 2)
    # Two stages of q, k, v and the state.
    assert shape.smem_bytes() == (2 * 3 + 1) * 128 * 128 * 2
    with pytest.raises(ValueError, match=r"needs \d+ bytes of shared memory"):
        kernel.launch_shape([plans.Plan((plans.FORWARD,), 512, 128)])


@pytest.mark.parametrize(
    ("call", "splits"),
    [
        ((1, 8192, 96, 128, 128), 1),
        ((1, 8192, 4, 64, 64), 8),  # 64 chunks, at least eight each
        ((1, 8192 + 64, 4, 64, 64), 1),  # not whole chunks
    ],
)
def test_split_count(call, splits):
    assert implementation.split_count(implementation.BLACKWELL, 148, *call) == splits


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (lambda: arguments(jnp.float32), "takes bfloat16, got float32"),
        (lambda: arguments(d=256), "on NVIDIA B200 it takes head sizes 64, 128, got D=256"),
        (lambda: arguments(chunk_size=64), "on NVIDIA B200 chunk_size must be None or 128, got 64"),
    ],
)
def test_refusals(args, reason):
    with dispatch.target("gpu", device_kind=B200), pytest.raises(dispatch.UnsupportedError, match=reason):
        dispatch.choose(api.OP, args(), "mosaic_gpu")


@pytest.mark.parametrize("kind", [B200, "NVIDIA GB200", "NVIDIA B300 SXM6 AC"])
def test_blackwell_chooses_it(kind):
    with dispatch.target("gpu", device_kind=kind):
        assert dispatch.choose(api.OP, arguments()).name == "mosaic_gpu"
        assert dispatch.choose(api.OP, dataclasses.replace(arguments(), chunk_size=128)).name == "mosaic_gpu"
        assert dispatch.choose(api.OP, arguments(d=256)).name != "mosaic_gpu"


def test_splits_are_whole_chunks_of_the_generation():
    q = jnp.zeros((1, 128, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="whole chunks of 128 tokens, got splits=2 and N=128"):
        run(api.normal_form(q, q, q), splits=2)
