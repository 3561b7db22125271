"""Shapes of the selective scan that tests, benchmarks and documentation share."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.selective_scan.api import selective_scan
from pallas_kernels.trials import Trial

TOKENS = ("x", "delta", "b", "c", "gate")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `selective_scan`; rates of decay are -1 to -S for each channel, as Mamba's are at the start.

    Attributes:
      name: unique.
      batch: B.
      length: N.
      channels: C.
      state_size: S.
      groups: G; None for b and c without an axis of groups.
      softplus: whether delta goes through softplus, with a bias of log-uniform step sizes; otherwise it is positive.
      step: the step sizes' upper end; the lower is a hundredth of it.
      skip: whether there is a skip.
      gate: whether there is a gate.
      segments: number of segments, 0 for none.
      initial_state: whether there is one.
    """

    name: str
    batch: int = 2
    length: int = 128
    channels: int = 8
    state_size: int = 4
    groups: int | None = None
    softplus: bool = True
    step: float = 0.1
    skip: bool = True
    gate: bool = False
    segments: int = 0
    initial_state: bool = False

    def arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Floating arguments in float64, and the other keyword arguments; the same numbers every time."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        b, n, c, s = self.batch, self.length, self.channels, self.state_size
        steps = self.step * 100 ** -rng.random(c)
        grouped = (b, n, s) if self.groups is None else (b, n, self.groups, s)
        arrays = {
            "x": rng.standard_normal((b, n, c)),
            "delta": 0.5 * rng.standard_normal((b, n, c)) if self.softplus else steps * rng.random((b, n, c)),
            "a": -np.broadcast_to(np.arange(1.0, s + 1), (c, s)) * np.exp(0.1 * rng.standard_normal((c, s))),
            "b": rng.standard_normal(grouped),
            "c": rng.standard_normal(grouped),
        }
        options: dict[str, Any] = {"softplus": self.softplus}
        if self.softplus:
            arrays["delta_bias"] = np.log(np.expm1(steps))
        if self.skip:
            arrays["skip"] = rng.standard_normal(c)
        if self.gate:
            arrays["gate"] = rng.standard_normal((b, n, c))
        if self.initial_state:
            arrays["initial_state"] = rng.standard_normal((b, c, s))
        if self.segments:
            options["segment_ids"] = np.sort(rng.integers(0, self.segments, (b, n)), axis=1)
        return arrays, options

    def arguments(self, dtype: Any = jnp.float32) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments on the device: what belongs to tokens in `dtype`; the others in float32 or wider."""
        arrays, options = self.arrays()
        wide = at_least_float32(dtype)
        return {name: jnp.asarray(x, dtype if name in TOKENS else wide) for name, x in arrays.items()}, options


# Small enough to check against float64 in a second; together they meet every option.
SMALL = (
    Case("one_token", length=1),
    Case("one_token_state", length=1, initial_state=True, gate=True),
    Case("size_one", length=65, channels=1, state_size=1, skip=False),
    Case("plain_63", length=63, softplus=False, skip=False),
    Case("state_150", length=150, state_size=16, initial_state=True, gate=True),
    Case("grouped_130", length=130, channels=12, groups=4, initial_state=True),
    Case("grouped_gate", length=97, channels=6, state_size=8, groups=2, gate=True),
    Case("strong_150", length=150, step=50.0, gate=True),
    Case("weak_200", length=200, step=1e-3, initial_state=True),
    Case("one_state_200", length=200, channels=16, state_size=1, softplus=False),
    Case("packed_150", length=150, segments=5, initial_state=True, gate=True),
    Case("packed_grouped", length=200, channels=8, groups=2, segments=3, softplus=False),
)

# Long sequences, where accuracy is promised, with those of 1 and 63 tokens in `SMALL`.
ACCURACY = tuple(
    Case(f"accuracy_{name}_{length}", 1, length, channels=16, state_size=16, step=step, gate=True)
    for length in (1000, 4097)
    for name, step in (("slow", 0.01), ("usual", 0.1), ("fast", 2.0))
)

# What benchmarks time: layers of the Mambas of 130 million and of 1.4 billion parameters.
SPEED = tuple(
    Case(f"speed_{channels}_{length}", 1, length, channels, 16, gate=True)
    for channels in (1536, 4096)
    for length in (1024, 4096)
)

# What a kernel must be right in to qualify on a device.
TRIED = ("plain_63", "state_150", "grouped_130", "strong_150", "one_state_200", "packed_150")
WIDE = (
    Case("wide_300", 1, 300, 384, 16, gate=True, initial_state=True),
    Case("wide_groups", 2, 200, 512, 16, groups=2),
)


def trials() -> tuple[Trial, ...]:
    """What kernels of `selective_scan` are tried with."""
    small = [(case, dtype) for case in SMALL if case.name in TRIED for dtype in ("bfloat16", "float32")]
    correct = [_trial(case, dtype) for case, dtype in (*small, *((case, "bfloat16") for case in WIDE))]
    speed = [case for case in SPEED if case.length == 4096]
    return (*correct, *(_trial(case, "bfloat16", timed=True) for case in speed))


def _trial(case: Case, dtype: str, timed: bool = False) -> Trial:
    arguments, options = case.arguments(jnp.dtype(dtype))

    def call(arguments: dict[str, Any], implementation: str) -> Any:
        return selective_scan(**arguments, **options, return_state=True, implementation=implementation)

    return Trial(case.name, dtype, jax.tree.map(np.asarray, arguments), call, timed)
