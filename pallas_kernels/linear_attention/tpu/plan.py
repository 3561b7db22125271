"""How the TPU kernels of linear attention cut their work: blocks, on-chip memory, bytes moved.

See `pallas_kernels.tpu.plans` for the layout of arrays, blocks and grid. The loops in a block run over chunks, and over
groups of `pack` heads whose lanes fill a tile of 128 together: heads of 16 channels go in eights, heads of 64 in pairs,
heads of 128 and more alone.
"""

import dataclasses
import itertools
import math

import jax.numpy as jnp

from pallas_kernels.tpu import plans
from pallas_kernels.tpu.chips import LANES, Chip
from pallas_kernels.tpu.plans import Operand, up

SIZES = (16, 32, 64, 128, 256)  # head sizes that pack; others are padded to the next one
BLOCK_TOKENS = 1024  # at most, per block; the state before every block is kept for the backward pass
BLOCK_LANES = 512  # at most, unless fewer heads cannot be cut out of the lanes
UNROLL = 4  # at most, chunks per turn of the loop over them

# Kernels, with the names of their inputs and outputs. "keep" is "forward" that keeps states for "backward"; the last
# four are those without causality: S = Σ k vᵀ, y = q S, and what both need backward.
KINDS = {
    "forward": (("q", "k", "v", "decay", "scale", "initial"), ("y", "final")),
    "keep": (("q", "k", "v", "decay", "scale", "initial"), ("y", "final", "kept")),
    "backward": (
        ("q", "k", "v", "decay", "scale", "kept", "dy", "dfinal"),
        ("dq", "dk", "dv", "ddecay", "sums", "dinitial"),
    ),
    "outer": (("k", "v"), ("total",)),
    "outer_backward": (("k", "v", "dtotal"), ("dk", "dv")),
    "read": (("q", "scale", "total"), ("y",)),
    "read_backward": (("q", "scale", "total", "dy"), ("dq", "dtotal", "sums")),
}


@dataclasses.dataclass(frozen=True)
class Config(plans.Config):
    """What is static in a call, whatever its shapes.

    Attributes:
      causal: as in `linear_attention`.
      normalize: as in `linear_attention`.
      decay_gradient: whether the backward pass computes the gradient of the decay.
      scale_gradient: likewise for the scale.
      block_tokens: at most so many tokens per block.
    """

    causal: bool = True
    normalize: bool = False
    decay_gradient: bool = True
    scale_gradient: bool = True
    block_tokens: int = BLOCK_TOKENS

    @property
    def sums(self) -> bool:
        """Whether a backward pass sums something over the tokens: the gradient of a decay per head, or of the scale.

        A normalised output does not depend on the scale.
        """
        decay = self.decay == "head" and self.decay_gradient
        return decay or (self.scaled and self.scale_gradient and not self.normalize)


