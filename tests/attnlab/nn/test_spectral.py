"""The global filter: what it is with weights of 1, and under cyclic shifts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.nn.spectral import GlobalFilter, global_filter, spectrum_of
from tests.accuracy import relative_rms


@pytest.mark.parametrize("grid", [(7,), (6, 5), (2, 3, 4)])
def test_weights_of_one_are_the_identity_and_any_commute_with_cyclic_shifts(grid):
    x = np.random.default_rng(0).normal(size=(2, *grid, 3)).astype(np.float32)
    one = jnp.zeros((*spectrum_of(grid), 3, 2)).at[..., 0].set(1)
    layer = GlobalFilter(3, spectrum_of(grid), rngs=nnx.Rngs(0))
    shift = tuple(range(1, 1 + len(grid)))
    axes = shift

    @jax.jit
    def run(x):
        return global_filter(x, one), jnp.roll(layer(x), shift, axes), layer(jnp.roll(x, shift, axes))

    same, after, before = run(x)
    assert relative_rms(same, x) < 1e-6
    assert relative_rms(before, after) < 1e-5


def test_weights_of_another_grid_are_refused_or_interpolated():
    x = jnp.ones((1, 4, 6, 2))
    with pytest.raises(ValueError, match="weight must be"):
        GlobalFilter(2, (3, 4), rngs=nnx.Rngs(0))(x)
    layer = GlobalFilter(2, (3, 4), resize=True, rngs=nnx.Rngs(0))
    layer.weight[...] = jnp.zeros_like(layer.weight[...]).at[..., 0].set(1)
    assert relative_rms(layer(x), x) < 1e-6
