"""How the TPU kernels of delta rule attention cut their work: blocks, on-chip memory, bytes moved.

See `pallas_kernels.tpu.plans` for the layout of arrays, blocks and grid. Numbers per token and head (β, the log decay,
and their gradients) stand in lanes of their own array, a chunk a row.
"""

import dataclasses
import math

import jax.numpy as jnp

from pallas_kernels.tpu import plans
from pallas_kernels.tpu.chips import LANES
from pallas_kernels.tpu.plans import Config, Operand, up

CHUNKS = (32, 64, 128)  # the largest has the shortest schedules; smaller ones serve short sequences
BLOCK = 32  # tokens whose triangle is inverted row by row
BLOCK_TOKENS = 512  # at most, per block; the state before every block is kept for the backward pass
BLOCK_HEADS = (4, 2, 1)  # per block: what one head writes waits for what it read, what the others write does not
LARGEST = 256  # of D and E

# Kernels, with the names of their inputs and outputs. "keep" is "forward" that keeps states for "backward".
KINDS = {
    "forward": (("q", "k", "v", "rows", "scale", "initial"), ("y", "final")),
    "keep": (("q", "k", "v", "rows", "scale", "initial"), ("y", "final", "kept")),
    "backward": (("q", "k", "v", "rows", "scale", "kept", "dy", "dfinal"), ("dq", "dk", "dv", "drows", "dinitial")),
}


