import functools
from collections.abc import Callable

import pytest

from pallas_kernels import selective_scan
from tests.pallas_kernels.accuracy import Results, errors_of, results_of


def evaluate(arguments: dict, options: dict, **how) -> Results:
    """Outputs and gradients."""
    how = {"return_state": True} | how | options
    return results_of(lambda arguments: selective_scan(**arguments, **how), arguments)


@pytest.fixture(scope="session")
def errors() -> Callable[..., Results]:
    """Relative RMS errors of an implementation against the float64 reference on the same rounded inputs."""
    return functools.partial(errors_of, evaluate)
