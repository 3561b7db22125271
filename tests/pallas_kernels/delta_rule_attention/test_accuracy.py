"""Outputs and gradients of every floating argument against the float64 recurrence."""

import jax.numpy as jnp
import pytest

from pallas_kernels.delta_rule_attention.cases import ACCURACY, SMALL

BOUND = {"float32": 1e-6, "bfloat16": 4e-3}
BOTH = [(case, dtype) for case in SMALL for dtype in BOUND]
PROMISED = [(case, "float32") for case in ACCURACY] + [(case, "bfloat16") for case in ACCURACY if case.length == 1000]


@pytest.mark.parametrize(("case", "dtype"), BOTH + PROMISED, ids=lambda x: getattr(x, "name", x))
def test_relative_rms_error(case, dtype, errors):
    found = errors(case, jnp.dtype(dtype), implementation="xla")
    assert max(found.outputs) <= BOUND[dtype], found.outputs
    assert ("log_decay" in found.gradients) == (case.decay is not None)
    assert max(found.gradients.values()) <= 2 * BOUND[dtype], found.gradients
