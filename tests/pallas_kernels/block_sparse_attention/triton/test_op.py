"""Triton kernels of block-sparse attention without a GPU: interpreted, and compiled to PTX (`triton_interpreter`)."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.block_sparse_attention import api
from pallas_kernels.block_sparse_attention.cases import SMALL, Case
from pallas_kernels.gpus import find
from pallas_kernels.masks import Causal, PerHead, Prefix, QueryPrefix, SlidingWindow

pytest.importorskip("triton.language")

from triton.backends.nvidia.compiler import CUDABackend

from pallas_kernels.block_sparse_attention.triton import op as implementation
from tests.pallas_kernels.quick import joined, quick
from tests.pallas_kernels.triton_interpreter import Interpreter, compile_to_ptx

BOUND = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 4e-3}
KINDS = {kind: find(kind) for kind in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB")}
GLOBAL = SlidingWindow(25, 3) | Prefix(4) | QueryPrefix(3)
OF_OTHERS = {case.name: case for case in SMALL}
CASES = {
    case.name: case
    for case in (
        Case("globals", GLOBAL, 1, 150, heads=2, kv_heads=1, key_size=24, value_size=40),
        Case("capped", Causal(-9), 1, 130, heads=1, key_size=16, fixed={"softcap": 2.0, "scale": 0.7}),
        Case("heads", PerHead((Causal(), SlidingWindow(20, 0), ~Causal(3))), 1, 100, heads=3, key_size=16),
        dataclasses.replace(OF_OTHERS["segments"], name="packed", queries=130, extra={}),
        dataclasses.replace(OF_OTHERS["routed_128"], name="blocks", queries=150, keys=140, extra={}),
        Case("all", None, 1, 40, 70, heads=1, key_size=16),
    )
}


@pytest.fixture
def interpreted(monkeypatch):
    """The public API on a GPU that is Triton's interpreter; jax-triton need not be installed."""
    runner = Interpreter()
    monkeypatch.setattr(implementation, "_launch", runner.launch)
    table = [dataclasses.replace(x, packages=()) if x.name == "triton" else x for x in dispatch.implementations(api.OP)]
    monkeypatch.setitem(dispatch._tables, api.OP, tuple(table))
    with dispatch.target("gpu", "NVIDIA H200", qualified_only=False):
        yield runner


RUNS = [(name, dtype) for name in CASES for dtype in ("float32", "bfloat16")] + [("globals", "float16")]
QUICK = ("globals-float32", "packed-bfloat16")


@pytest.mark.parametrize(("name", "dtype"), quick(RUNS, QUICK, joined))
def test_outputs_and_gradients(name, dtype, errors, interpreted):
    found = errors(CASES[name], jnp.dtype(dtype), implementation="triton")
    assert interpreted.names() == ["forward", "backward_rows", "backward_columns"]
    assert max(found.outputs) <= BOUND[dtype], found.outputs
    assert max(found.gradients.values()) <= 2 * BOUND[dtype], found.gradients


def launches(monkeypatch, kind, dtype, size):
    """The kernels that a call and its gradient launch, not run: (kernel, arguments, warps, stages, constants)."""
    found = []

    def launch(kernel, arrays, tokens, shapes, capability, grid, warps, stages, constants):
        found.append((kernel, [*arrays, tokens, *shapes], warps, stages, constants))
        return [jnp.zeros(x.shape, x.dtype) for x in shapes]

    monkeypatch.setattr(implementation, "_launch", launch)
    q = jax.ShapeDtypeStruct((1, 1000, 4, size), dtype)
    k = jax.ShapeDtypeStruct((1, 1000, 2, size), dtype)
    ids = jnp.zeros((1, 1000), jnp.int32)

    def loss(q, k):
        args = api.normal_form(q, k, k, mask=GLOBAL, segment_ids=ids)
        return jnp.sum(implementation.run(args)[0].astype(jnp.float32))

    with dispatch.target("gpu", kind, qualified_only=False):
        jax.eval_shape(jax.grad(loss, (0, 1)), q, k)
    return found


COMPILED = [(jnp.bfloat16, size, kind) for size in (64, 128, 256) for kind in KINDS] + [
    (jnp.float16, 64, "NVIDIA H200"),
    (jnp.float32, 64, "NVIDIA H200"),
]


@pytest.mark.parametrize(("dtype", "size", "kind"), quick(COMPILED, ("bfloat16-128-NVIDIA H200",), joined))
def test_kernels_compile(dtype, size, kind, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(CUDABackend, "make_cubin", lambda *args: b"")  # PTX says what there is to know here
    found = launches(monkeypatch, kind, dtype, size)
    assert [kernel.fn.__name__ for kernel, *_ in found] == ["forward", "backward_rows", "backward_columns"]
    for launch in found:
        compiled = compile_to_ptx(KINDS[kind], *launch)
        assert f".target {KINDS[kind].architecture}" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= KINDS[kind].shared
        if dtype != jnp.float32:
            tensor_cores = ("wgmma.mma_async", "mma.sync")
            assert any(name in compiled.asm["ptx"] for name in tensor_cores)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bias": jnp.zeros((1, 1, 1, 64))}, "no bias"),
        ({"mask": PerHead((Causal(), Causal(1))), "segment_ids": jnp.zeros((1, 64), int)}, "rules per head"),
        ({"q": jnp.zeros((1, 64, 2, 8))}, "head sizes of 16 to 256, got D=8"),
    ],
)
def test_refusals_say_why(options, reason, interpreted):
    q = options.pop("q", jnp.zeros((1, 64, 2, 16)))
    with pytest.raises(dispatch.UnsupportedError, match=reason):
        api.block_sparse_attention(q, q, q, implementation="triton", **options)
