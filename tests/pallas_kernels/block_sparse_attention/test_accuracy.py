"""Outputs and gradients of every floating argument against the float64 reference."""

import jax.numpy as jnp
import pytest

from pallas_kernels.block_sparse_attention.cases import SMALL
from tests.pallas_kernels.quick import joined, quick

BOUND = {"float32": 2e-6, "bfloat16": 4e-3}
RUNS = [(case, "float32") for case in SMALL]
RUNS += [(case, "bfloat16") for case in SMALL if case.name in ("window", "segments", "routed", "score_mod")]
QUICK = {
    "window-float32",
    "per_head-float32",
    "segments-bfloat16",
    "routed_segments-float32",
    "chosen-float32",
    "score_mod-float32",
}


@pytest.mark.parametrize(("case", "dtype"), quick(RUNS, QUICK, joined))
def test_relative_rms_error(case, dtype, errors):
    found = errors(case, jnp.dtype(dtype), implementation="xla")
    assert max(found.outputs) <= BOUND[dtype], found.outputs
    assert set(found.gradients) == {"q", "k", "v", *case.extra}
    assert max(found.gradients.values()) <= 2 * BOUND[dtype], found.gradients
