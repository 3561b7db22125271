"""Outputs and gradients of every floating argument against the float64 recurrence."""

import functools

import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.selective_scan.cases import ACCURACY, SMALL
from tests.pallas_kernels.accuracy import errors_of
from tests.pallas_kernels.quick import joined, quick
from tests.pallas_kernels.selective_scan.conftest import evaluate

BOUND = {"float32": 1e-6, "bfloat16": 4e-3}
HALF = ("state_150", "grouped_gate", "strong_150", "packed_150", "accuracy_usual_1000")
RUNS = [(case, "float32") for case in SMALL + ACCURACY]
RUNS += [(case, "bfloat16") for case in SMALL + ACCURACY if case.name in HALF]
QUICK = {
    *(f"{name}-float32" for name in ("one_token_state", "size_one", "grouped_130", "packed_150", "accuracy_slow_1000")),
    "state_150-bfloat16",
}


@pytest.mark.parametrize(("case", "dtype"), quick(RUNS, QUICK, joined))
def test_relative_rms_error(case, dtype, errors):
    found = errors(case, jnp.dtype(dtype), implementation="xla")
    assert max(found.outputs) <= BOUND[dtype], found.outputs
    assert max(found.gradients.values()) <= 2 * BOUND[dtype], found.gradients


@pytest.mark.parametrize("case", quick(SMALL + ACCURACY, ("packed_grouped",), lambda case: case.name))
def test_relative_rms_error_of_the_associative_scan(case, errors):
    with dispatch.target("gpu"):
        found = errors(case, jnp.float32, implementation="xla")
    assert max(found.outputs) <= BOUND["float32"], found.outputs
    assert max(found.gradients.values()) <= 2 * BOUND["float32"], found.gradients


@pytest.mark.parametrize(
    "case", quick([case for case in SMALL if case.length > 1], ("packed_150",), lambda case: case.name)
)
def test_relative_rms_error_of_all_states(case):
    found = errors_of(functools.partial(evaluate, return_states=True), case, jnp.float32, implementation="xla")
    assert max(found.outputs) <= BOUND["float32"], found.outputs
    assert max(found.gradients.values()) <= 2 * BOUND["float32"], found.gradients
