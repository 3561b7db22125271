from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_attention
from pallas_kernels.linear_attention.cases import Case
from tests.pallas_kernels.accuracy import Results, errors_of
from tests.quick import quick_jit


def _evaluate(arguments: dict, options: dict, implementation: str) -> Results:
    stateful = options.get("causal", True) or "segment_ids" not in options

    def loss(arguments):
        q, k, v = (arguments[name] for name in "qkv")
        rest = {name: x for name, x in arguments.items() if name not in "qkv"}
        outputs = linear_attention(q, k, v, **rest, **options, return_state=stateful, implementation=implementation)
        outputs = jax.tree.leaves(outputs)
        rng = np.random.default_rng(0)
        wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in outputs]
        return sum(jnp.vdot(x, jnp.asarray(rng.standard_normal(x.shape), x.dtype)) for x in wide), outputs

    (_, outputs), gradients = quick_jit(jax.value_and_grad(loss, has_aux=True))(arguments)
    named = {jax.tree_util.keystr(path): g for path, g in jax.tree_util.tree_leaves_with_path(gradients)}
    return Results(
        [np.asarray(x, np.float64) for x in outputs], {k: np.asarray(g, np.float64) for k, g in named.items()}
    )


@pytest.fixture(scope="session")
def errors() -> Callable[[Case, jnp.dtype, str], Results]:
    """Relative RMS errors of an implementation against the float64 reference on the same rounded inputs."""
    return lambda case, dtype, implementation="xla": errors_of(_evaluate, case, dtype, implementation=implementation)
