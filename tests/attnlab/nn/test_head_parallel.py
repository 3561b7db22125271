"""A function of heads gives the same, and the same gradients, as where there are several devices."""

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.nn.head_parallel import head_parallel
from tests.accuracy import relative_rms


def chosen_products(q, k, rows):
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    picked = jnp.take_along_axis(k, jnp.swapaxes(rows, 1, 2)[..., None], axis=1)
    return jnp.tanh(q * picked)


def test_as_on_one_device(monkeypatch):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 5, 4, 3)).astype(np.float32), rng.standard_normal((2, 5, 2, 3)).astype(np.float32)
    rows = rng.integers(0, 5, (2, 4, 5)).astype(np.int32)

    def run(q, k):
        def loss(q, k):
            y = head_parallel(chosen_products, ("BNHD", "BMGD", "BHN"), "BNHD", q, k, rows)
            return (y * jnp.cos(y)).sum(), y

        gradients, y = jax.grad(loss, (0, 1), has_aux=True)(q, k)
        return y, *gradients

    want = jax.jit(run)(q, k)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    for got, one in zip(jax.jit(lambda q, k: run(q, k))(q, k), want, strict=True):
        assert relative_rms(got, one) < 1e-6
