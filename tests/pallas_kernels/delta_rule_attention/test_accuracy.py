"""Outputs and gradients of every floating argument against the float64 recurrence."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.delta_rule_attention.cases import ACCURACY, REFLECTIONS, SMALL
from tests.pallas_kernels.quick import joined, quick

BOUND = {"float32": 1e-6, "bfloat16": 4e-3}
HALF = ("wide_150", "grouped_token", "strong_token", "accuracy_none_1000", "accuracy_head_1000")
RUNS = [(case, "float32") for case in SMALL + ACCURACY]
RUNS += [(case, "bfloat16") for case in SMALL + ACCURACY if case.name in HALF]


QUICK = {
    *(f"{name}-float32" for name in ("one_token_state", "size_one", "head_97", "grouped_token", "strong_token")),
    *(f"{name}-float32" for name in ("repeated_keys", "packed_head", "accuracy_token_4097")),
    "wide_150-bfloat16",
}


@pytest.mark.parametrize(("case", "dtype"), quick(RUNS, QUICK, joined))
def test_relative_rms_error(case, dtype, errors):
    found = errors(case, jnp.dtype(dtype), implementation="xla")
    assert max(found.outputs) <= BOUND[dtype], found.outputs
    assert ("log_decay" in found.gradients) == (case.decay is not None)
    assert max(found.gradients.values()) <= 2 * BOUND[dtype], found.gradients


@pytest.mark.parametrize("case", quick(REFLECTIONS, ("reflections",), lambda case: case.name))
def test_reflections_add_up_their_roundings(case, errors):
    """Nothing contracts: with one key, (1 - β k·k)ᴺ has the rounding of one k·k, N times over."""
    found = errors(case, jnp.float32, implementation="xla")
    assert max(*found.outputs, *found.gradients.values()) <= 2 * case.length * np.finfo(np.float32).eps, found
