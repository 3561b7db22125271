"""Interpreted TPU kernels against the float64 reference; shared by the tests of the TPU implementation."""

import contextlib
from collections.abc import Iterator

import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic.interpret.race_detection_state import RaceDetectionState
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.linear_attention import tpu_plan

BOUND = {"float32": 1e-6, "bfloat16": 4e-3}


@contextlib.contextmanager
def interpreted(
    device_kind: str | None = "TPU v5e", *, tokens: int = 128, lanes: int = tpu_plan.BLOCK_LANES
) -> Iterator[list[RaceDetectionState]]:
    """Chooses for a TPU and interprets its kernels, in blocks of at most so many tokens and lanes.

    Memory that nobody wrote is NaN, reads out of bounds raise, and so does a race.

    Yields:
      A list that grows by one element per kernel that runs.
    """
    kernels = []

    def watch(**options):
        kernels.append(RaceDetectionState(**options))  # the interpreter itself remembers those of its last kernel
        return kernels[-1]

    parameters = pltpu.InterpretParams(detect_races=True)
    with (
        pytest.MonkeyPatch.context() as patch,
        dispatch.target("tpu", device_kind),
        pltpu.force_tpu_interpret_mode(parameters),
    ):
        patch.setattr(interpreter, "RaceDetectionState", watch)
        patch.setattr(tpu_plan, "BLOCK_TOKENS", tokens)
        patch.setattr(tpu_plan, "BLOCK_LANES", lanes)
        try:
            yield kernels
            assert not any(kernel.races_found for kernel in kernels)
        finally:
            pltpu.reset_tpu_interpret_mode_state()


def check(errors, case, dtype: str, **blocks) -> None:
    """Asserts the promised accuracy of outputs and gradients; `errors` is the fixture, `blocks` as in `interpreted`."""
    with interpreted(**blocks) as kernels:
        found = errors(case, jnp.dtype(dtype), "tpu")
    assert len(kernels) == (2 if case.causal or case.segments else 4)
    assert max(found.outputs) <= BOUND[dtype], found.outputs
    assert set(found.gradients) >= {"q", "k", "v"}
    assert ("log_decay" in found.gradients) == (case.decay is not None)
    assert max(found.gradients.values()) <= 2 * BOUND[dtype], found.gradients