@dataclasses.dataclass(frozen=True)
class Plan(plans.Plan):
    """One kernel's work; `config.decay` is None or "token".

    `repeats` above 1: a block of heads reads one head of k and v.
    """

    kinds = KINDS

    @property
    def unroll(self) -> int:
        """One chunk per turn of the loop: two made the programs twice as long, and their schedules 5 % shorter."""
        return 1

    @property
    def lines(self) -> int:
        """Numbers per token and head that come in: β, and the log decay."""
        return 1 + (self.config.decay is not None)

    @property
    def gradient_lines(self) -> int:
        """Numbers per token and head that go out backward: gradients of β, of the log decay, and of the scale."""
        return self.lines + self.config.scaled

    def scratch(self, kind: str) -> tuple[tuple[str, tuple[int, ...], jnp.dtype], ...]:
        """Names, shapes and dtypes of what a kernel keeps on chip between grid points."""
        hb, d, e = self.block_heads, self.key_size, self.value_size
        state = ("state", (hb, d, e), jnp.float32)
        if kind != "backward":
            return (state,)
        return (
            state,
            ("dstate", (hb, d, e), jnp.float32),
            ("states", (self.chunks, hb, d, e), self.dtype),
            ("writes", (hb, self.tokens, e), jnp.float32),
            ("inverses", (self.chunks, hb, BLOCK, self.chunk), jnp.float32),
        )

    def flops(self, kind: str) -> int:
        """Operations of the products that a kernel needs; those of the triangle count as two of c x c x E."""
        c, d, e = self.chunk, self.key_size, self.value_size
        forward = 2 * (3 * d * e + c * d + c * e)
        per_token = (
            forward if kind != "backward" else 2 * (6 * d * e + 2 * c * e) + 2 * (7 * d * e + 4 * c * d + 3 * c * e)
        )
        return self.batch * self.length * self.heads * per_token

    def exponentials(self, kind: str) -> int:
        """How many exponentials a kernel takes."""
        return self.batch * self.length * self.heads * self.chunk * (self.config.decay is not None)

    def _values(self, kind: str) -> int:
        """Bytes of the intermediate values of one chunk, all heads at once, generously."""
        c, d, e = self.chunk, up(self.key_size, LANES), up(self.value_size, LANES)
        one = 4 * (12 * c * up(c, LANES) + 8 * c * (d + e) + 3 * self.key_size * e)
        passes = 3 if self.dtype == jnp.float32 else 1  # products of float32 are cut into three parts
        return one * self.block_heads * passes

    def _operand(self, name: str, kind: str) -> Operand | None:
        """The array `name` of a kernel, or None where the configuration has none."""
        config, hb, repeats = self.config, self.block_heads, self.repeats
        d, e, last = self.key_size, self.value_size, self.blocks - 1
        sizes = {"q": d, "k": d, "v": e, "y": e}

        def time(n):
            return last - n if kind == "backward" else n

        def of_tokens(size, dtype):
            shape, block = (self.batch, self.length, self.heads * size), (None, self.tokens, hb * size)
            return Operand(name, shape, dtype, block, lambda b, h, n: (b, time(n), h))

        def of_lines(lines):
            shape = (self.batch, self.heads // hb, self.blocks * self.chunks, lines * hb, self.chunk)
            block = (None, None, self.chunks, lines * hb, self.chunk)
            return Operand(name, shape, jnp.float32, block, lambda b, h, n: (b, h, time(n), 0, 0))

        match name:
            case "k" | "v" if repeats > 1:
                shape = (self.batch, self.length, self.heads // repeats * sizes[name])
                block = (None, self.tokens, sizes[name])
                return Operand(name, shape, self.dtype, block, lambda b, h, n: (b, time(n), h * hb // repeats))
            case "dk" | "dv" if repeats > 1:  # summed over the heads that share them afterwards
                return of_tokens(sizes[name[1:]], jnp.float32)
            case "q" | "k" | "v" | "y" | "dq" | "dk" | "dv" | "dy":
                return of_tokens(sizes[name[-1]], self.dtype)
            case "rows":
                return of_lines(self.lines)
            case "drows":
                return of_lines(self.gradient_lines)
            case "scale" if config.scaled:
                return Operand(name, (1,), jnp.float32, None, None)
            case "kept":
                shape, block = (self.batch, self.blocks, self.heads, d, e), (None, None, hb, d, e)
                return Operand(name, shape, self.dtype, block, lambda b, h, n: (b, time(n), h, 0, 0))
            case "initial" | "dinitial" if config.initial:
                pass
            case "final" | "dfinal" if config.final:
                pass
            case _:
                return None
        shape, block = (self.batch, self.heads, d, e), (None, hb, d, e)
        return Operand(name, shape, jnp.float32, block, lambda b, h, n: (b, h, 0, 0))


def padded_sizes(heads: int, key_size: int, value_size: int) -> tuple[int, int]:
    """The sizes to which D and E are filled up: 64, 128 or 256; 64 only for heads that share lanes in pairs, or one."""
    least = 64 if heads == 1 or heads % 2 == 0 else LANES
    return tuple(max(least, 1 << (size - 1).bit_length()) for size in (key_size, value_size))


def plan_for(
    config: Config,
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    key_size: int,
    value_size: int,
    dtype: jnp.dtype,
) -> Plan | None:
    """The largest blocks that fit the chip, or None if none fit.

    Long ones first, then those of many heads. Tokens per block do not depend on B and H, so that every device of a mesh
    cuts its part alike. Where heads of k and v cannot be cut out of their lanes one at a time, the plan has `repeats` 1
    and wants them repeated.

    Args:
      config: what is asked for.
      batch: B.
      length: N.
      heads: H.
      kv_heads: G.
      key_size: D, 1 to `LARGEST`.
      value_size: E, 1 to `LARGEST`.
      dtype: bfloat16 or float32.
    """
    chunk = config.chunk or next((size for size in CHUNKS if size >= length), CHUNKS[-1])
    dtype = jnp.dtype(dtype)
    d, e = padded_sizes(heads, key_size, value_size)
    chunks = math.ceil(length / chunk)
    most = min(BLOCK_TOKENS // chunk, chunks)
    while most:
        tokens = chunk * math.ceil(chunks / math.ceil(chunks / most))
        for count in BLOCK_HEADS[1:] if max(d, e) > LANES else BLOCK_HEADS:
            repeats, block_heads = _heads(heads, heads // kv_heads, count, min(d, e))
            plan = Plan(config, batch, length, heads, repeats, d, e, dtype, block_heads, chunk, tokens)
            widest = dataclasses.replace(plan, key_size=max(d, LANES), value_size=max(e, LANES), block_heads=count)
            if max(widest.vmem("keep"), widest.vmem("backward")) <= config.chip.vmem_limit:
                return plan
        most //= 2
    return None


def _heads(heads: int, repeats: int, most: int, size: int) -> tuple[int, int]:
    """Heads per head of k and v, 1 where those are to be repeated, and heads per block, at most so many."""
    alone, shared = math.gcd(heads, most), math.gcd(repeats, most)
    if repeats > 1 and size >= LANES and (shared > 1 or alone == 1):
        return repeats, shared
    return 1, alone
