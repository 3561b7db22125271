"""Triton kernels of the selective scan without a GPU: interpreted, and compiled to PTX (`triton_interpreter`)."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.gpus import find
from pallas_kernels.selective_scan import api
from pallas_kernels.selective_scan.cases import Case

pytest.importorskip("triton.language")

from triton.backends.nvidia.compiler import CUDABackend

from pallas_kernels.selective_scan.triton import op as implementation
from tests.pallas_kernels.quick import joined, quick
from tests.pallas_kernels.triton_interpreter import Interpreter, compile_to_ptx

BOUND = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 4e-3}
KINDS = {kind: find(kind) for kind in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB")}
CASES = {
    case.name: case
    for case in (
        Case("one_token", 1, 1, 3, 2, initial_state=True),
        Case("packed", 1, 70, 4, 2, groups=2, segments=4, gate=True, initial_state=True),
        Case("plain", 1, 66, 3, 3, softplus=False, skip=False),
        Case("channels", 1, 20, 20, 2, gate=True),
        Case("strong", 1, 70, 2, 4, step=50.0),
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


RUNS = [(name, dtype) for name in CASES for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize(("name", "dtype"), quick(RUNS, ("packed-float32",), joined))
def test_outputs_and_gradients(name, dtype, errors, interpreted):
    found = errors(CASES[name], jnp.dtype(dtype), implementation="triton")
    assert interpreted.names() == ["forward", "backward"]
    assert max(found.outputs) <= BOUND[dtype], found.outputs
    assert max(found.gradients.values()) <= 2 * BOUND[dtype], found.gradients


def launches(monkeypatch, kind, dtype):
    """The kernels that a call and its gradient launch, not run: (kernel, arguments, warps, stages, constants)."""
    found = []

    def launch(kernel, arrays, tokens, shapes, capability, grid, warps, stages, constants):
        found.append((kernel, [*arrays, tokens, *shapes], warps, stages, constants))
        return [jnp.zeros(x.shape, x.dtype) for x in shapes]

    monkeypatch.setattr(implementation, "_launch", launch)
    case = Case("compiled", 1, 1000, 64, 16, groups=2, segments=3, gate=True, initial_state=True)
    arguments, options = case.arguments(dtype)

    def loss(arguments):
        args = api.normal_form(**arguments, **options, return_state=True)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in implementation.run(args))

    with dispatch.target("gpu", kind, qualified_only=False):
        jax.eval_shape(jax.grad(loss), arguments)
    return found


COMPILED = [(dtype, kind) for dtype in (jnp.bfloat16, jnp.float32) for kind in KINDS]


@pytest.mark.parametrize(("dtype", "kind"), quick(COMPILED, ("bfloat16-NVIDIA H200",), joined))
def test_kernels_compile(dtype, kind, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(CUDABackend, "make_cubin", lambda *args: b"")  # PTX says what there is to know here
    found = launches(monkeypatch, kind, dtype)
    assert [kernel.fn.__name__ for kernel, *_ in found] == ["forward", "backward"]
    for launch in found:
        compiled = compile_to_ptx(KINDS[kind], *launch)
        assert f".target {KINDS[kind].architecture}" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= KINDS[kind].shared


@pytest.mark.parametrize(
    ("dtype", "size", "options", "reason"),
    [
        (jnp.float64, 2, {}, "it takes bfloat16, float16, float32, got float64"),
        (jnp.float32, 257, {}, "S may be at most 256, got 257"),
        (jnp.float32, 2, {"chunk_size": 16}, "it has chunks of 64, so chunk_size must be None, got 16"),
    ],
)
def test_refusals(dtype, size, options, reason):
    with jax.enable_x64(True):
        x, b, a = jnp.ones((1, 6, 4), dtype), jnp.ones((1, 6, size), dtype), -jnp.ones((4, size), dtype)
        assert implementation.supports(api.normal_form(x, x, a, b, b, **options)) == reason
