"""What is static in a sweep on Mosaic GPU, and the shared memory and registers that it takes.

With P_ij the decay between tokens i and j, a sweep computes for tokens in order, or in reverse,

    out_i = Σ_j P_ij (row_i · column_j) value_j          j ≤ i, or j ≥ i in reverse

and the four outputs of the op are jobs of this form:

    y  = sweep(q, k, v)         dq = sweep(dy, v, k)
    dk = reverse(v, dy, q)      dv = reverse(k, q, dy)
"""

import dataclasses
from typing import Any, NamedTuple

from pallas_kernels.linear_attention.mosaic_gpu_tiles import TILE, tile_bytes, tile_registers

SMEM_BYTES = 227 * 1024  # of one CTA on compute capability 9.0


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in one launch.

    Attributes:
      jobs: outputs to compute, of one inner and one outer size; each warpgroup works at one of them.
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
      interpret: parameters of Pallas' interpreter, None on a GPU; see `mosaic_gpu_tiles`.
    """

    jobs: tuple[Job, ...]
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
    def tiles(self) -> int:
        """Tiles of each output and head that a CTA computes, one per warpgroup."""
        return self.warpgroups // len(self.jobs) // self.heads

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the token arrays that the sweep reads."""
        names: list[str] = []
        for job in self.jobs:
            names += (job.row,) * self.outputs + (job.column, job.value) + (job.partner,) * self.sums
        return tuple(dict.fromkeys(names))

    def whole(self, name: str) -> bool:
        """Whether a warpgroup reads all channels of the array, not its own tile of them alone."""
        wanted = {name for job in self.jobs for name in (job.row, job.column)}
        if self.sums:  # scores between partner and value
            wanted |= {self.jobs[0].partner, self.jobs[0].value}
        return name in wanted


def smem_bytes(plan: Plan, inner: int, outer: int) -> int:
    """Shared memory of a CTA, in bytes, without a kilobyte for barriers and alignment; 16-bit inputs."""
    sizes = {}
    for job in plan.jobs:
        sizes |= {job.row: inner, job.column: inner, job.value: outer, job.partner: outer}
    loaded = sum(sizes[name] // TILE if plan.whole(name) else plan.tiles for name in plan.arrays)
    per_warpgroup = inner // TILE + 1 + int(plan.outputs)
    vectors = TILE * 4 * (plan.stages * plan.heads * (plan.decay == "token") + 2 * plan.warpgroups * plan.sums)
    return tile_bytes() * (plan.stages * plan.heads * loaded + plan.warpgroups * per_warpgroup) + vectors


def registers(plan: Plan, inner: int) -> int:
    """Estimate of the 32-bit registers of a compute thread: state, scores, weights and output, and 40 others."""
    live = inner // TILE + (3 + plan.sums if plan.outputs else 1)
    return tile_registers() * live + 40


def with_blocks(plan: Plan, inner: int, outer: int, pairs: bool = False) -> Plan:
    """The plan with warpgroups and stages that fit in shared memory: two warpgroups and three stages if possible.

    A multiprocessor has registers for two compute warpgroups, and for one CTA alone: the second warpgroup has another
    tile of the same head, the other job, or, where a head has a single tile, another head. A single stage, which leaves
    nothing to copy ahead into, is for a single job: two jobs are better two launches.

    Args:
      plan: without blocks.
      inner: rows of a state.
      outer: columns of a state.
      pairs: whether a CTA may take two heads.

    Raises:
      ValueError: if nothing fits; the message says how much is missing.
    """
    if len(plan.jobs) > 1 and inner != outer:
        raise ValueError(f"two outputs of one sweep need one head size, got {inner} and {outer}")
    tiles = outer // TILE
    choices = ((2, 1, 3), (2, 1, 2), (1, 1, 3), (1, 1, 2), (1, 1, 1))
    if len(plan.jobs) > 1:
        choices = choices[:2]
    elif pairs and tiles == 1:
        choices = ((2, 2, 3), (2, 2, 2), *choices)
    for warpgroups, heads, stages in choices:
        chosen = dataclasses.replace(plan, warpgroups=warpgroups, heads=heads, stages=stages)
        if tiles % chosen.tiles == 0 and smem_bytes(chosen, inner, outer) + 1024 <= SMEM_BYTES:
            return chosen
    needed = smem_bytes(chosen, inner, outer) + 1024
    raise ValueError(f"head sizes {inner} and {outer} need {needed} bytes of shared memory, a CTA has {SMEM_BYTES}")
