from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_attention.cases import Case
from tests.pallas_kernels.accuracy import Results, relative_errors, results_of


def evaluate(case: Case, arrays: dict, **how) -> Results:
    """Outputs and gradients; rows without keys have an lse of -inf, here 0."""

    def run(arrays):
        y, lse = case.call(arrays, **how)
        return y, jnp.where(lse == -jnp.inf, 0, lse)

    return results_of(run, arrays)


@pytest.fixture(scope="session")
def errors() -> Callable[..., Results]:
    """Relative RMS errors of an implementation against the float64 reference on the same rounded inputs."""

    def errors_of(case: Case, dtype, **how) -> Results:
        arrays, _ = case.arguments(dtype)
        got = evaluate(case, arrays, **how)
        with jax.enable_x64(True):
            exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), arrays)
            want = evaluate(case, exact, implementation="reference")
        return relative_errors(got, want)

    return errors_of
