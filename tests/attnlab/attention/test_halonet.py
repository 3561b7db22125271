"""Blocked attention with halos: against its definition, query by query, and what is read for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.local.halonet import HaloAttention, HaloDownsampling, halo_attention
from attnlab.nn.grids import unfold_index


def attention_map(mixer, x):
    _, found = nnx.capture(mixer, nnx.Intermediate)(x)
    return found["attention"][0]


@pytest.mark.parametrize(("step", "scaled"), [(1, False), (2, True)])
def test_definition(step, scaled):
    random, block, halo, side = np.random.default_rng(0), 2, 1, 2 // step
    window = block + 2 * halo
    q = random.standard_normal((1, 4 // step, 6 // step, 2, 3))
    k, v = (random.standard_normal((1, 4, 6, 2, size)) for size in (3, 5))
    rows, columns = random.standard_normal((2, 2 * window - 1, 3))
    k_around, v_around = (np.pad(part, [(0, 0), (halo, halo), (halo, halo), (0, 0), (0, 0)]) for part in (k, v))
    want = np.zeros((*q.shape[:-1], 5))
    for y, x, h in np.ndindex(*q.shape[1:4]):
        (top, i), (left, j) = divmod(y, side), divmod(x, side)
        patch = np.s_[0, top * block : top * block + window, left * block : left * block + window, h]
        one = q[0, y, x, h]
        offsets = rows[window - 1 - i : 2 * window - 1 - i] @ one
        places = offsets[:, None] + columns[window - 1 - j : 2 * window - 1 - j] @ one
        scores = k_around[patch] @ one * 3**-0.5 + places * (3**-0.5 if scaled else 1)
        weights = np.exp(scores - scores.max())
        want[0, y, x, h] = np.einsum("uv,uve->e", weights, v_around[patch]) / weights.sum()
    arrays = (jnp.asarray(part, jnp.float32) for part in (q, k, v, rows, columns))
    got = halo_attention(*arrays, block=block, halo=halo, scale_positions=scaled)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_zeros_around_the_image_take_weight():
    mixer = HaloAttention(8, num_heads=2, block=4, halo=1, rngs=nnx.Rngs(0))
    weights = np.asarray(attention_map(mixer, jax.random.normal(jax.random.key(0), (1, 12, 12, 8)))).sum(-1)
    sums = weights.reshape(2, 12, 12)
    np.testing.assert_allclose(sums[:, 4:8, 4:8], 1, atol=1e-5)
    assert (sums[:, :4] < 0.999).all() and (sums[:, :, 8:] < 0.999).all()


def test_keys_are_read_3_times_not_196_times():
    blocked = unfold_index((32, 32), 14, stride=8, padding=3).size / 32**2
    assert blocked == (14 / 8) ** 2 == 3.0625
    assert unfold_index((32, 32), 14, stride=1, padding=7)[:32, :32].size / 32**2 == 196


def test_strides_and_refusals():
    x = jnp.ones((1, 6, 6, 8))
    assert HaloDownsampling(8, 12, num_heads=2, block=3, halo=1, rngs=nnx.Rngs(0)).averaged
    assert HaloDownsampling(8, 12, num_heads=2, block=3, halo=1, rngs=nnx.Rngs(0))(x).shape == (1, 3, 3, 12)
    with pytest.raises(ValueError, match=r"blocks of 4 x 4 do not tile the grid \(6, 6\)"):
        HaloAttention(8, num_heads=2, block=4, rngs=nnx.Rngs(0))(x)
    with pytest.raises(ValueError, match="stride must be 1 or 2"):
        HaloDownsampling(8, stride=3, rngs=nnx.Rngs(0))
