"""Outputs and gradients of every floating argument against the float64 recurrence."""

import jax.numpy as jnp
import pytest

from pallas_kernels.linear_attention.cases import ACCURACY, SMALL

BOUND = {"float32": 1e-6, "bfloat16": 4e-3}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in SMALL + ACCURACY for dtype in BOUND],
    ids=lambda x: getattr(x, "name", x),
)
def test_relative_rms_error(case, dtype, errors):
    found = errors(case, jnp.dtype(dtype))
    assert max(found.outputs) <= BOUND[dtype], found.outputs
    assert set(found.gradients) >= {"q", "k", "v"}
    assert ("log_decay" in found.gradients) == (case.decay is not None)
    assert max(found.gradients.values()) <= 2 * BOUND[dtype], found.gradients
