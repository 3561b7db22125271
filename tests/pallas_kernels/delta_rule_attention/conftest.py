import functools
from collections.abc import Callable

import pytest

from pallas_kernels import delta_rule_attention
from tests.pallas_kernels.accuracy import Results, errors_of, results_of


def evaluate(arguments: dict, options: dict, **how) -> Results:
    """Outputs and gradients, but for that of `scale`: one sum that may cancel."""
    how |= options | {"scale": arguments.get("scale"), "return_state": True}
    arguments = {name: x for name, x in arguments.items() if name != "scale"}
    return results_of(lambda arguments: delta_rule_attention(**arguments, **how), arguments)


@pytest.fixture(scope="session")
def errors() -> Callable[..., Results]:
    """Relative RMS errors of an implementation against the float64 reference on the same rounded inputs."""
    return functools.partial(errors_of, evaluate)
