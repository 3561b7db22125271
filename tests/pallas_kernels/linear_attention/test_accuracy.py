"""Outputs and gradients of every floating argument against the float64 recurrence."""

import jax.numpy as jnp
import pytest

from pallas_kernels.linear_attention.cases import ACCURACY, SMALL
from tests.pallas_kernels.quick import joined, quick

BOUND = {"float32": 1e-6, "bfloat16": 4e-3}


RUNS = [(case, dtype) for case in SMALL + ACCURACY for dtype in BOUND]
QUICK = {
    *(f"{name}-float32" for name in ("one_token_channel", "head_97", "channel_150", "grouped_token", "strong_channel")),
    *(f"{name}-float32" for name in ("normalized_token", "packed_head", "packed_normalized", "full_packed_cross")),
    *(f"{name}-bfloat16" for name in ("token_300", "grouped_channel", "full_cross")),
    "accuracy_token_4097-float32",
}


@pytest.mark.parametrize(("case", "dtype"), quick(RUNS, QUICK, joined))
def test_relative_rms_error(case, dtype, errors):
    found = errors(case, jnp.dtype(dtype))
    assert max(found.outputs) <= BOUND[dtype], found.outputs
    assert set(found.gradients) >= {"q", "k", "v"}
    assert ("log_decay" in found.gradients) == (case.decay is not None)
    assert max(found.gradients.values()) <= 2 * BOUND[dtype], found.gradients