@dataclasses.dataclass(frozen=True)
class Plan(plans.Plan):
    """The work of the kernels of linear attention.

    Attributes:
      pack: heads per group.
      in_turns: whether groups of heads are computed side by side, which is faster and takes more memory.
    """

    kinds = KINDS

    config: Config
    pack: int
    in_turns: bool = True

    @property
    def unroll(self) -> int:
        """Chunks per turn of the loop over them: the end of one is computed beside the start of the next.

        Half as many with decay per channel, whose chunks are long programs already, and one in float32, whose products
        of several passes leave no gaps.
        """
        if self.dtype == jnp.float32 or not self.in_turns:
            return 1
        most = UNROLL // 2 if self.config.decay == "channel" else UNROLL
        return max(turns for turns in range(1, most + 1) if self.chunks % turns == 0)

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(first head, heads) of the groups of a block."""
        starts = range(0, self.block_heads, self.pack)
        return tuple((start, min(self.pack, self.block_heads - start)) for start in starts)

    @property
    def state_rows(self) -> int:
        """Rows of a state: E, and with a denominator one for Σk, filled up to a tile."""
        return self.value_size + 16 * self.config.normalize

    @property
    def key_lanes(self) -> int:
        """Lanes of a block of q."""
        return self.block_heads * self.key_size

    @property
    def decay_rows(self) -> int:
        """Rows of decay per token that a block holds: wide inputs have two per head, see `tpu._cumulated`."""
        return self.block_heads * (2 if self.dtype == jnp.float32 else 1)

    def scratch(self, kind: str) -> tuple[tuple[str, tuple[int, ...], jnp.dtype], ...]:
        """Names, shapes and dtypes of what a kernel keeps on chip between grid points."""
        state, pairs = (self.state_rows, self.key_lanes), (len(self.groups), self.chunk, self.pack * self.chunk)
        edge = (self.chunk, self.key_lanes)
        tables = (("between", pairs, jnp.float32), ("since_start", edge, jnp.float32), ("until_end", edge, jnp.float32))
        tables = tables if self.config.decay == "head" else ()
        match kind:
            case "forward" | "keep":
                return (("state", state, jnp.float32), *tables)
            case "backward":
                states = ("states", (self.chunks, *state), self.dtype)
                return (("state", state, jnp.float32), states, ("dstate", state, jnp.float32), *tables)
            case "outer" | "read_backward":
                return (("state", state, jnp.float32),)
        return ()

    def _values(self, kind: str) -> int:
        """Bytes of the intermediate values of one chunk, all groups at once.

        The compiler keeps a part of them in registers and lets others share their place. It was seen to need at most
        98 % of this, usually 17 to 70 %, and up to nine tenths where groups come one after another.
        """
        narrow = jnp.dtype(self.dtype).itemsize
        passes = 3 if narrow == 4 else 1  # products of float32 are cut into three parts
        keys, values = (up(self.pack * size, LANES) for size in (self.key_size, self.value_size))
        states = 4 * 3 * self.pack * self.state_rows * keys
        if not self.config.causal:
            return len(self.groups) * (4 * self.tokens * (keys + values) + states)
        rows, pairs = self.chunk, self.chunk * up(self.pack * self.chunk, LANES)
        one = 4 * 3 * (pairs + rows * (keys + values)) + states
        one += narrow * passes * (2 * pairs + (1 + self.pack) * rows * (keys + values))
        if self.config.decay == "channel":
            operands = narrow * passes * (1 + self.pack) if self.in_turns else 0
            one += (4 * 2 + operands) * rows * keys * (3 + rows.bit_length())
        one = one * 5 // 4 if self.in_turns else one
        return len(self.groups) * one // (1 if kind == "backward" else 2)

    def flops(self, kind: str) -> int:
        """Operations of the products that a kernel needs."""
        c, d, e = self.chunk, self.key_size, self.value_size
        states, pairs = 2 * d * e, 2 * c * (d + e) // 2
        per_token = {
            "forward": 2 * states + pairs,
            "keep": 2 * states + pairs,
            "backward": 5 * states + 3 * pairs,
            "outer_backward": 2 * states,
            "read_backward": 2 * states,
        }.get(kind, states)
        return self.batch * self.length * self.heads * per_token

    def exponentials(self, kind: str) -> int:
        """How many exponentials a kernel takes."""
        tokens = self.batch * self.length * self.heads
        levels = self.key_size * self.chunk.bit_length()
        return tokens * {None: 0, "head": 0, "token": self.chunk, "channel": levels}[self.config.decay]

    def _operand(self, name: str, kind: str) -> Operand | None:
        """The array `name` of a kernel, or None where the configuration has none."""
        config, hb = self.config, self.block_heads
        d, e, rows, last = self.key_size, self.value_size, self.state_rows, self.blocks - 1
        back = kind == "backward"

        def time(n):
            return last - n if back else n

        def of_tokens(size, dtype, repeats=1):
            shape = (self.batch, self.length, self.heads // repeats * size)
            block = (None, self.tokens, hb // repeats * size)
            return Operand(name, shape, dtype, block, lambda b, h, n: (b, time(n), h))

        def of_states():
            shape = (self.batch, rows, self.heads * d)
            return Operand(name, shape, jnp.float32, (None, rows, hb * d), lambda b, h, n: (b, 0, h))

        match name:
            case "ddecay" if not config.decay_gradient:
                return None
            case "q" | "dq":
                return of_tokens(d, self.dtype)
            case "k" | "dk":
                return of_tokens(d, self.dtype, self.repeats)
            case "v" | "dv":
                return of_tokens(e, self.dtype, self.repeats)
            case "y" | "dy":
                return of_tokens(e, self.dtype)
            case "decay" | "ddecay" if config.decay == "channel":
                return of_tokens(d, jnp.float32)
            case "decay" | "ddecay" if config.decay == "token":
                lines = self.decay_rows if name == "decay" else hb
                shape = (self.batch, self.heads // hb, self.blocks * self.chunks, lines, self.chunk)
                block = (None, None, self.chunks, lines, self.chunk)
                return Operand(name, shape, jnp.float32, block, lambda b, h, n: (b, h, time(n), 0, 0))
            case "decay" if config.decay == "head":
                return Operand(name, (self.heads,), jnp.float32, None, None)
            case "scale" if config.scaled:
                return Operand(name, (1,), jnp.float32, None, None)
            case "initial" | "dinitial" if config.initial:
                return of_states()
            case "final" | "dfinal" if config.final:
                return of_states()
            case "total" | "dtotal":
                return of_states()
            case "kept":
                shape, block = (self.batch, self.blocks, rows, self.heads * d), (None, None, rows, hb * d)
                return Operand(name, shape, self.dtype, block, lambda b, h, n: (b, time(n), 0, h))
            case "sums" if config.sums:
                return Operand(
                    name, (self.batch, 8, self.heads * d), jnp.float32, (None, 8, hb * d), lambda b, h, n: (b, 0, h)
                )
        return None


def packed_size(size: int) -> int:
    """The head size to which `size` is padded, 1 to 256."""
    return next(allowed for allowed in SIZES if allowed >= size)


def pack_of(key_size: int, value_size: int) -> int:
    """Heads per group: as many as fill whole lanes.

    No more on 256-wide matrix units, though a pair of heads of 128 channels would fill them with block-diagonal
    operands: the blocks beside the diagonal cost as much to load and to sum up as they save. In the schedules of the
    TPU compiler for v6e, pairs at D = 128 take 9 to 12 % longer forward and 20 to 24 % backward than heads in turns.
    """
    return max(1, LANES // min(key_size, value_size))


def chunk_size(chip: Chip, decay: str | None, key_size: int, value_size: int, dtype: jnp.dtype) -> int:
    """Tokens per chunk, the number with the shortest schedules.

    More tokens save products with states, fewer save those between tokens: by 256 only heads of 256 channels gain, on
    matrix units as wide, and of 128 in float32. Decay per channel works in 64: its products grow with log₂ of them.
    """
    if decay == "channel":
        return 64
    least = 128 if dtype == jnp.float32 else 256
    return 256 if chip.mxu == 256 and min(key_size, value_size) >= least else 128


def chunk_sizes(decay: str | None) -> tuple[int, ...]:
    """Chunk sizes that may be asked for."""
    return (32, 64, 128) if decay == "channel" else (128, 256)


def plan_for(
    config: Config, batch: int, length: int, heads: int, kv_heads: int, key_size: int, value_size: int, dtype: jnp.dtype
) -> Plan | None:
    """The largest blocks that fit the chip; None if none fit.

    Long ones first, for fewer kept states, then those whose heads are computed in turns, then wide ones.

    Args:
      config: what is asked for.
      batch: B.
      length: N.
      heads: H.
      kv_heads: G.
      key_size: D, one of `SIZES`.
      value_size: E, one of `SIZES`.
      dtype: bfloat16 or float32.
    """
    repeats = heads // kv_heads
    pack = pack_of(key_size, value_size)
    chunk = config.chunk or chunk_size(config.chip, config.decay, key_size, value_size, dtype)
    most = max(chunk, config.block_tokens // chunk * chunk)
    lanes = max(key_size, value_size)
    step = math.lcm(repeats, pack)
    whole = [n for n in range(1, heads + 1) if heads % n == 0 and (n % step == 0 or n == heads)]
    narrow = [n for n in whole if n * lanes <= BLOCK_LANES] or whole[:1]
    # An even number of blocks of heads keeps both cores of a device at work.
    shared = [n for n in narrow if batch * heads // n % config.chip.cores == 0] or narrow
    kinds = ("keep", "backward") if config.causal else ("outer", "outer_backward", "read", "read_backward")
    while True:
        tokens = up(math.ceil(length / math.ceil(length / most)), chunk)
        for in_turns, block_heads in itertools.product((True, False), reversed(shared)):
            plan = Plan(
                config,
                batch,
                length,
                heads,
                repeats,
                key_size,
                value_size,
                jnp.dtype(dtype),
                block_heads,
                chunk,
                tokens,
                min(pack, block_heads),
                in_turns,
            )
            if max(map(plan.vmem, kinds)) <= config.chip.vmem_limit:
                return plan
        if most == chunk:
            return None
        most = max(chunk, most // 2 // chunk * chunk)
