"""Polyline path masks: sums along paths, both forms of the attention, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention.dense.ppma import (
    axial_weights,
    path_masks,
    polyline_mask,
    separable_attention,
    separable_map,
)


def decays(*shape):
    return -np.random.default_rng(0).exponential(size=(2, *shape)).astype(np.float32)


def test_mask_sums_decays_along_the_row_of_the_query_then_the_column_of_the_key():
    alpha, beta = decays(1, 3, 4, 2)
    mask = np.asarray(polyline_mask(alpha, beta)).reshape(2, 3, 4, 3, 4)
    for h, i, j, k, l in np.ndindex(2, 3, 4, 3, 4):
        row = alpha[0, i, min(j, l) + 1 : max(j, l) + 1, h].sum()
        column = beta[0, min(i, k) + 1 : max(i, k) + 1, l, h].sum()
        np.testing.assert_allclose(mask[h, i, j, k, l], row + column, atol=1e-6)
    assert mask.max() == 0


def test_decays_of_zero_have_gradients():
    alpha, beta = jnp.zeros((2, 1, 2, 3, 1))
    gradient = jax.grad(lambda a: polyline_mask(a, beta).sum())(alpha)
    assert (np.asarray(gradient)[0, :, 1:] > 0).all()


def test_separable_form_is_its_map():
    alpha, beta = decays(1, 3, 4, 2)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 3, 4, 2, 4))
    weights = axial_weights(q, k, *path_masks(alpha, beta))
    whole = separable_map(*weights)
    np.testing.assert_allclose(whole.sum(-1), 1, atol=1e-5)
    want = jnp.einsum("bhnm,bmhd->bnhd", whole, v.reshape(1, 12, 2, 4)).reshape(v.shape)
    np.testing.assert_allclose(separable_attention(v, *weights), want, atol=1e-5)


def test_weights_of_the_separable_form_are_of_order_three_halves():
    def entries(side):
        shape = jax.ShapeDtypeStruct((1, side, side, 1), jnp.float32)
        heads = jax.ShapeDtypeStruct((1, side, side, 1, 4), jnp.float32)
        made = jax.eval_shape(lambda q, a: axial_weights(q, q, *path_masks(a, a)), heads, shape)
        return sum(part.size for part in made)

    assert entries(16) == 2 * 16**3 and entries(32) / entries(16) == 4**1.5
