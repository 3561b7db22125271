"""How the Triton kernels of linear attention are cut on each generation of GPU: tables, and arithmetic on shapes.

The tables were chosen by registers and shared memory of what the compiler makes, not yet by time.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.gpus import Gpu, find
from pallas_kernels.linear_attention.gpu_splits import pays

CHUNK = 64  # tokens of the largest chunk, of which every other size is a divisor
LEAST_ABLE = Gpu(89, 80)  # for which others than the known ones are taken


class Blocks(NamedTuple):
    """How a kernel is cut and launched.

    Attributes:
      chunk: tokens c of a chunk.
      tile: channels of the state that a program owns: of E in a sweep, of D in the backward pass.
      warps: warps of a program.
      stages: chunks whose loads are in flight.
    """

    chunk: int
    tile: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Config:
    """What is static in a call.

    Attributes:
      causal: as in `linear_attention`.
      normalize: as in `linear_attention`.
      return_state: whether the last state is asked for.
      residuals: whether the forward pass gives what the backward pass needs.
      decay_gradient: whether the backward pass computes the gradient of the decay.
      gpu: which it is.
      chunk: tokens per chunk, None for the table's choice.
      splits: parts into which the sequence is split, at most; None to fill the GPU.
      block: tokens between kept states, a multiple of every chunk; None for `block_length`.
      sweep: blocks of `sweep` and `read`, None for the table's; for tuning.
      backward: blocks of `backward`, None for the table's; for tuning.
    """

    causal: bool = True
    normalize: bool = False
    return_state: bool = False
    residuals: bool = False
    decay_gradient: bool = True
    gpu: Gpu = LEAST_ABLE
    chunk: int | None = None
    splits: int | None = None
    block: int | None = None
    sweep: Blocks | None = None
    backward: Blocks | None = None


def gpu_of(kind: str | None) -> Gpu:
    """The GPU of a device kind as JAX names it, such as "NVIDIA H200"; the least able one if it is not known."""
    return find(kind) or LEAST_ABLE


def warpgroups(gpu: Gpu) -> bool:
    """Whether its tensor cores take operands from shared memory, which leaves registers to the state."""
    return 90 <= gpu.capability < 120


def padded(size: int) -> int:
    """The power of two, at least 16, to which tiles of `size` channels are masked."""
    return max(16, 1 << (size - 1).bit_length())


def chunk_sizes(gpu: Gpu, dtype: jnp.dtype, key: int, value: int) -> tuple[int, ...]:
    """Tokens per chunk that a caller may ask for."""
    if wide(dtype):
        return (16, 32)
    return (16, 32, 64) if warpgroups(gpu) or max(padded(key), padded(value)) <= 128 else (16, 32)


def sweep_blocks(gpu: Gpu, dtype: jnp.dtype, inner: int, outer: int, chunk: int | None = None) -> Blocks:
    """Blocks of `sweep` and `read` for states (inner, outer): what compiles with few or no registers spilled."""
    inner, outer = padded(inner), padded(outer)
    if wide(dtype):
        return Blocks(chunk or 16, min(outer, 32 if inner <= 64 else 16), 4 if inner <= 64 else 8, 1)
    if warpgroups(gpu):
        return Blocks(chunk or 64, min(outer, 64), 8 if inner > 128 else 4, 2)
    if inner <= 128:
        return Blocks(chunk or 64, min(outer, 64), 8 if inner > 64 else 4, 2)
    return Blocks(chunk or 32, min(outer, 32), 8, 2 if gpu.shared >= 160 << 10 else 1)


def backward_blocks(gpu: Gpu, dtype: jnp.dtype, key: int, value: int, chunk: int | None = None) -> Blocks:
    """Blocks of `backward` for states (key, value)."""
    key, value = padded(key), padded(value)
    if wide(dtype):
        return Blocks(chunk or 16, min(key, 32 if value <= 64 else 16), 4 if value <= 64 else 8, 1)
    if warpgroups(gpu):
        return Blocks(chunk or 64, min(key, 64), 8 if value > 128 else 4, 1)
    return Blocks(chunk or 32, min(key, 64 if value <= 128 else 32), 8, 1)


def block_length(tokens: int) -> int:
    """Tokens between two kept states: 512, fewer in short sequences, a multiple of every chunk size."""
    return CHUNK * min(8, max(2, math.ceil(tokens / CHUNK) // 8))


def split_count(gpu: Gpu, programs: int, tokens: int, causal: bool = True) -> int:
    """Splits of a sequence: none while programs fill half of the processors, else enough to fill all if that pays.

    Without causality it always does: the splits' states are only summed.
    """
    if 2 * programs > gpu.processors:
        return 1
    most = max(1, min(math.ceil(gpu.processors / programs), tokens // (2 * block_length(tokens))))
    return most if not causal or pays(math.ceil(tokens / CHUNK), most) else 1


def lengths(config: Config, programs: int, tokens: int) -> tuple[int, int]:
    """Tokens of a block and of a split, which is whole blocks."""
    block = config.block or block_length(tokens)
    wanted = config.splits or split_count(config.gpu, programs, tokens, config.causal)
    return block, math.ceil(tokens / (block * wanted)) * block


def wide(dtype: jnp.dtype) -> bool:
    """Whether products of `dtype` need full precision, without tensor cores."""
    return jnp.dtype(dtype).itemsize == 4
