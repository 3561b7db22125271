"""Triton kernels of linear attention without a GPU: interpreted, and compiled to PTX (`triton_interpreter`)."""

import dataclasses
import itertools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.linear_attention import api
from pallas_kernels.linear_attention.cases import ACCURACY, SMALL, Case

tl = pytest.importorskip("triton.language")

from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402

from pallas_kernels.linear_attention.triton import calls as triton_calls  # noqa: E402
from pallas_kernels.linear_attention.triton import op as implementation  # noqa: E402
from pallas_kernels.linear_attention.triton import plan as triton_plan  # noqa: E402
from tests.pallas_kernels.quick import joined, quick  # noqa: E402
from tests.pallas_kernels.triton_interpreter import Interpreter, compile_to_ptx  # noqa: E402


@pytest.fixture
def interpreted(monkeypatch):
    """The public API on a GPU that is Triton's interpreter; jax-triton need not be installed."""
    runner = Interpreter()
    run = implementation.run
    monkeypatch.setattr(triton_calls, "_launch", runner.launch)
    monkeypatch.setattr(implementation, "run", lambda args: run(args, **runner.choices))
    table = [dataclasses.replace(x, packages=()) if x.name == "triton" else x for x in dispatch.implementations(api.OP)]
    monkeypatch.setitem(dispatch._tables, api.OP, tuple(table))
    with dispatch.target("gpu", "NVIDIA H200", qualified_only=False):
        yield runner


