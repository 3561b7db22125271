import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import delta_rule_attention
from pallas_kernels.delta_rule_attention.cases import Case


@dataclasses.dataclass(frozen=True)
class Results:
    """Outputs (y and the state) and gradients by argument: numbers in float64, or their relative errors."""

    outputs: list
    gradients: dict


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

    def compute(case: Case, dtype: jnp.dtype, **how) -> Results:
        arguments, options = case.arguments(dtype)
        got = evaluate(arguments, options, **how)
        with jax.enable_x64(True):
            exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), arguments)
            want = evaluate(exact, options, implementation="reference")
        return Results(
            [relative_rms(g, w) for g, w in zip(got.outputs, want.outputs, strict=True)],
            {name: relative_rms(got.gradients[name], w) for name, w in want.gradients.items()},
        )

    return compute


def relative_rms(got: np.ndarray, want: np.ndarray) -> float:
    scale = np.sqrt(np.mean(want**2))
    return float(np.sqrt(np.mean((got - want) ** 2)) / (scale or 1.0))
