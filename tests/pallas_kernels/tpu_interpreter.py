"""Pallas' interpreter of TPUs, for the tests of every op."""

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic.interpret.race_detection_state import RaceDetectionState
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch


@contextlib.contextmanager
def interpreted(
    device_kind: str | None = "TPU v5e",
    plan: ModuleType | None = None,
    *,
    recorder: Callable[..., Any] | None = None,
    **limits: Any,
) -> Iterator[list[RaceDetectionState]]:
    """Chooses for a TPU and interprets its kernels.

    Memory that nobody wrote is NaN, reads out of bounds raise, and so does a race.

    Args:
      device_kind: of the TPU.
      plan: module whose limits of blocks are others inside.
      recorder: is called as `recorder(token, grid point, core)` for each grid point, and returns the token.
      **limits: those, by name.

    Yields:
      A list that grows by one element per kernel that runs.
    """
    kernels = []

    def watch(**options):
        kernels.append(RaceDetectionState(**options))  # the interpreter itself remembers those of its last kernel
        return kernels[-1]

    parameters = pltpu.InterpretParams(detect_races=True, grid_point_recorder=recorder)
    with (
        pytest.MonkeyPatch.context() as patch,
        dispatch.target("tpu", device_kind, qualified_only=False),
        pltpu.force_tpu_interpret_mode(parameters),
    ):
        patch.setattr(interpreter, "RaceDetectionState", watch)
        for name, value in limits.items():
            patch.setattr(plan, name, value)
        try:
            yield kernels
            assert not any(kernel.races_found for kernel in kernels)
        finally:
            pltpu.reset_tpu_interpret_mode_state()
