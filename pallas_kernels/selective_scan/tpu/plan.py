"""How the TPU kernels of the selective scan cut their work: blocks, on-chip memory, bytes moved.

See `pallas_kernels.tpu.plans` for grid and blocks; the heads there are channels here, side by side in lanes, those of a
group filled up to whole tiles. A state stands with its numbers in sublanes, (S, lanes). What a token says for all
channels of a group, b and c, stands with tokens in lanes, a tile of 128 after another: (B, G, N / 128, S, 128).
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu import plans
from pallas_kernels.tpu.chips import LANES
from pallas_kernels.tpu.plans import Operand, up

ROWS = 16  # tokens per turn of a loop: a tile of bfloat16
BLOCK_TOKENS = 256  # at most, per block; the state before every block is kept for the backward pass
BLOCK_LANES = (256, 128)  # channels per block: more would not leave room for their states in registers
LARGEST = 128  # of S

# Kernels, with the names of their inputs and outputs. "keep" is "forward" that keeps states for "backward".
_READ = ("x", "delta", "gate", "a", "b", "c", "skip", "bias", "keep")
KINDS = {
    "forward": ((*_READ, "initial"), ("y", "final")),
    "keep": ((*_READ, "initial"), ("y", "final", "kept")),
    "backward": (
        (*_READ, "kept", "dy", "dfinal"),
        ("dx", "ddelta", "dgate", "da", "db", "dc", "dskip", "dbias", "dinitial"),
    ),
}
OPTIONAL = ("gate", "skip", "bias", "keep", "initial", "final", "kept", "dfinal", "dgate", "dskip", "dbias", "dinitial")


@dataclasses.dataclass(frozen=True)
class Config(plans.Config):
    """What is static in a call, whatever its shapes; `decay`, `scaled` and `chunk` mean nothing here.

    Attributes:
      gated: whether there is a gate.
      skipped: whether there is a skip.
      biased: whether step sizes have a bias.
      softplus: whether step sizes go through softplus.
      packed: whether there are segments.
    """

    gated: bool = False
    skipped: bool = False
    biased: bool = False
    softplus: bool = False
    packed: bool = False


@dataclasses.dataclass(frozen=True)
class Plan(plans.Plan):
    """One kernel's work; `heads` are channels, `repeats` those of a group, `block_heads` those of a block, all padded.

    `key_size` is S, padded, and `value_size` 1.
    """

    kinds = KINDS
    config: Config

    @property
    def tiles(self) -> int:
        """Tiles of 128 tokens in a block."""
        return math.ceil(self.tokens / LANES)

    def scratch(self, kind: str) -> tuple[tuple[str, tuple[int, ...], jnp.dtype], ...]:
        """Names, shapes and dtypes of what a kernel keeps on chip between grid points."""
        state = ("state", (self.key_size, self.block_heads), jnp.float32)
        if kind != "backward":
            return (state,)
        return (state, ("states", (self.tokens + 1, self.key_size, self.block_heads), jnp.float32))

    def flops(self, kind: str) -> int:
        """Operations on numbers of the state."""
        return self.batch * self.length * self.heads * self.key_size * (26 if kind == "backward" else 7)

    def exponentials(self, kind: str) -> int:
        """How many exponentials a kernel takes."""
        return self.batch * self.length * self.heads * self.key_size * (2 if kind == "backward" else 1)

    def _values(self, kind: str) -> int:
        """Bytes of the intermediate values of a turn, generously."""
        return 4 * self.block_heads * (24 * self.key_size + 24 * ROWS)

    def _operand(self, name: str, kind: str) -> Operand | None:
        """The array `name` of a kernel, or None where the configuration has none."""
        config, size, lanes, last = self.config, self.key_size, self.block_heads, self.blocks - 1
        wide = jnp.dtype(jnp.float32)

        def time(n: int) -> int:
            return last - n if kind == "backward" else n

        def of_group(h: Any) -> Any:
            blocks = self.repeats // lanes
            # Floor division asks for the sign, whose lowering asks for the machine at hand.
            return h // blocks if isinstance(h, int) else lax.div(h, jnp.asarray(blocks, h.dtype))

        there = {
            "gate": config.gated,
            "skip": config.skipped,
            "bias": config.biased,
            "keep": config.packed,
            "initial": config.initial,
            "final": config.final,
        }
        if not there.get(name.removeprefix("d"), True):
            return None
        match name:
            case "x" | "delta" | "gate" | "y" | "dy" | "dx" | "ddelta" | "dgate":
                shape, block = (self.batch, self.length, self.heads), (None, self.tokens, lanes)
                return Operand(name, shape, self.dtype, block, lambda b, h, n: (b, time(n), h))
            case "a":
                return Operand(name, (size, self.heads), wide, (size, lanes), lambda b, h, n: (0, h))
            case "skip" | "bias":
                return Operand(name, (1, self.heads), wide, (1, lanes), lambda b, h, n: (0, h))
            case "dskip" | "dbias":
                shape, block = (self.batch, 1, self.heads), (None, 1, lanes)
                return Operand(name, shape, wide, block, lambda b, h, n: (b, 0, h))
            case "b" | "c":
                shape = (self.batch, self.heads // self.repeats, self.blocks * self.tiles, size, LANES)
                block = (None, None, self.tiles, size, LANES)
                return Operand(name, shape, wide, block, lambda b, h, n: (b, of_group(h), time(n), 0, 0))
            case "db" | "dc":  # of a block of channels: summed over those of a group afterwards
                shape = (self.batch, self.heads // lanes, self.blocks * self.tiles, size, LANES)
                block = (None, None, self.tiles, size, LANES)
                return Operand(name, shape, wide, block, lambda b, h, n: (b, h, time(n), 0, 0))
            case "keep":
                shape, block = (self.batch, self.blocks * self.tiles, 1, LANES), (None, self.tiles, 1, LANES)
                return Operand(name, shape, wide, block, lambda b, h, n: (b, time(n), 0, 0))
            case "kept":
                shape, block = (self.batch, self.blocks, size, self.heads), (None, None, size, lanes)
                return Operand(name, shape, wide, block, lambda b, h, n: (b, time(n), 0, h))
            case "initial" | "final" | "dinitial" | "dfinal" | "da":
                shape, block = (self.batch, size, self.heads), (None, size, lanes)
                return Operand(name, shape, wide, block, lambda b, h, n: (b, 0, h))
        return None


def plan_for(
    config: Config, batch: int, length: int, channels: int, groups: int, state_size: int, dtype: jnp.dtype
) -> Plan | None:
    """The largest blocks that fit the chip, or None if none fit.

    Tokens per block do not depend on B and C, so that every device of a mesh cuts its part alike.

    Args:
      config: what is asked for.
      batch: B.
      length: N.
      channels: C.
      groups: G.
      state_size: S, 1 to `LARGEST`.
      dtype: bfloat16 or float32.
    """
    size, share = up(state_size, 8), up(channels // groups, LANES)
    tokens = up(length, ROWS) if length <= min(LANES, BLOCK_TOKENS) else min(BLOCK_TOKENS, up(length, LANES))
    while True:
        for lanes in BLOCK_LANES:
            widest = Plan(config, 1, length, lanes, lanes, size, 1, jnp.dtype(dtype), lanes, ROWS, tokens)
            if max(widest.vmem("keep"), widest.vmem("backward")) <= config.chip.vmem_limit and share % lanes == 0:
                return dataclasses.replace(widest, batch=batch, heads=groups * share, repeats=share)
        if tokens % (2 * LANES):
            return None
        tokens //= 2
