import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import delta_rule_attention
from tests.pallas_kernels.accuracy import Results, errors_of


def evaluate(arguments: dict, options: dict, **how) -> Results:
    """Outputs, and gradients of a random linear function of them, but for `scale`: one sum that may cancel."""
    scale = arguments.get("scale")
    arguments = {name: x for name, x in arguments.items() if name != "scale"}

    def loss(arguments):
        outputs = delta_rule_attention(**arguments, **options, scale=scale, return_state=True, **how)
        rng = np.random.default_rng(0)
        wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in outputs]
        return sum(jnp.vdot(x, jnp.asarray(rng.standard_normal(x.shape), x.dtype)) for x in wide), outputs

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arguments)
    return Results(
        [np.asarray(x, np.float64) for x in outputs], jax.tree.map(lambda g: np.asarray(g, np.float64), gradients)
    )


@pytest.fixture(scope="session")
def errors() -> Callable[..., Results]:
    """Relative RMS errors of an implementation against the float64 reference on the same rounded inputs."""
    return functools.partial(errors_of, evaluate)
