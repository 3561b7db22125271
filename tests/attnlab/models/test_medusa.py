"""MEDUSA: gates begin at one half, the body looks once, stages without a head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.models.medusa import GlobalAttentionBody, Medusa, ScaleHead


def test_a_gate_without_anything_learned_halves_a_map():
    head, y = ScaleHead(4, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 3, 3, 4))
    head.gate.kernel[...] = jnp.zeros((4, 4))
    np.testing.assert_array_equal(head(y, jnp.ones((1, 6, 6, 2))), 0.5 * y)
    head.residual = True
    np.testing.assert_array_equal(head(y, jnp.ones((1, 6, 6, 2))), 1.5 * y)
    with pytest.raises(ValueError, match="of 1 images"):
        head(y, jnp.ones((2, 6, 6, 2)))


def test_the_body_keeps_the_grid_and_reaches_far():
    body = GlobalAttentionBody(3, 2, widths=(4, 4, 4), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 19, 16, 3)), jnp.float32)
    assert body(x).shape == (1, 19, 16, 2)
    seen = np.asarray(jax.jit(jax.grad(lambda x: jnp.square(body(x)[0, 9, 8]).sum()))(x))[0].any(-1)
    assert seen[0].any() and seen[-1].any()


def test_some_stages_alone_are_gated():
    model = Medusa((4, 4), body=(4,), gated=(1,), num_classes=None, rngs=nnx.Rngs(0))
    assert model.gated == (1,) and len(model.gates) == 1
    first, last = model.stages(jnp.ones((1, 8, 8, 3)))
    assert first.shape == (1, 4, 4, 4) and last.shape == (1, 2, 2, 4)
    with pytest.raises(ValueError, match="some of 2 stages"):
        Medusa((4, 4), gated=(2,), rngs=nnx.Rngs(0))
