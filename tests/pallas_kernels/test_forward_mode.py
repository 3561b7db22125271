"""Forward-mode derivatives: of the references; elsewhere JAX refuses them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention, delta_rule_attention, dispatch, linear_attention, selective_scan
from pallas_kernels.neighborhood_attention import neighborhood_attention
from tests.accuracy import relative_rms

RNG = np.random.default_rng(0)
Q, K, V, DIRECTION = (jnp.asarray(0.3 * RNG.normal(size=(1, 9, 2, 3)), jnp.float32) for _ in range(4))
BETA = jnp.asarray(RNG.random((1, 9, 2)), jnp.float32)
OPS = {
    "linear": lambda q: linear_attention(q, K, V, log_decay=jnp.full((2,), -0.1)),
    "normalized": lambda q: linear_attention(jnp.exp(q), jnp.exp(K), V, normalize=True, causal=False),
    "delta_rule": lambda q: delta_rule_attention(q, K, V, BETA),
    "neighborhood": lambda q: neighborhood_attention(q, K, V, 3),
    "block_sparse": lambda q: block_sparse_attention(q, K, V),
    "selective_scan": lambda q: selective_scan(q[:, :, 0], K[:, :, 0], -jnp.ones((3, 3)), V[:, :, 0], K[:, :, 1]),
}


@pytest.mark.parametrize("name", OPS)
def test_forward_mode(name):
    op = OPS[name]
    with dispatch.forward_mode():
        y, change = jax.jvp(op, (Q,), (DIRECTION,))
    assert relative_rms(y, op(Q)) < 1e-5
    cotangent = jnp.asarray(RNG.normal(size=y.shape), jnp.float32)
    gradient = jax.vjp(op, Q)[1](cotangent)[0]
    np.testing.assert_allclose(jnp.vdot(change, cotangent), jnp.vdot(gradient, DIRECTION), rtol=1e-3)


@pytest.mark.parametrize("name", ["linear", "delta_rule", "neighborhood", "selective_scan"])
def test_elsewhere_it_is_refused(name):
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(OPS[name], (Q,), (DIRECTION,))


def test_the_hessian_of_a_small_model():
    def loss(q):
        return (OPS["linear"](q) ** 2).sum()

    def product(q):
        return jax.grad(lambda q: jnp.vdot(jax.grad(loss)(q), DIRECTION))(q)

    with dispatch.forward_mode():
        _, forward = jax.jvp(jax.grad(loss), (Q,), (DIRECTION,))
    assert relative_rms(forward, product(Q)) < 1e-4
