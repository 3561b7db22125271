"""What is static in a launch on Mosaic GPU, and the shared memory and registers that it takes.

With P_ij the decay between tokens i and j, a sweep computes for tokens in order, or in reverse,

    out_i = Σ_j P_ij (row_i · column_j) value_j          j ≤ i, or j ≥ i in reverse

and the four outputs of the op are jobs of this form:

    y  = sweep(q, k, v)         dq = sweep(dy, v, k)
    dk = reverse(v, dy, q)      dv = reverse(k, q, dy)
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from pallas_kernels.linear_attention.mosaic_gpu.tiles import TILE, tile_bytes, tile_registers

SIZES = (64, 128, 192, 256)  # D and E that the kernel takes
SMEM_BYTES = 227 * 1024  # of one CTA on compute capability 9.0
ALIGNMENT = 1024  # of each array in it, in bytes
MARGIN = 64  # bytes for the barriers of the other sweeps of a launch
OUT, WEIGHTED = 0, 1  # tiles of a warpgroup where its output and its weighted values stand


class Job(NamedTuple):
    """One output of a sweep; the names are those of the arrays that it reads and of what it writes.

    Attributes:
      row: array that meets the state, (B, N, H or G, inner).
      column: array of the state's rows, (B, N, H or G, inner).
      value: array of the state's columns, (B, N, H or G, outer).
      out: (B, N, H, outer).
      partner: array (B, N, H or G, outer) for the sums that the gradient of decays needs.
    """

    row: str
    column: str
    value: str
    out: str
    partner: str


FORWARD = Job("q", "k", "v", "y", "dy")
DQ = Job("dy", "v", "k", "dq", "q")
DK = Job("v", "dy", "q", "dk", "k")
DV = Job("k", "q", "dy", "dv", "v")

BOTH = 128  # head size up to which dk and dv share CTAs; of larger ones no two stages fit into shared memory


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in one sweep. A launch makes one or several, each in CTAs of its own.

    Attributes:
      jobs: outputs to compute, of one inner and one outer size; each warpgroup works at one of them.
      inner: rows of a state, all of which a warpgroup holds.
      outer: columns of a state.
      reverse: whether tokens are visited from the last to the first.
      decay: None, "head" for (H,), "token" for cumulated log decays.
      scaled: whether there is a scale.
      outputs: whether outputs are wanted; otherwise the state alone.
      initial: whether the sweep starts from given states.
      final: whether the states at its end are wanted.
      keep: chunks between two kept states, at least 2; 0 to keep none.
      sums: whether the first job also writes the sums that gradients of decays and scales need.
      warpgroups: compute warpgroups of a CTA, the same number for each job and each head.
      heads: heads of a CTA.
      stages: chunks of tokens in shared memory.
      interpret: parameters of Pallas' interpreter, None on a GPU; see `tiles`.
    """

    jobs: tuple[Job, ...]
    inner: int
    outer: int
    reverse: bool = False
    decay: str | None = None
    scaled: bool = False
    outputs: bool = True
    initial: bool = False
    final: bool = False
    keep: int = 0
    sums: bool = False
    warpgroups: int = 1
    heads: int = 1
    stages: int = 2
    interpret: Any = None

    @property
    def interpreted(self) -> bool:
        """Whether the kernel is interpreted."""
        return self.interpret is not None

    @property
    def blocks(self) -> int:
        """Tiles of the state of one warpgroup."""
        return self.inner // TILE

    @property
    def short_of_registers(self) -> bool:
        """Whether the state leaves few registers: then nothing is held that can be computed again."""
        return self.blocks > 2

    @property
    def tiles(self) -> int:
        """Tiles of each output and head that a CTA computes, one per warpgroup."""
        return self.warpgroups // len(self.jobs) // self.heads

    @property
    def groups(self) -> int:
        """CTAs of one head, or of `heads` heads."""
        return self.outer // TILE // self.tiles

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the token arrays that the sweep reads."""
        names: list[str] = []
        for job in self.jobs:
            names += (job.row,) * self.outputs + (job.column, job.value)
        names += (self.jobs[0].partner,) * self.sums
        return tuple(dict.fromkeys(names))

    def whole(self, name: str) -> bool:
        """Whether a warpgroup reads all channels of the array, not its own tile of them alone."""
        return any(name in (job.row, job.column) for job in self.jobs)

    # ---- tiles of shared memory, in this order: tokens by stage, head of the CTA and array; then those of warpgroups

    def loaded(self, name: str) -> int:
        """Tiles of a chunk of the array and one head."""
        return self.blocks if self.whole(name) else self.tiles

    @property
    def per_head(self) -> int:
        """Tiles of a chunk of all arrays and one head."""
        return sum(map(self.loaded, self.arrays))

    def tokens_at(self, name: str) -> int:
        """First of the tiles of an array, counted from those of its stage and head."""
        return sum(map(self.loaded, self.arrays[: self.arrays.index(name)]))

    @property
    def own_at(self) -> int:
        """First tile of the first warpgroup: what it computes follows the tokens."""
        return self.stages * self.heads * self.per_head

    @property
    def per_warpgroup(self) -> int:
        """Tiles of a warpgroup: the state; once that is read, the output and the weighted values stand in its place."""
        return max(self.blocks, WEIGHTED + 1)

    @property
    def smem_tiles(self) -> int:
        """All of them."""
        return self.own_at + self.warpgroups * self.per_warpgroup


def vectors(plans: Sequence[Plan]) -> dict[str, int]:
    """Vectors of 64 float32 in shared memory by what they hold: decays, sums, and zeros (see `sweep`)."""
    return {
        "decay": max(plan.stages * plan.heads * (plan.decay == "token") for plan in plans),
        "sums": 2 * max(plan.warpgroups for plan in plans) * any(plan.sums for plan in plans),
        "zero": int(any(plan.short_of_registers for plan in plans)),
    }


def smem_bytes(*plans: Plan) -> int:
    """Shared memory of a CTA of a launch, in bytes: tiles of 16-bit numbers, vectors, and two barriers per stage."""
    tiles = tile_bytes() * max(plan.smem_tiles for plan in plans)
    others = TILE * 4 * sum(vectors(plans).values())
    return tiles + -(-others // ALIGNMENT) * ALIGNMENT + 16 * sum(plan.stages for plan in plans)


def registers(plan: Plan) -> int:
    """Estimate of the 32-bit registers of a compute thread: state, scores, weights and output, and 40 others."""
    return tile_registers() * (plan.blocks + (3 + plan.sums if plan.outputs else 1)) + 40


def chunks_between_kept(key_size: int, value_size: int) -> int:
    """Chunks between two kept states: 4, or enough that those of both sweeps take an eighth of the arrays at most.

    The arrays are q, k, v, y, dy and three gradients: 4D + 4E numbers of 16 bits for a token, against 2·D·E for the
    states at a border.
    """
    return max(4, -(-key_size * value_size // (TILE // 4 * (key_size + value_size))))


def borders(plan: Plan, chunks: int) -> int:
    """Number of borders in front of chunks 0, keep, 2·keep, ..."""
    return -(-chunks // plan.keep)


def backward(
    key_size: int,
    value_size: int,
    *,
    decay: bool = False,
    scale: bool = False,
    start: bool = False,
) -> list[Plan]:
    """The sweeps of the backward pass, without blocks.

    Args:
      key_size: D.
      value_size: E.
      decay: whether the gradient of a decay per token is wanted.
      scale: whether the gradient of the scale is wanted.
      start: whether the gradient of the initial state is wanted, "final dk".
    """
    keep = chunks_between_kept(key_size, value_size) if decay else 0
    dq = Plan((DQ,), value_size, key_size, sums=scale or decay, keep=keep)
    rest = {"sums": decay, "keep": keep, "final": start, "reverse": True}
    if key_size == value_size <= BOTH:
        return [dq, Plan((DK, DV), key_size, value_size, **rest)]
    return [dq, Plan((DK,), value_size, key_size, **rest), Plan((DV,), key_size, value_size, reverse=True)]


def with_blocks(plan: Plan, pairs: bool = False) -> Plan:
    """The plan with warpgroups and stages that fit in shared memory: two warpgroups and three stages if possible.

    A multiprocessor has registers for two compute warpgroups, and for one CTA alone: the second warpgroup has another
    tile of the same head, the other job, or, where a head has a single tile, another head. There are at least two
    stages: a chunk is copied while the one before it is computed.

    Args:
      plan: without blocks.
      pairs: whether a CTA may take two heads.

    Raises:
      ValueError: if nothing fits; the message says how much is missing.
    """
    if len(plan.jobs) > 1 and plan.inner != plan.outer:
        raise ValueError(f"two outputs of one sweep need one head size, got {plan.inner} and {plan.outer}")
    tiles = plan.outer // TILE
    choices = ((2, 1, 3), (2, 1, 2), (1, 1, 3), (1, 1, 2))
    if len(plan.jobs) > 1:
        choices = choices[:2]
    elif pairs and tiles == 1:
        choices = ((2, 2, 3), (2, 2, 2), *choices)
    for warpgroups, heads, stages in choices:
        chosen = dataclasses.replace(plan, warpgroups=warpgroups, heads=heads, stages=stages)
        if tiles % chosen.tiles == 0 and smem_bytes(chosen) + MARGIN <= SMEM_BYTES:
            return chosen
    needed = smem_bytes(chosen)
    sizes = f"{plan.inner} and {plan.outer}"
    raise ValueError(f"head sizes {sizes} need {needed} bytes of shared memory, a CTA has {SMEM_BYTES}")
