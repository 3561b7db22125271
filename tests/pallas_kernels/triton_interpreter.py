"""Triton kernels without a GPU: run by Triton's interpreter on NumPy memory, and compiled to PTX.

Everything but the one call of jax-triton runs here as on a GPU; `Interpreter.launch` takes its place. Around every
array lies NaN, so that a read out of bounds shows, and outputs begin as NaN, so that what a kernel fails to write
shows; what it writes out of bounds is looked for.
"""

import contextlib

import jax
import ml_dtypes
import numpy as np
import pytest

tl = pytest.importorskip("triton.language")

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import interpreter, jit  # noqa: E402

GUARD = 64  # numbers before and behind every array
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32", "int8": "i8"}


class Memory:
    """An array as the interpreter wants its arguments: what it asks a torch tensor for, on NumPy memory."""

    def __init__(self, shape, dtype, data=None):
        self.shape, self.dtype = tuple(shape), TYPES[np.dtype(dtype).name]
        size = int(np.prod(shape))
        self.guard = np.nan if TYPES[np.dtype(dtype).name][0] != "i" else 101
        self.buffer = np.full(size + 2 * GUARD, self.guard, dtype)
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
        same = np.isnan(guards.astype(np.float32)) if self.guard != 101 else guards == 101
        assert np.all(same), "a kernel wrote out of bounds"
        return self.array.reshape(self.shape)


class Interpreter:
    """Runs kernels on the CPU in place of `calls._launch`, and remembers which.

    Attributes:
      launched: name, grid and constants of each kernel.
      choices: fields of `Config` that a test sets.
    """

    def __init__(self):
        self.launched = []
        self.choices = {}

    def names(self):
        return [name for name, *_ in self.launched]

    def launch(self, kernel, arrays, tokens, shapes, capability, grid, warps, stages, constants):
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


def compile_to_ptx(gpu, kernel, values, warps, stages, constants):
    """The kernel, compiled as jax-triton does: arrays are aligned to 16 bytes, a number 1 is a constant."""
    signature, attributes, constants = {}, {}, dict(constants)
    assert len(values) + len(constants) == len(kernel.arg_names)
    for i, (name, x) in enumerate(zip(kernel.arg_names, values, strict=False)):
        if isinstance(x, int):
            signature[name] = "constexpr" if x == 1 else "i32"
            constants |= {name: 1} if x == 1 else {}
        else:
            signature[name] = f"*{TYPES[x.dtype.name]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    assert list(signature)[: len(values)] == kernel.arg_names[: len(values)]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", gpu.capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