BOUND = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 4e-3}
MINE = [
    dataclasses.replace(case, batch=2 if case.kv_heads else 1)  # the interpreter takes its time for each program
    for case in SMALL
    if case.decay != "channel" and min(case.key_size, case.value_size or case.key_size) >= 16
]
OTHER = [
    Case("narrow_and_wide", 1, 70, 2, 24, 80, decay="token", initial_state=True),
    Case("wide_and_narrow", 1, 70, 2, 80, 24, kv_heads=1, decay="head", initial_state=True),
    Case("wide_normalized", 1, 40, 1, 144, 48, decay="token", normalize=True),
    Case("full_normalized_state", 1, 50, 2, 24, 40, kv_heads=1, kv_length=70, causal=False, normalize=True),
    Case("minus_20_head", 1, 63, 1, 32, decay="head", strength=20.0, uniform=True),
    Case("minus_20_token", 1, 63, 1, 32, decay="token", strength=20.0, uniform=True),
]
CASES = {case.name: case for case in MINE + OTHER}
SPLIT = [
    Case("split_plain", 1, 200, 1, 32, initial_state=True),
    Case("split_head", 1, 200, 2, 80, 16, kv_heads=1, decay="head", initial_state=True),
    Case("split_token", 1, 200, 1, 32, 48, decay="token", initial_state=True),
    Case("split_packed_normalized", 1, 200, 1, segments=6, decay="token", normalize=True),
    Case("split_full_normalized", 1, 200, 1, causal=False, normalize=True),
]
H200, A100 = (triton_plan.gpu_of(kind) for kind in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB"))


def assert_accurate(found, dtype):
    assert max(found.outputs) <= BOUND[dtype], found.outputs
    assert max(found.gradients.values()) <= 2 * BOUND[dtype], found.gradients


RUNS = itertools.product(CASES, ("float32", "bfloat16"))
QUICK = (
    "grouped_head-float32",
    "packed_normalized-float32",
    "full_packed-float32",
    "token_300-bfloat16",
    "narrow_and_wide-bfloat16",
)


@pytest.mark.parametrize(("name", "dtype"), quick(RUNS, QUICK, joined))
def test_outputs_and_gradients(name, dtype, errors, interpreted):
    case = CASES[name]
    if dtype == "float32":
        interpreted.choices["chunk"] = 32  # the interpreter's time is per chunk
    found = errors(case, jnp.dtype(dtype), "triton")
    assert {"sweep", "backward" if case.causal or case.segments else "read"} <= set(interpreted.names())
    assert ("log_decay" in found.gradients) == (case.decay is not None)
    assert_accurate(found, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [case for case in ACCURACY if case.decay != "channel"], ids=lambda case: case.name)
def test_accuracy_at_the_lengths_where_it_is_promised(case, dtype, errors, interpreted):
    assert_accurate(errors(case, jnp.dtype(dtype), "triton"), dtype)


@pytest.mark.parametrize("name", quick(["token_300", "normalized", "full"], ("normalized",)))
def test_float16(name, errors, interpreted):
    assert_accurate(errors(CASES[name], jnp.dtype("float16"), "triton"), "float16")


@pytest.mark.parametrize(
    ("case", "splits"), quick(itertools.product(SPLIT, (2, 4)), ("split_token-4", "split_full_normalized-2"), joined)
)
def test_a_split_sequence_is_exact(case, splits, errors, interpreted):
    gpu = A100 if splits == 2 else H200
    dtype = "float32" if splits == 4 else "bfloat16"  # on an A100 the chunks of forward and backward differ
    interpreted.choices |= {"splits": splits, "block": 64, "gpu": gpu}
    if dtype == "float32":
        interpreted.choices["chunk"] = 32
    assert_accurate(errors(case, jnp.dtype(dtype), "triton"), dtype)
    heads = case.batch * case.heads
    states = [(grid, constants) for name, grid, constants in interpreted.launched if not constants.get("OUTPUT", True)]
    assert len(states) == 2  # of the forward and of the backward pass
    for grid, constants in states:
        tiles = -(-constants["OUT"] // constants["TILE"])
        assert grid == heads * tiles * splits


def test_splits_fill_the_gpu_only_where_heads_do_not():
    assert triton_plan.split_count(H200, programs=96, tokens=1 << 20) == 1
    assert triton_plan.split_count(H200, programs=16, tokens=1 << 20) == 9
    assert triton_plan.split_count(H200, programs=1, tokens=1 << 20) == 132
    assert triton_plan.split_count(H200, programs=1, tokens=4096) == 4  # two blocks of 512 at least
    assert triton_plan.split_count(H200, programs=1, tokens=63) == 1
    assert triton_plan.split_count(H200, programs=64, tokens=1024) == 1  # two more launches would take longer
    assert triton_plan.split_count(H200, programs=64, tokens=1024, causal=False) == 3


@pytest.mark.parametrize("value", quick([0.0, 0.7], ("0.0",)))
def test_scale_and_its_gradient(value, interpreted):
    arguments, options = Case("scaled", 1, 40, 1).arguments()

    def evaluate(name):
        def loss(scale):
            y = api.linear_attention(**arguments, **options, scale=scale, implementation=name)
            return jnp.sum(y**2 + y)

        return jax.value_and_grad(loss)(jnp.float32(value))

    np.testing.assert_allclose(evaluate("triton"), evaluate("reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", quick([True, False], ("False",)))
def test_scale_of_a_normalised_call(causal, interpreted):
    arguments, options = Case("scaled_normalized", 1, 40, 1, normalize=True, causal=causal).arguments()

    def loss(name):
        def of(arguments, scale):
            y = api.linear_attention(**arguments, **options, scale=scale, implementation=name)
            return jnp.sum(jnp.sin(y * jnp.arange(y.shape[-1])))

        return jax.value_and_grad(of, argnums=(0, 1))(arguments, jnp.float32(0.7))

    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=2e-4), loss("triton"), loss("reference"))


@pytest.mark.parametrize(("causal", "decay"), [(True, "token"), (False, None)])
def test_nothing_is_read_or_written_beyond_the_last_token_or_channel(causal, decay, errors, interpreted):
    """By the NaN around every array; here for sizes that no tile divides."""
    case = Case("odd", 2, 37, 2, 17, 19, kv_heads=1, decay=decay, causal=causal)
    assert_accurate(errors(case, jnp.dtype("bfloat16"), "triton"), "bfloat16")


def test_a_row_that_reads_nothing_is_zero_and_has_zero_gradients(interpreted):
    q, k, v = (jnp.ones((1, 20, 1, 16)) for _ in "qkv")
    q = q.at[:, 7].set(0)

    def loss(q, k, v):
        y = api.linear_attention(q, k, v, normalize=True, implementation="triton")
        return jnp.sum(y * jnp.arange(20.0)[:, None, None]), y

    gradients, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    assert np.all(np.asarray(y[:, 7]) == 0) and np.allclose(y[:, 8], 1)
    assert np.all(np.asarray(gradients[0][:, 7]) == 0)
    assert all(np.all(np.isfinite(x)) for x in gradients)


def test_large_float16_sums_do_not_overflow(interpreted):
    q = jnp.full((1, 100, 1, 16), 30, jnp.float16)
    y = api.linear_attention(q, q, jnp.full_like(q, 100) * 0 + 4, normalize=True, implementation="triton")
    np.testing.assert_allclose(y, 4, rtol=1e-2)  # the scores are 14400, their sums 1440000


def test_the_gradient_of_a_decay_is_computed_only_where_it_is_wanted(interpreted):
    arguments, _ = Case("constant", 1, 40, 1, decay="head").arguments()
    decay = arguments.pop("log_decay")

    def loss(arguments, decay):
        return jnp.sum(api.linear_attention(**arguments, log_decay=decay, implementation="triton"))

    for argument, wanted in ((0, False), (1, True)):
        jax.eval_shape(jax.grad(loss, argnums=argument), arguments, decay)
        name, _, constants = interpreted.launched[-1]
        assert (name, constants["DECAY_GRADIENT"]) == ("backward", wanted)


REFUSED = {
    "float64": ({"dtype": jnp.float64}, {}, "takes bfloat16, float16, float32, got float64"),
    "small heads": ({"key_size": 8}, {}, "head sizes of 16 to 256, got D=8"),
    "large values": ({"value_size": 257}, {}, "head sizes of 16 to 256, got E=257"),
    "decay per channel": ({"decay": "channel"}, {}, "log_decay of shape .H,. or .B, N, H., got one per channel"),
    "chunk": ({}, {"chunk_size": 48}, r"chunk_size must be one of \(16, 32\) for .* float32 on sm_90, got 48"),
    "large chunk": (
        {"dtype": jnp.bfloat16, "key_size": 256},
        {"chunk_size": 128},
        r"chunk_size must be one of \(16, 32, 64\) for .* bfloat16 on sm_90, got 128",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, interpreted):
    sizes, options, message = REFUSED[name]
    sizes = dict(sizes)
    with jax.enable_x64("dtype" in sizes):
        arguments, _ = Case("refused", 1, 20, 1, **{k: x for k, x in sizes.items() if k != "dtype"}).arguments(
            sizes.get("dtype", jnp.float32)
        )
        with pytest.raises(dispatch.UnsupportedError, match=f"implementation='triton' refuses: .*{message}"):
            api.linear_attention(**arguments, **options, implementation="triton")
    assert not interpreted.launched


def test_gpus():
    assert triton_plan.gpu_of("NVIDIA H100 80GB HBM3").architecture == "sm_90"
    assert triton_plan.gpu_of("NVIDIA A100-SXM4-40GB").architecture == "sm_80"
    assert triton_plan.gpu_of("NVIDIA H20").processors == 78
    assert triton_plan.gpu_of("NVIDIA GB300").architecture == "sm_103"
    assert triton_plan.gpu_of("NVIDIA GeForce RTX 4090") == triton_plan.LEAST_ABLE
    assert triton_plan.gpu_of(None) == triton_plan.LEAST_ABLE


@pytest.mark.parametrize("tokens", [1, 64, 1000, 4097, 1 << 20])
@pytest.mark.parametrize("size", [16, 64, 100, 128, 256])
@pytest.mark.parametrize("gpu", [H200, A100, triton_plan.LEAST_ABLE], ids=lambda gpu: gpu.architecture)
def test_blocks_hold_whole_chunks_and_kept_states_are_few(gpu, size, tokens):
    length = triton_plan.block_length(tokens)
    for dtype in (jnp.bfloat16, jnp.float32):
        for asked in (None, *triton_plan.chunk_sizes(gpu, dtype, size, size)):
            for table in (triton_plan.sweep_blocks, triton_plan.backward_blocks):
                blocks = table(gpu, dtype, size, size, asked)
                assert length % blocks.chunk == 0 and blocks.chunk in (asked, blocks.chunk)
                assert blocks.tile >= 16 and blocks.tile <= triton_plan.padded(size)
    if tokens >= 4096:  # of 8 arrays of D numbers per token, those that the op takes and gives
        assert -(-tokens // length) * size * size <= 0.13 * 8 * tokens * size


# ---- compilation


@pytest.mark.slow
def test_vmapped_axes_join_the_batch(interpreted):
    arguments, options = Case("vmapped", batch=2, length=40, heads=2, kv_heads=1, decay="token").arguments()
    whole = jax.grad(lambda a: jnp.sum(api.linear_attention(**a, **options, implementation="triton") ** 2))
    want, once = whole(arguments), {(name, grid) for name, grid, _ in interpreted.launched}
    interpreted.launched.clear()
    got = jax.vmap(whole)(jax.tree.map(lambda x: x[:, None], arguments))
    assert once <= {(name, grid) for name, grid, _ in interpreted.launched}  # JAX traces one element, too
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g[:, 0], w, rtol=1e-5, atol=1e-5), got, want)


def launches(monkeypatch, gpu, dtype, size, decay, causal=True, normalize=False, tokens=256):
    """The kernels that a call and its gradient launch, not run: (kernel, arguments, warps, stages, constants)."""
    found = []

    def launch(kernel, arrays, tokens, shapes, capability, grid, warps, stages, constants):
        found.append((kernel, [*arrays, tokens, *shapes], warps, stages, constants))
        return [jnp.zeros(x.shape, x.dtype) for x in shapes]

    monkeypatch.setattr(triton_calls, "_launch", launch)
    case = Case("compiled", 1, tokens, 1, size, decay=decay, causal=causal, normalize=normalize, initial_state=True)

    def loss(arguments):
        args = api.normal_form(**arguments, causal=causal, normalize=normalize, scale=0.5, return_state=True)
        y, state = implementation.run(args, gpu=gpu)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves((y, state)))

    jax.eval_shape(jax.grad(loss), case.arguments(dtype)[0])
    return found


