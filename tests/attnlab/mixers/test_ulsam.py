"""Subspace attention: its maps, and what training keeps of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.mixers.ulsam import SubspaceAttention
from tests.accuracy import relative_rms


def test_maps_sum_to_one_and_training_keeps_the_statistics_of_the_batch():
    mixer = SubspaceAttention(8, groups=2, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(1, 2, size=(3, 4, 5, 8)).astype(np.float32)
    graph, state = nnx.split(mixer)

    @jax.jit
    def run(state, x):
        mixer = nnx.merge(graph, state, copy=True)
        plain, recorded = nnx.capture(mixer, nnx.Intermediate)(x)
        trained, twin = (nnx.merge(graph, state, copy=True) for _ in range(2))
        y = trained(x, deterministic=False)
        want = twin.local_norm(twin.local(x), deterministic=False)
        other = nnx.merge(graph, state, copy=True)
        return (
            plain,
            recorded["gate"][0],
            y,
            other._trained(x),
            want,
            nnx.state(trained.local_norm),
            nnx.state(twin.local_norm),
        )

    plain, weights, y, normed, want, kept, expected = run(state, x)
    assert weights.shape == (3, 4, 5, 2) and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum((1, 2)), 1, rtol=1e-5)
    assert relative_rms(plain, x * (1 + np.repeat(weights, 4, -1))) < 1e-6
    assert y.shape == x.shape and relative_rms(y, plain) > 1e-3
    assert relative_rms(normed, want) < 1e-5
    local = np.asarray(mixer.local(x), np.float64).reshape(-1, 8)
    for held in (kept, expected):  # the variance is unbiased, as PyTorch keeps it
        np.testing.assert_allclose(held["mean"][...], 0.9 * local.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(held["var"][...], 0.1 + 0.9 * local.var(0, ddof=1), rtol=1e-4)


def test_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="groups must divide the 8 channels"):
        SubspaceAttention(8, groups=3, rngs=nnx.Rngs(0))
