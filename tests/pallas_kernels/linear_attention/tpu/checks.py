"""Interpreted TPU kernels of linear attention against the float64 reference."""

import jax.numpy as jnp

from pallas_kernels.linear_attention.tpu import plan
from tests.pallas_kernels import tpu_interpreter

BOUND = {"float32": 1e-6, "bfloat16": 4e-3}


def interpreted(device_kind: str | None = "TPU v5e", *, tokens: int = 128, lanes: int = plan.BLOCK_LANES):
    """`tpu_interpreter.interpreted`, in blocks of at most so many tokens and lanes."""
    return tpu_interpreter.interpreted(device_kind, plan, BLOCK_TOKENS=tokens, BLOCK_LANES=lanes)


def check(errors, case, dtype: str, **blocks) -> None:
    """Asserts the promised accuracy of outputs and gradients; `errors` is the fixture, `blocks` as in `interpreted`."""
    with interpreted(**blocks) as kernels:
        found = errors(case, jnp.dtype(dtype), "tpu")
    assert len(kernels) == (2 if case.causal or case.segments else 4)
    assert max(found.outputs) <= BOUND[dtype], found.outputs
    assert set(found.gradients) >= {"q", "k", "v"}
    assert ("log_decay" in found.gradients) == (case.decay is not None)
    assert max(found.gradients.values()) <= 2 * BOUND[dtype], found.gradients