COMPILED = [
    *((jnp.bfloat16, size, "token", True, True, 256) for size in (64, 128, 256)),
    *((jnp.bfloat16, size, None, False, True, 256) for size in (64, 128, 256)),
    (jnp.bfloat16, 128, "head", True, False, 256),
    (jnp.float16, 64, None, True, False, 1),
    (jnp.float32, 64, "token", True, False, 256),
]


TARGETS = {gpu.architecture: gpu for gpu in (H200, A100)}
PROGRAMS = [(*call, target) for call in COMPILED for target in TARGETS]
QUICK_PROGRAMS = {
    "bfloat16-128-None-False-True-256-sm_90",
    "bfloat16-128-head-True-False-256-sm_80",
}


@pytest.mark.parametrize(
    ("dtype", "size", "decay", "causal", "normalize", "tokens", "target"), quick(PROGRAMS, QUICK_PROGRAMS, joined)
)
def test_kernels_compile(dtype, size, decay, causal, normalize, tokens, target, monkeypatch, tmp_path):
    gpu = TARGETS[target]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(CUDABackend, "make_cubin", lambda *args: b"")  # PTX says what there is to know here
    found = launches(monkeypatch, gpu, dtype, size, decay, causal, normalize, tokens)
    names = [kernel.fn.__name__ for kernel, *_ in found]
    assert set(names) == ({"sweep", "backward"} if causal else {"sweep", "read"})
    for launch in found:
        compiled = compile_to_ptx(gpu, *launch)
        assert f".target {gpu.architecture}" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= gpu.shared
        if dtype != jnp.float32:
            tensor_cores = "wgmma.mma_async" if gpu is H200 else "mma.sync"
            assert tensor_cores in compiled.asm["ptx"]


