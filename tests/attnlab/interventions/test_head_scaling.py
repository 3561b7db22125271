import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.interventions.gradient_probe import attention_gradients
from attnlab.interventions.head_scaling import HeadScaling
from attnlab.models.language_model import LanguageModel
from attnlab.points import At, Intervention, attach

LAYERS, HEADS = 2, 2


@pytest.fixture(scope="module")
def model():
    return LanguageModel(7, features=8, depth=LAYERS, num_heads=HEADS, rngs=nnx.Rngs(0))


IDS = jax.random.randint(jax.random.key(0), (2, 5), 0, 7)


def loss(model, ids=IDS):
    return jnp.sum(jnp.sin(model(ids)))


def test_a_sweep_over_ablations_is_one_vmap_and_importance_one_grad(model):
    def under(factors):
        return loss(attach(model, HeadScaling(factors)))

    everything = jnp.ones((LAYERS, HEADS))
    without = 1 - jnp.eye(LAYERS * HEADS).reshape(-1, LAYERS, HEADS)
    nudges = everything + 1e-2 * jnp.concatenate([1 - without, without - 1])

    @jax.jit
    def sweep():
        return jax.vmap(under)(without), jax.vmap(under)(nudges), jax.grad(under)(everything), loss(model)

    ablated, nudged, importance, plain = sweep()
    above, below = nudged.reshape(2, LAYERS, HEADS)
    np.testing.assert_allclose(importance, (above - below) / 2e-2, rtol=2e-2, atol=1e-3)
    np.testing.assert_allclose(under(everything), plain, rtol=1e-5)
    for index in range(LAYERS * HEADS):
        layer, head = divmod(index, HEADS)
        alone = nnx.clone(model)
        kernel = alone.blocks.blocks[layer].mixer.out.kernel
        kernel[...] = kernel[...].at[head].set(0)
        np.testing.assert_allclose(ablated[index], jax.jit(lambda alone=alone: loss(alone))(), rtol=1e-4)


def test_refuses_factors_of_another_rank():
    with pytest.raises(ValueError, match=r"factors must be \(L, H\) or \(H,\), got shape \(\)"):
        HeadScaling(0.5)


class Nudge(Intervention):
    """Adds to one weight of one layer."""

    def __init__(self, place, by):
        self.place, self.by = place, by

    def attention(self, weights, at: At, memory):
        return weights.at[self.place].add(self.by), memory


def test_gradients_of_attention_equal_finite_differences(model):
    gradients = attention_gradients(model, loss, IDS)
    assert gradients.shape == (LAYERS, 2, HEADS, 5, 5)
    for layer, place in ((0, (0, 1, 4, 2)), (1, (1, 0, 3, 3)), (0, (1, 1, 0, 0))):
        above, below = (loss(attach(model, Nudge(place, by), layers=[layer])) for by in (1e-2, -1e-2))
        np.testing.assert_allclose(gradients[layer][place], (above - below) / 2e-2, rtol=2e-2, atol=1e-3)


def test_gradients_of_attention_need_weights_in_all_layers():
    hybrid = LanguageModel(
        7,
        features=8,
        depth=2,
        num_heads=2,
        mixer=("lightning_attention_2", "softmax_attention"),
        rngs=nnx.Rngs(0),
    )
    with pytest.raises(ValueError, match="acts at attention, which layer 0 does not have"):
        attention_gradients(hybrid, loss, IDS)
