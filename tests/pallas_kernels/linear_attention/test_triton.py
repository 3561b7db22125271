"""Triton kernels without a GPU: run by Triton's interpreter on NumPy memory, and compiled to PTX.

Everything but `triton._launch` runs here as on a GPU; `Interpreter.launch` takes its place. Around every array lies
NaN, so that a read out of bounds shows, and outputs begin as NaN, so that what a kernel fails to write shows; what it
writes out of bounds is looked for.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.linear_attention import api
from pallas_kernels.linear_attention.cases import SMALL, Case

tl = pytest.importorskip("triton.language")

from triton.runtime import interpreter, jit  # noqa: E402

from pallas_kernels.linear_attention import triton as implementation  # noqa: E402

GUARD = 64  # numbers before and behind every array
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class Memory:
    """An array as the interpreter wants its arguments: what it asks a torch tensor for, on NumPy memory."""

    def __init__(self, shape, dtype, data=None):
        self.shape, self.dtype = tuple(shape), TYPES[np.dtype(dtype).name]
        size = int(np.prod(shape))
        self.buffer = np.full(size + 2 * GUARD, np.nan, dtype)
        self.array = self.buffer[GUARD : GUARD + size]
        if data is not None:
            self.array[:] = np.asarray(data).reshape(-1)

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *args, **kwargs):
        return self

    def set_(self, *args):
        pass

    copy_ = storage_offset = size = stride = set_

    def result(self):
        guards = np.concatenate([self.buffer[:GUARD], self.buffer[-GUARD:]])
        assert np.all(np.isnan(guards.astype(np.float32))), "a kernel wrote out of bounds"
        return self.array.reshape(self.shape)


class Interpreter:
    """Runs kernels on the CPU in place of `triton._launch`, and remembers which."""

    def __init__(self):
        self.launched = []

    def launch(self, kernel, arrays, tokens, shapes, *, grid, warps, stages, **constants):
        self.launched.append((kernel.fn.__name__, grid, constants))
        return jax.pure_callback(lambda *xs: run_kernel(kernel, xs, tokens, shapes, grid, constants), shapes, *arrays)


def run_kernel(kernel, arrays, tokens, shapes, grid, constants):
    inputs = [Memory(x.shape, x.dtype, x) for x in arrays]
    outputs = [Memory(x.shape, x.dtype) for x in shapes]
    with patched_interpreter():
        function = interpreter.InterpretedFunction(kernel.fn)
        function.run(*inputs, tokens, *outputs, **constants, grid=(grid,), warmup=False)
    for memory in inputs:
        memory.result()
    return [memory.result() for memory in outputs]


@contextlib.contextmanager
def patched_interpreter():
    """What the interpreter (Triton 3.9) lacks unless the whole process interprets, and its bfloat16.

    It truncates bfloat16 where a GPU rounds, and multiplies its bits as integers.
    """

    def call(self, *args, **kwargs):
        scope = interpreter._patch_lang(self.fn)
        try:
            return interpreter.InterpretedFunction(self.fn).rewrite()(*args, **kwargs)
        finally:
            scope.restore()

    def wide(handle):
        if handle.dtype.scalar == tl.bfloat16:
            return handle.data.view(ml_dtypes.bfloat16).astype(np.float32)
        return handle.data

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return interpreter.TensorHandle(np.matmul(wide(a), wide(b)) + d.data, d.dtype.scalar)

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return interpreter.TensorHandle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
        return cast(self, source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit.JITFunction, "__call__", call)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)
        yield


@pytest.fixture
def interpreted(monkeypatch):
    """The public API on a GPU that is Triton's interpreter; jax-triton need not be installed."""
    runner = Interpreter()
    monkeypatch.setattr(implementation, "_launch", runner.launch)
    table = [dataclasses.replace(x, packages=()) if x.name == "triton" else x for x in dispatch.implementations(api.OP)]
    monkeypatch.setitem(dispatch._tables, api.OP, tuple(table))
    with dispatch.target("gpu", "NVIDIA H200"):
        yield runner


BOUND = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 4e-3}
MINE = [
    case for case in SMALL if case.decay != "channel" and min(case.key_size, case.value_size or case.key_size) >= 16
]
OTHER = (
    Case("narrow_and_wide", 1, 70, 2, 24, 80, decay="token", initial_state=True),
    Case("wide_and_narrow", 1, 70, 2, 80, 24, kv_heads=1, decay="head", initial_state=True),
    Case("wide_normalized", 1, 40, 1, 144, 48, decay="token", normalize=True),
    Case("full_normalized_state", 1, 50, 2, 24, 40, kv_heads=1, kv_length=70, causal=False, normalize=True),
    Case("minus_20_head", 1, 63, 1, 32, decay="head", strength=20.0, uniform=True),
    Case("minus_20_token", 1, 63, 1, 32, decay="token", strength=20.0, uniform=True),
)


def assert_accurate(found, dtype):
    assert max(found.outputs) <= BOUND[dtype], found.outputs
    assert max(found.gradients.values()) <= 2 * BOUND[dtype], found.gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [*MINE, *OTHER], ids=lambda case: case.name)
def test_outputs_and_gradients(case, dtype, errors, interpreted):
    found = errors(case, jnp.dtype(dtype), "triton")
    assert {"sweep", "backward" if case.causal or case.segments else "read"} <= {
        name for name, *_ in interpreted.launched
    }
    assert_accurate(found, dtype)
