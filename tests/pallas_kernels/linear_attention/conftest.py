from collections.abc import Callable

import jax.numpy as jnp
import pytest

from pallas_kernels import linear_attention
from pallas_kernels.linear_attention.cases import Case
from tests.pallas_kernels.accuracy import Results, errors_of, results_of


def _evaluate(arguments: dict, options: dict, implementation: str) -> Results:
    how = options | {
        "return_state": options.get("causal", True) or "segment_ids" not in options,
        "implementation": implementation,
    }
    return results_of(lambda arguments: linear_attention(**arguments, **how), arguments)


@pytest.fixture(scope="session")
def errors() -> Callable[[Case, jnp.dtype, str], Results]:
    """Relative RMS errors of an implementation against the float64 reference on the same rounded inputs."""
    return lambda case, dtype, implementation="xla": errors_of(_evaluate, case, dtype, implementation=implementation)