def test_launch_gives_jax_triton_what_the_kernel_names(monkeypatch):
    calls = []

    def triton_call(*args, kernel, out_shape, grid, num_warps, num_stages, compute_capability, **constants):
        calls.append((kernel.fn.__name__, compute_capability))
        assert len(args) + len(out_shape) + len(constants) == len(kernel.arg_names)
        assert set(constants) == set(kernel.arg_names[len(args) + len(out_shape) :])
        assert [isinstance(x, int) for x in args].count(True) == 1 and kernel.arg_names[len(args) - 1] == "tokens"
        return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

    monkeypatch.setitem(sys.modules, "jax_triton", types.SimpleNamespace(triton_call=triton_call))
    arguments, _ = Case("launched", 1, 40, 1, decay="token").arguments()
    args = api.normal_form(**arguments)
    for kind in ("NVIDIA H200", None):
        with dispatch.target("gpu", kind, qualified_only=False):
            jax.grad(lambda v: jnp.sum(implementation.run(dataclasses.replace(args, v=v))[0]))(args.v)
    assert calls == [("sweep", 90), ("backward", 90), ("sweep", None), ("backward", None)]


@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("shape", [(1, 1024, 8, 128), (8, 1024, 8, 64), (4, 2048, 16, 128), (1, 8192, 96, 128)])
def test_what_launches_keep_is_a_fifth_of_the_arrays(shape, decay, monkeypatch):
    """Kept states and scratch, over q, k, v, y, dy and three gradients; a launch each for the shapes of fla's table."""
    written = []

    def launch(kernel, arrays, tokens, shapes, *how):
        written.append(sum(x.size * x.dtype.itemsize for x in shapes))
        return [jnp.zeros(x.shape, x.dtype) for x in shapes]

    def loss(q, k, v, log_decay):
        args = api.normal_form(q, k, v, log_decay=log_decay)
        return jnp.sum(implementation.run(args)[0].astype(jnp.float32))

    monkeypatch.setattr(triton_calls, "_launch", launch)
    q = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    g = jax.ShapeDtypeStruct(shape[2:3] if decay == "head" else shape[:3], jnp.float32)
    with dispatch.target("gpu", "NVIDIA H200", qualified_only=False):
        jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), q, q, q, g)
    size = 2 * q.size
    assert sum(written) - 4 * size <= 0.2 * 8 * size  # beside y, dq, dk and dv
    assert len(written) == (2 if shape[3] == 64 else 3)  # where D is tiled, dv is a sweep of its own


def test_lowering_for_cuda():
    """The call in its compiled form, where JAX has its CUDA plugin; no GPU is needed."""
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        pytest.skip(f"jax-triton cannot be imported: {error}")
    case = Case("lowered", 1, 100, 2, 64, decay="token")
    arguments, _ = case.arguments(jnp.bfloat16)

    def loss(arguments):
        return jnp.sum(api.linear_attention(**arguments, implementation="triton").astype(jnp.float32))

    with dispatch.target("gpu", "NVIDIA H200", qualified_only=False):
        lowered = jax.jit(jax.grad(loss)).trace(arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("triton_kernel_call") == 2  # forward and backward, one launch each
