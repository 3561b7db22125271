import jax
import jax.numpy as jnp
import numpy as np

from attnlab.compiling import compiled_for_once
from pallas_kernels import dispatch


def test_computes_what_jit_does_and_takes_its_options():
    def draw(x):
        return jax.random.normal(jax.random.key(0), (5,)) + x

    once = compiled_for_once(draw, donate_argnums=0)
    np.testing.assert_allclose(once(jnp.ones(5)), jax.jit(draw)(jnp.ones(5)), rtol=1e-6)


def test_is_fast_on_a_cpu_alone(monkeypatch):
    given = []
    monkeypatch.setattr(jax, "jit", lambda function, **options: given.append(options["compiler_options"]))
    compiled_for_once(abs)
    with dispatch.target("tpu", device_kind="TPU v5e"):
        compiled_for_once(abs)
    assert given[0] == {"xla_backend_optimization_level": 0} and given[1] is None
